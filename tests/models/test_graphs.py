"""CUDA graphs: what is captured and why not; shapes and operators that no input changes; the rest on a GPU."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import captured_step
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepmsi import DeepMSI
from deepmsi.models import graphs
from deepmsi.models.graphs import CapturedInference, VideoGraphs, why_not_inference, why_not_training
from deepmsi.nn.swin_blocks import WindowAttention

STATIC: dict[str, dict[str, Any]] = {
    "keep": {"schedule": {"keep": [40, 21]}},
    "regrid": {"schedule": {"layout": "regrid", "keep": [49, 25]}},
    "capacity": {"schedule": "paper", "capacity": [50, 40]},
    "uncompressed": {"schedule": None},
}
CUDA = torch.device("cuda")


class Recorded(TorchDispatchMode):
    """Every operator that runs, with the shapes of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.trace.append((str(func), *(tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))))
        return out


def trace(model: DeepMSI, seed: int, training: bool) -> list[tuple[Any, ...]]:
    """Run the video branch, forward and backward or in inference, on random frames under a random guide."""
    torch.manual_seed(seed)
    side = model.config.vision.image_size
    pixels = torch.randint(0, 256 if seed else 2, (3, 2, 3, side, side), dtype=torch.uint8)
    assert model.video is not None
    guide = None if model.video.guide_dim is None else torch.randn(3, model.video.guide_dim, requires_grad=training)
    model.train(training)
    with torch.set_grad_enabled(training), Recorded() as recorded:
        features = model.video(pixels, guide)[0]
        if training:
            features.sum().backward()
    return recorded.trace


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("case", STATIC)
def test_shapes_and_operators_do_not_depend_on_the_input(
    tiny: Callable[..., DeepMSI], case: str, training: bool
) -> None:
    model = tiny(vision=STATIC[case])
    trace(model, 1, training)  # what is made once and kept
    first = trace(model, 1, training)
    assert len(first) > 150
    assert first == trace(model, 0, training) == trace(model, 2, training)


