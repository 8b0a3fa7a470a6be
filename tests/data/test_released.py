"""Released pickles: arrays of every origin are read, and nothing in a pickle is ever run."""

import builtins
import collections
import functools
import operator
import os
import pickle
import pickletools
import subprocess
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch

from deepmsi.data.manifest import read_manifest
from deepmsi.data.options import PrepareOptions
from deepmsi.data.prepare import prepare
from deepmsi.data.released import read_pickle
from deepmsi.errors import UserError


def dump(path, value, protocol=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol))
    return path


ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "float16": np.linspace(0, 1, 5, dtype=np.float16),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.arange(4, dtype=">i4"),
    "uint8": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "bool": np.array([True, False]),
    "empty": np.empty((0, 3), np.float32),
    "zero-dim": np.array(3.5),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ARRAYS)
def test_numpy_arrays(tmp_path, name, protocol):
    value = {"a": ARRAYS[name], "again": [ARRAYS[name]], "scalar": np.float32(2.5), "n": (1, "x", None, True)}
    read = read_pickle(dump(tmp_path / "a.pkl", value, protocol))
    assert np.array_equal(read["a"], ARRAYS[name])
    assert read["a"].dtype == ARRAYS[name].dtype
    assert np.array_equal(read["again"][0], ARRAYS[name])
    assert (read["scalar"], read["n"]) == (2.5, (1, "x", None, True))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_torch_tensors(tmp_path, dtype, protocol):
    base = torch.arange(24).to(dtype).reshape(4, 6)
    for tensor in (base, base.t(), base[1:, ::2], base[2, 3], base[:0]):
        read = read_pickle(dump(tmp_path / "a.pkl", collections.OrderedDict(x=tensor), protocol))
        want = tensor.float() if dtype == torch.bfloat16 else tensor
        assert np.array_equal(read["x"], want.numpy())


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Plain:
    pass


def attacks(mark):
    touch = f"touch {mark}"
    storage = pickle.dumps(Calls(os.system, touch))
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", storage)
        file.writestr("archive/version", "3")
        file.writestr("archive/byteorder", "little")
    objects = np.array([Calls(os.system, touch)], dtype=object)
    return {
        "os.system": Calls(os.system, touch),
        "subprocess": Calls(subprocess.call, ["touch", str(mark)]),
        "eval": Calls(builtins.eval, f"__import__('os').system({touch!r})"),
        "exec": Calls(builtins.exec, f"import os; os.system({touch!r})"),
        "import": Calls(builtins.__import__, "os"),
        "getattr": Calls(builtins.getattr, "x", "upper"),
        "attrgetter": Calls(operator.attrgetter, "__class__"),
        "partial": functools.partial(os.system, touch),
        "nested": {"images": [(np.zeros(2), {"deep": Calls(os.system, touch)})]},
        "in-object-array": objects,
        "torch.load": Calls(torch.load, str(mark)),
        "numpy.load": Calls(np.load, str(mark)),
        "nested-pickle": Calls(pickle.loads, storage),
        "storage-with-pickle": Calls(torch.storage._load_from_bytes, storage),
        "storage-with-archive": Calls(torch.storage._load_from_bytes, archive.getvalue()),
        "class": Plain(),
        "bytes": b"\x80\x02c__builtin__\nbytes\nK\x05\x85R.",
        "open": Calls(open, str(mark), "w"),
        # Names reached through a permitted module, dotted as protocol 4 allows.
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0ef2py.os.system\x93.",
        "dotted-permitted": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",
        # GLOBAL of a permitted function, then BUILD that would change its attributes.
        "build-on-function": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}X\x04\x00\x00\x00_runK\x01sb.",
        "build-slots-on-function": (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}X\x04\x00\x00\x00_runK\x01s\x86b."
        ),
        "build-on-ndarray": b"\x80\x02cnumpy\nndarray\nN}X\x04\x00\x00\x00evilK\x01s\x86b.",
        "persistent-id": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "function-as-value": b"\x80\x02ccollections\nOrderedDict\n.",
        "inst": b"(S'touch'\nios\nsystem\n.",
    }


