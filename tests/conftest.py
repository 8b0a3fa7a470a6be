"""Fixtures that every part of the suite shares."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    # The references are held to be float32; a convolution of cuDNN's takes TF32 unless it is told not to.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # Some tests ask for equal bits, which cuDNN's fastest gradients of a weight are not sure to have.
    torch.backends.cudnn.deterministic = True
else:
    # Read when triton and deepmsi are imported: without a GPU the Triton kernels run under the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch knows a compiled graph again by its operators' names, and would call them with the arguments they had then.
_SCHEMAS = Path(__file__).resolve().parents[1] / "deepmsi" / "ops" / "_schemas.py"
_KEY = hashlib.sha256(_SCHEMAS.read_bytes()).hexdigest()[:12]
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"deepmsi-compiled-{_KEY}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End a process of pytest-xdist whose GPU a test has broken: no later test there could pass, and another begins."""
    report = yield
    if call.excinfo is not None and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"{item.nodeid}: {report.longreprtext}", file=sys.__stderr__, flush=True)
            os._exit(1)
    return report


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real clips and transcripts that stands beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real clips and transcripts are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount an empty file system of a size such as ``1m``; that takes the rights of root."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        disk = tmp_path / f"disk{len(mounted)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a word vocabulary, saved as transformers saves it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "i", "am", "so", "happy", "sad", "you", ":", ".", "!"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wav2vec2_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Random encoders of the wav2vec 2.0 family, by model type and the norm of their feature extractor."""
    from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor

    made: dict[tuple[str, str, bool], Path] = {}

    def build(model_type: str = "wav2vec2", norm: str = "layer", stable: bool = False) -> Path:
        key = (model_type, norm, stable)
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                model_type,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                conv_dim=(8, 8, 8),
                conv_stride=(5, 4, 4),
                conv_kernel=(10, 8, 4),
                num_feat_extract_layers=3,
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
                feat_extract_norm=norm,
                do_stable_layer_norm=stable,
            )
            AutoModel.from_config(config).save_pretrained(folder)
            Wav2Vec2FeatureExtractor().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return build