def test_with_a_threshold_they_do(tiny: Callable[..., DeepMSI]) -> None:
    model = tiny(vision={"schedule": "paper"})
    trace(model, 1, True)
    assert trace(model, 1, True) != trace(model, 2, True)


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_without_a_device_nothing_is_captured(tiny: Callable[..., DeepMSI], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not_training(tiny()) == why_not_inference(tiny()) == "no CUDA device is visible"


@pytest.mark.usefixtures("visible")
@pytest.mark.parametrize(
    ("vision", "options", "sentence"),
    [
        *((case, {}, None) for case in STATIC.values()),
        ({**STATIC["keep"], "recompute": "block"}, {}, None),
        ({**STATIC["keep"], "recompute": "light", "drop_path": 0.1}, {}, None),
        ({"schedule": "paper"}, {}, "a threshold without a capacity"),
        ({**STATIC["keep"], "recompute": "chunk"}, {}, "recompute=chunk"),
        ({**STATIC["keep"], "recompute": "block", "drop_path": 0.1}, {}, "state of the random generator"),
        (STATIC["keep"], {"accumulation": 2}, "gradients are accumulated"),
        (STATIC["keep"], {"processes": 2}, "several processes"),
        ({"backbone": "none"}, {}, "no video branch"),
    ],
)
def test_what_is_captured_in_training(
    tiny: Callable[..., DeepMSI], vision: dict[str, Any], options: dict[str, int], sentence: str | None
) -> None:
    found = why_not_training(tiny(vision=vision), CUDA, **options)
    assert found is None if sentence is None else sentence in (found or "")


@pytest.mark.usefixtures("visible")
def test_what_is_captured_in_inference(tiny: Callable[..., DeepMSI]) -> None:
    for vision in STATIC.values():
        assert why_not_inference(tiny(vision=vision), CUDA) is None
    assert why_not_inference(tiny(vision={"backbone": "none"}), CUDA) is None
    assert "a threshold without a capacity" in (why_not_inference(tiny(), CUDA) or "")
    assert "the model runs on cpu" in (why_not_inference(tiny()) or "")
    encoded = tiny(vision=STATIC["keep"], text={"encoder": "hashing"})
    assert "the text encoder is part of the model" in (why_not_inference(encoded, CUDA) or "")
    assert why_not_training(encoded, CUDA) is None


class Recorder:
    """Stands for `torch.cuda.make_graphed_callables`: keeps its rules, and runs the module in place of a graph."""

    def __init__(self) -> None:
        self.captured: list[tuple[Any, ...]] = []
        self.replayed = 0

    def __call__(self, module: nn.Module, samples: tuple[Tensor, ...], **options: Any) -> Callable[..., Tensor]:
        # Backward is captured here, too, and autocast would change what it computes.
        assert not torch.is_autocast_enabled("cpu")
        assert not module.autocast._cache_enabled
        assert module.training
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks)
        assert not any(buffer.requires_grad for buffer in module.buffers())
        assert options["pool"] == "pool"
        assert torch.cuda.graph is graphs._Capture
        surface = [*samples, *module.parameters()]
        for _ in range(options["num_warmup_iters"]):
            out = module(*samples)
            wanted = [tensor for tensor in surface if tensor.requires_grad]
            torch.autograd.grad(out, wanted, torch.empty_like(out), allow_unused=options["allow_unused_input"])
        self.captured.append(tuple(sample.shape for sample in samples))
        held = [sample.data_ptr() for sample in samples]

        def replay(*args: Tensor) -> Tensor:
            self.replayed += 1
            for arg, sample, address in zip(args, samples, held, strict=True):
                assert arg.shape == sample.shape
                assert arg.dtype == sample.dtype
                assert arg.requires_grad == sample.requires_grad
                assert arg.data_ptr() != address
            with torch.autocast("cpu", enabled=False):  # a graph runs under the autocast of its capture
                return module(*args)

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    @contextmanager
    def fork_rng(devices: Any) -> Iterator[None]:
        state = torch.get_rng_state()
        yield
        torch.set_rng_state(state)

    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    return recorder