@pytest.mark.parametrize("name", attacks("x"))
def test_attacks_are_refused(tmp_path, name):
    mark = tmp_path / "ran"
    path = dump(tmp_path / "a.pkl", attacks(mark)[name], 4)
    with pytest.raises(UserError, match=r"a\.pkl: the pickle is (refused|damaged)") as caught:
        read_pickle(path)
    assert "\n" not in str(caught.value).strip()
    assert not mark.exists()


def test_refusal_names_the_cause(tmp_path):
    with pytest.raises(UserError, match=r"refused: it names (posix|nt|os)\.system"):
        read_pickle(dump(tmp_path / "a.pkl", Calls(os.system, "true")))


def test_tensor_beyond_its_storage(tmp_path):
    data = pickle.dumps(torch.zeros(4), protocol=2)
    ops = list(pickletools.genops(data))
    at = [position for op, arg, position in ops if op.name == "BININT1" and arg == 4]
    assert at, "the size stands in the pickle as one byte"
    for position in at:
        patched = bytearray(data)
        patched[position + 1] = 200
        with pytest.raises(UserError, match=r"beyond its storage|damaged"):
            read_pickle(dump(tmp_path / "a.pkl", bytes(patched)))


@pytest.mark.parametrize("cut", [0, 1, 10, -1, -20])
def test_damaged_pickle(tmp_path, cut):
    data = pickle.dumps({"images": np.zeros((2, 3))})
    with pytest.raises(UserError, match="damaged"):
        read_pickle(dump(tmp_path / "a.pkl", data[:cut]))


def test_nesting_without_end(tmp_path):
    ring: list = []
    ring.append(ring)
    with pytest.raises(UserError, match="nested"):
        read_pickle(dump(tmp_path / "a.pkl", ring))
    value: list = []
    for _ in range(31):
        value = [value, value]  # 2^31 leaves, were they not shared
    read_pickle(dump(tmp_path / "b.pkl", value))


def released(root, name, split, images, label):
    dump(root / split / "video" / f"{name}.pkl", {"images": images})
    dump(root / split / "text" / f"{name}.pkl", {"text_feature": torch.ones(6) * 2, "label": label})
    dump(root / split / "audio" / f"{name}.pkl", {"audio_feature": np.ones(4, np.float32)})


def test_released_folder_is_prepared(tmp_path):
    rng = np.random.default_rng(0)
    bytes_, unit = rng.integers(0, 256, (15, 3, 32, 32), np.uint8), rng.random((15, 3, 32, 32), np.float32)
    mean = np.array((0.485, 0.456, 0.406), np.float32)[:, None, None]
    std = np.array((0.229, 0.224, 0.225), np.float32)[:, None, None]
    root = tmp_path / "data"
    released(root, "u1", "train", bytes_, np.int64(3))
    released(root, "u2", "valid", torch.from_numpy(unit), 4)
    released(root, "u3", "test", (unit - mean) / std, torch.tensor(5))
    manifest = read_manifest(root)
    assert [(r.id, r.split, r.label) for r in manifest.rows] == [
        ("train_u1", "train", "3"),
        ("dev_u2", "dev", "4"),
        ("test_u3", "test", "5"),
    ]
    data = prepare(root, tmp_path / "out", PrepareOptions(frames=15, size=32), workers=0, progress=False)
    assert data.failures == []
    assert np.array_equal(data.frames(0), bytes_)
    for i in (1, 2):
        assert np.abs(data.frames(i) - np.rint(unit * 255)).max() <= 1
    assert data.features("text", 1).tolist() == [2.0] * 6
    assert data.feature_dims == {"text": 6, "audio": 4}


def test_hostile_clip_of_a_release_is_a_failure(tmp_path):
    root, mark = tmp_path / "data", tmp_path / "ran"
    released(root, "u1", "train", np.zeros((15, 3, 32, 32), np.uint8), 1)
    dump(root / "train" / "video" / "u1.pkl", Calls(os.system, f"touch {mark}"))
    data = prepare(root, tmp_path / "out", PrepareOptions(frames=15, size=32), workers=0, progress=False)
    assert not mark.exists()
    assert "refused" in data.failures[0]["reason"]
    assert (data.rows[0].has_video, data.rows[0].has_text) == (False, True)