def test_a_capture_minds_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that pins memory for a loader would end it; all of a device share its memory on one stream."""
    taken: list[dict[str, Any]] = []
    monkeypatch.setattr(graphs._Capture.__base__, "__init__", lambda *_, **options: taken.append(options))
    monkeypatch.setattr(graphs._Capture, "streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    ordinary = torch.cuda.graph
    for device in (0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        with graphs._minding_no_other_thread():
            torch.cuda.graph("graph", pool="pool", stream="another", capture_error_mode="global")
    assert torch.cuda.graph is ordinary
    assert [each.pop("stream").device for each in (dict(one) for one in taken)] == [0, 1, 0]
    assert taken[0]["stream"] is taken[2]["stream"]
    assert all(each["pool"] == "pool" and each["capture_error_mode"] == "thread_local" for each in taken)


def gradients(model: DeepMSI, batch: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**batch, labels=torch.arange(len(batch["text_features"])) % 3)
    out.loss.backward()
    return {"loss": out.loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_step_by_graphs_is_the_step_without(
    tiny: Callable[..., DeepMSI], batch: dict[str, Tensor], recorder: Recorder, autocast: bool
) -> None:
    model = tiny(vision={**STATIC["keep"], "tcn_dropout": 0.2, "drop_path": 0.2}).train()
    partial = {
        **batch,
        "pixel_values": batch["pixel_values"][:3],
        "modality_mask": torch.tensor([[True, True, True]] * 3 + [[False, True, True]]),
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = [gradients(model, given) for given in (batch, partial, batch)]
        assert model.video is not None
        entered: list[int] = []

        @contextmanager
        def around() -> Iterator[None]:
            entered.append(len(recorder.captured))
            yield
            entered.append(len(recorder.captured))

        model.video.graphs = VideoGraphs(model.video, around)
        found = [gradients(model, given) for given in (batch, partial, batch)]
    for left, right in zip(plain, found, strict=True):
        for name, value in left.items():
            assert torch.equal(value, right[name]), name
    shape = batch["pixel_values"].shape
    assert [captured[0] for captured in recorder.captured] == [shape, (3, *shape[1:])]
    assert entered == [0, 1, 1, 2]
    assert recorder.replayed == 3
    # In evaluation, and where it is asked what was kept, the branch runs as it is.
    model(**batch, return_kept=True)
    model.eval()(**batch)
    with torch.no_grad():
        model.train()(**batch)
    assert recorder.replayed == 3
    assert not any("graphs" in name for name in model.state_dict())


def test_so_many_shapes_are_captured_and_no_more(
    tiny: Callable[..., DeepMSI], batch: dict[str, Tensor], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 2)
    model = tiny(vision=STATIC["uncompressed"]).train()
    assert model.video is not None
    model.video.graphs = VideoGraphs(model.video)
    for count in (1, 2, 3, 2, 3):
        model(**{name: value[:count] for name, value in batch.items()}).logits.sum().backward()
    assert [captured[0][0] for captured in recorder.captured] == [1, 2]
    assert recorder.replayed == 3


def test_what_cannot_be_captured_runs_as_it_is(tiny: Callable[..., DeepMSI], batch: dict[str, Tensor]) -> None:
    model = tiny()
    expected = model.eval()(**batch).logits
    captured = CapturedInference(model)
    if not torch.cuda.is_available():
        assert captured.why_not == "no CUDA device is visible"
    torch.testing.assert_close(captured(**batch), expected)


def test_inference_has_a_graph_for_each_shape_and_autocast(
    tiny: Callable[..., DeepMSI], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = CapturedInference(tiny(vision=STATIC["keep"]))
    captured.why_not = None
    made: list[int] = []

    class Eager:
        """Stands for a graph: runs the model on what is held, under the autocast of its capture."""

        def __init__(self, inputs: dict[str, Tensor]) -> None:
            self.held = {name: tensor.clone() for name, tensor in inputs.items()}
            self.autocast = torch.is_autocast_enabled("cpu")
            self.logits = self.run().clone()

        def run(self) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                return captured.model(**self.held).logits

        def replay(self) -> None:
            self.logits.copy_(self.run())

    def capture(inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], Tensor]:
        graph = Eager(inputs)
        made.append(len(graph.logits))
        return graph, graph.held, graph.logits

    monkeypatch.setattr(captured, "_capture", capture)
    attention = [module for module in captured.model.modules() if isinstance(module, WindowAttention)]
    for count in (4, 2, 4):
        given = {name: tensor[:count].flip(0) for name, tensor in batch.items()}
        for autocast in (False, True):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                before = len(made)
                found = captured(**given)  # which may compute what is constant for this autocast
                assert torch.equal(found, captured.model(**given).logits)
                # A replay computes nothing again of what follows from weights alone.
                assert len(made) == before or all(module.head_scale() is not None for module in attention)
    assert made == [4, 4, 2, 2]


def test_what_a_graph_reads_outlives_training_mode(tiny: Callable[..., DeepMSI], batch: dict[str, Tensor]) -> None:
    model = tiny(vision=STATIC["keep"]).eval()
    assert model.video is not None
    model.video.fold()
    with torch.inference_mode():
        model(**batch)
    attention = [m for m in model.modules() if isinstance(m, WindowAttention)]
    with torch.no_grad():
        tables = [kept for m in attention for kept in (m.fixed_table, m.qkv_bias(), m.head_scale())]
    folded = [weight for block in model.video.tcn.blocks() for weight in block.kept()]
    assert len(folded) >= 2 * len(model.video.tcn.blocks())
    addresses = [tensor.data_ptr() for tensor in (*tables, *folded, *model.parameters())]
    held = {tensor.data_ptr() for tensor in graphs.constants_of(model)}
    assert held.issuperset(addresses)
    model.train()
    assert not [weight for block in model.video.tcn.blocks() for weight in block.kept()]


class OfWeights(TorchDispatchMode):
    """Counts the operators that compute something of weights alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {tensor.untyped_storage().data_ptr(): tensor for tensor in graphs.constants_of(model)}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if read and all(address in self.weights for address in read):
            made = {leaf.untyped_storage().data_ptr(): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
            if not made.keys() <= self.weights.keys():
                self.counts[func._schema.name] += 1
                self.weights |= made
        return out


@pytest.mark.parametrize("case", STATIC)
def test_inference_computes_nothing_of_weights_alone(
    case: str, tiny: Callable[..., DeepMSI], batch: dict[str, Tensor]
) -> None:
    """But the share of the guide in each compression, a number. A graph would compute it in every replay."""
    model = tiny(vision=STATIC[case]).eval()
    assert model.video is not None
    model.video.fold()
    with torch.no_grad():
        model(**batch)
        with OfWeights(model) as anew:
            model(**batch)
    assert anew.counts == ({} if case == "uncompressed" else {"aten::sigmoid": 2})
    model.train()
    with torch.no_grad(), OfWeights(model) as trained:
        model(**batch)
    assert trained.counts["aten::cat"] == trained.counts["aten::exp"] == 8  # of each block


def test_the_whole_step_that_is_to_be_captured_learns() -> None:
    """As it is; and nothing in it depends on the batch."""
    model = captured_step.build("small")
    step = captured_step.Step(model)
    batches = [captured_step.batch_of(model, 3, seed, "cpu") for seed in (1, 2)]
    losses = [float(step(batches[0])) for _ in range(6)]
    assert losses[-1] < losses[0]
    traces = []
    for batch in (batches[0], *batches):
        with Recorded() as recorded:
            step(batch)
        traces.append(recorded.trace)
    assert traces[0] == traces[1] == traces[2]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU: none is visible")


@needs_gpu
@pytest.mark.parametrize("case", STATIC)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_on_a_gpu_training_steps_are_equal(
    tiny: Callable[..., DeepMSI], batch: dict[str, Tensor], case: str, autocast: bool
) -> None:
    model = tiny(vision=STATIC[case]).cuda().train()
    given = {name: tensor.cuda() for name, tensor in batch.items()}
    assert why_not_training(model) is None
    labels = torch.arange(4, device="cuda") % 3

    def step() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(**given, labels=labels).loss
        loss.backward()
        return [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]

    expected = step()
    model.video.graphs = VideoGraphs(model.video)
    for _ in range(3):
        for found, value in zip(step(), expected, strict=True):
            torch.testing.assert_close(found, value)
    with torch.no_grad():  # a graph reads the weights as they are
        for parameter in model.parameters():
            parameter.mul_(0.9)
    found = step()
    model.video.graphs = None
    for value, wanted in zip(found, step(), strict=True):
        torch.testing.assert_close(value, wanted)


@needs_gpu
@pytest.mark.parametrize("case", STATIC)
def test_on_a_gpu_inference_is_equal(tiny: Callable[..., DeepMSI], batch: dict[str, Tensor], case: str) -> None:
    captured = CapturedInference(tiny(vision=STATIC[case]).cuda())
    assert captured.why_not is None
    for count in (4, 1, 4):
        given = {name: tensor[:count].flip(0).cuda() for name, tensor in batch.items()}
        with torch.inference_mode():
            expected = captured.model(**given).logits
        torch.testing.assert_close(captured(**given), expected)
    assert len(captured.graphs) == 2


@needs_gpu
def test_on_a_gpu_the_captured_whole_step_is_the_step() -> None:
    model = captured_step.build("small").cuda()
    batches = [captured_step.batch_of(model, 3, seed, "cuda") for seed in (1, 2)]
    plain = captured_step.Step(copy.deepcopy(model))
    captured = captured_step.CapturedStep(model, batches[0])
    for batch in (*batches, *batches):
        torch.testing.assert_close(captured(batch), plain(batch), rtol=2e-2, atol=2e-2)
