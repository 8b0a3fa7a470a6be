"""TCN: against torch's convolutions with weight norm; last and step equal the whole; names; receptive field."""

import copy
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from deepmsi import testing
from deepmsi.backend import use_backend
from deepmsi.errors import UserError
from deepmsi.nn import TCN, fix_constants
from deepmsi.ops.dilated_causal_conv1d import causal_conv_rows, fold_weight_norm, pack
from deepmsi.testing import DEVICES, PLACES, REFERENCES, randn


class Chomp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous() if self.size else x


class UsualBlock(nn.Module):
    """The block as it is commonly written: padding on both sides, the surplus cut off, layers listed twice."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int, dropout: float) -> None:
        super().__init__()
        past = (kernel - 1) * dilation
        norm = nn.utils.parametrizations.weight_norm
        self.conv1 = norm(nn.Conv1d(inputs, outputs, kernel, padding=past, dilation=dilation))
        self.conv2 = norm(nn.Conv1d(outputs, outputs, kernel, padding=past, dilation=dilation))
        drop = nn.Dropout(dropout)
        self.net = nn.Sequential(self.conv1, Chomp(past), nn.ReLU(), drop, self.conv2, Chomp(past), nn.ReLU(), drop)
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.net(x) + (x if self.downsample is None else self.downsample(x)))


class Usual(nn.Module):
    def __init__(self, inputs: int, channels: tuple[int, ...], kernel: int = 3, dropout: float = 0.3) -> None:
        super().__init__()
        widths = (inputs, *channels)
        self.network = nn.Sequential(
            *(UsualBlock(widths[i], widths[i + 1], kernel, 2**i, dropout) for i in range(len(channels)))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def both(kernel: int = 3) -> tuple[Usual, TCN]:
    torch.manual_seed(kernel)
    usual, tcn = Usual(5, (6, 6, 8), kernel).double(), TCN(5, (6, 6, 8), kernel).double()
    tcn.load_state_dict(usual.state_dict())
    return usual, tcn


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_equals_the_usual_network_with_every_gradient(kernel: int) -> None:
    usual, tcn = both(kernel)
    x = randn(3, 5, 15, seed=1, dtype=torch.float64)
    weight = randn(3, 8, 15, seed=2, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    expected, got = usual.eval()(leaves[0]), tcn.eval()(leaves[1])
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-10, atol=1e-12)
    wanted = dict(usual.named_parameters())
    for name, parameter in tcn.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 15, 40])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_last_equals_the_whole(kernel: int, steps: int) -> None:
    tcn = both(kernel)[1].eval()
    x = randn(2, 5, steps, seed=3, dtype=torch.float64)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = tcn.last(one), tcn(other)[:, :, -1]
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    weight = randn(2, 8, seed=4, dtype=torch.float64)
    (got * weight).sum().backward()
    gradients = [parameter.grad.clone() for parameter in tcn.parameters()]
    tcn.zero_grad()
    (expected * weight).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)
    for gradient, parameter in zip(gradients, tcn.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-12)


def test_last_computes_the_cone_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tcn = TCN(5, (6, 8, 8)).eval()
    positions: list[int] = []

    def count(*arguments: Any, **named: Any) -> Tensor:
        y = causal_conv_rows(*arguments, **named)
        positions.append(y.shape[1])
        return y

    monkeypatch.setattr("deepmsi.nn.tcn.causal_conv_rows", count)
    tcn.last(torch.randn(2, 5, 15))
    # conv1, shortcut, conv2 of the first block; the second block has a shortcut because 6 != 8
    assert positions == [15, 8, 8, 8, 4, 4, 3, 1]


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_every_backend_gives_the_network_its_last_step_and_its_stream(backend: str, device: str) -> None:
    testing.need("dilated_causal_conv1d", backend, device, torch.float32)
    torch.manual_seed(0)
    tcn = TCN(5, (18, 18)).to(device).eval()
    x = randn(2, 5, 9, seed=1, device=device)
    results = {}
    for name in ("reference", backend):
        with use_backend(name):
            leaf = x.clone().requires_grad_()
            whole = tcn(leaf)
            grads = torch.autograd.grad(whole.square().sum(), (leaf, *tcn.parameters()))
            last = tcn.last(x)
            state = tcn.init_state(2)
            steps = []
            for t in range(9):
                y, state = tcn.step(x[:, :, t], state)
                steps.append(y)
        torch.testing.assert_close(last, whole[:, :, -1])
        torch.testing.assert_close(torch.stack(steps, 2), whole)
        results[name] = (whole, *grads)
    for found, exact in zip(results[backend], results["reference"], strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_steps_equal_the_whole_for_every_stream(kernel: int) -> None:
    tcn = both(kernel)[1].eval()
    x = randn(3, 5, 40, seed=5, dtype=torch.float64)
    expected = tcn(x)
    state = tcn.init_state(3)
    for t in range(40):
        y, state = tcn.step(x[:, :, t], state)
        torch.testing.assert_close(y, expected[:, :, t], rtol=1e-11, atol=1e-12)


def test_a_stream_starts_anew_with_zeros() -> None:
    tcn = both()[1].eval()
    x = randn(2, 5, 6, seed=6, dtype=torch.float64)
    state = tcn.init_state(2)
    for t in range(3):
        _, state = tcn.step(x[:, :, t], state)
    for past in state:
        past[1] = 0
    y, _ = tcn.step(x[:, :, 3], state)
    torch.testing.assert_close(y[0], tcn(x[:, :, :4])[0, :, -1])
    torch.testing.assert_close(y[1], tcn(x[:, :, 3:4])[1, :, -1])


def test_receptive_field() -> None:
    tcn = both()[1].eval()
    assert tcn.receptive_field == 29
    x = randn(1, 5, 60, seed=7, dtype=torch.float64).requires_grad_()
    tcn(x)[0, :, 45].sum().backward()
    reached = x.grad[0].abs().sum(0).nonzero().flatten()
    assert reached.tolist() == list(range(45 - 28, 46))


def test_names_and_older_checkpoints() -> None:
    usual, tcn = both()
    names = set(tcn.state_dict())
    for conv in ("conv1", "conv2"):
        for part in ("parametrizations.weight.original0", "parametrizations.weight.original1", "bias"):
            assert f"network.0.{conv}.{part}" in names
    assert {"network.0.downsample.weight", "network.0.downsample.bias"} < names
    assert not any(".net." in name for name in names)
    older = OrderedDict(
        (
            name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ),
            value,
        )
        for name, value in usual.state_dict().items()
    )
    fresh = nn.ModuleDict({"tcn": TCN(5, (6, 6, 8)).double()})
    fresh.load_state_dict({f"tcn.{name}": value for name, value in older.items()})
    for name, value in tcn.state_dict().items():
        assert torch.equal(fresh["tcn"].state_dict()[name], value)
    with pytest.raises(RuntimeError, match="Missing key"):
        TCN(5, (6, 6, 8)).load_state_dict({})


def test_dropout_follows_the_generator() -> None:
    tcn = both()[1].train()
    x = randn(2, 5, 15, seed=8, dtype=torch.float64)
    for run in (tcn, tcn.last):
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(run(x))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert not torch.equal(run(x), run(x))
    before = torch.get_rng_state()
    tcn.eval()(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("training", "drops"), [(False, True), (True, False)])
def test_each_dropout_follows_its_own_mode(training: bool, drops: bool) -> None:
    tcn = TCN(5, (6, 6), dropout=0.5).train(training)
    for block in tcn.blocks():
        block.dropout.train(drops)
    frames = randn(2, 5, 9, seed=1)
    for run in (tcn, tcn.last, lambda x: tcn.step(x[:, :, 0], tcn.init_state(2))[0]):
        assert torch.equal(run(frames), run(frames)) != drops
    for block in tcn.blocks():
        block.dropout = nn.Identity()
    assert torch.equal(tcn.train()(frames), tcn.eval()(frames))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Adapter(nn.Module):
    """A layer around another one that tells of its weight and bias alone, as adapters do."""

    def __init__(self, layer: nn.Conv1d) -> None:
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.full((), 3.0, dtype=torch.float64))

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


def pruned(block: Any) -> None:
    parametrize.remove_parametrizations(block.conv1, "weight")
    prune.l1_unstructured(block.conv1, "weight", 0.5)


def spectral(block: Any) -> None:
    parametrize.remove_parametrizations(block.conv1, "weight")
    parametrizations.spectral_norm(block.conv1)


SITTING: dict[str, Any] = {
    "on_the_weight_norm": lambda block: parametrize.register_parametrization(block.conv1, "weight", Doubled()),
    "beside_the_weight_norm": lambda block: parametrize.register_parametrization(block.conv1, "bias", Doubled()),
    "on_the_bias_alone": lambda block: parametrize.register_parametrization(block.downsample, "bias", Doubled()),
    "another_norm": spectral,
    "pruned": pruned,
    "hooked": lambda block: block.conv1.register_forward_hook(lambda *call: 2 * call[2]),
    "hooked_shortcut": lambda block: block.downsample.register_forward_hook(lambda *call: 2 * call[2]),
    "hooked_dropout": lambda block: block.dropout.register_forward_hook(lambda *call: 2 * call[2]),
    "other_dropout": lambda block: setattr(block, "dropout", nn.Hardtanh(0.0, 0.1)),
    "adapter": lambda block: setattr(block, "conv1", Adapter(block.conv1)),
    "adapted_shortcut": lambda block: setattr(block, "downsample", Adapter(block.downsample)),
}


def layer_by_layer(tcn: TCN, x: Tensor) -> Tensor:
    for block in tcn.blocks():
        y = x
        for conv in (block.conv1, block.conv2):
            y = block.dropout(torch.relu(conv(nn.functional.pad(y, (2 * block.dilation, 0)))))
        x = torch.relu(y + (x if block.downsample is None else block.downsample(x)))
    return x


@pytest.mark.parametrize("name", SITTING)
def test_what_sits_on_a_layer_is_computed(name: str) -> None:
    tcn = both()[1].eval()
    x = randn(2, 5, 12, seed=1, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        before = tcn(x)  # keeps what it folds
    for block in (tcn.blocks()[0], tcn.blocks()[2]):  # those with a shortcut
        SITTING[name](block)
    with torch.no_grad():
        exact = layer_by_layer(tcn, x)
        assert not torch.equal(exact, before)
        state = tcn.init_state(2)
        for t in range(12):
            y, state = tcn.step(x[:, :, t], state)
            torch.testing.assert_close(y, exact[:, :, t], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(tcn.last(x), y)
        torch.testing.assert_close(tcn(x), exact, rtol=1e-11, atol=1e-12)
    leaves = [x, *tcn.parameters()]
    plain = torch.autograd.grad(layer_by_layer(tcn, x).square().sum(), leaves)
    for run in (tcn, lambda x: torch.stack([tcn.last(x[:, :, : t + 1]) for t in range(12)], 2)):
        for found, wanted in zip(torch.autograd.grad(run(x).square().sum(), leaves), plain, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        for parameter in tcn.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(tcn(x), layer_by_layer(tcn, x), rtol=1e-11, atol=1e-12)


# The interpreter's 21 runs would take a minute.
@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *(p for p in PLACES if p != ("triton", "cpu"))])
def test_dropout_is_the_same_on_every_backend_and_keeps_the_mean(backend: str, device: str) -> None:
    testing.need("dilated_causal_conv1d", backend, device, torch.float32)
    torch.manual_seed(0)
    tcn = TCN(4, (32,), dropout=0.3).to(device)
    x = randn(64, 4, 6, seed=1, device=device)
    results = []
    for name in ("reference", backend):
        with use_backend(name):
            torch.manual_seed(5)
            results.append(tcn.train()(x))
    torch.testing.assert_close(*results)
    with use_backend(backend):
        means = [tcn.train()(x).mean().item() for _ in range(20)]
        exact = tcn.eval()(x).mean().item()
    assert abs(sum(means) / 20 - exact) < 0.05 * exact


@pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device is visible")
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_a_cuda_graph_of_a_training_step_draws_anew(backend: str) -> None:
    """Each replay drops others, and from one state of the generator what an eager step drops."""
    testing.need("dilated_causal_conv1d", backend, "cuda", torch.float32)
    torch.manual_seed(0)
    tcn = TCN(5, (18, 18), dropout=0.3).cuda().train()
    x = randn(2, 5, 9, seed=1, device="cuda")
    parameters = list(tcn.parameters())

    def step() -> list[Tensor]:
        loss = tcn.last(x).square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    with use_backend(backend):
        graph, held = testing.captured(step)
        losses = []
        for _ in range(2):
            graph.replay()
            losses.append(held[0].item())
        assert losses[0] != losses[1]
        torch.manual_seed(5)
        graph.replay()
        replayed = [result.clone() for result in held]
        torch.manual_seed(5)
        for found, eager in zip(replayed, step(), strict=True):
            assert torch.equal(found, eager)


@pytest.mark.parametrize("looks", [False, True], ids=["at once", "after a look without gradients"])
def test_the_step_of_a_fused_optimizer_is_seen(looks: bool) -> None:
    """It changes weights without a new version; their gradients were asked for before."""
    tcn = both()[1].eval()
    x = randn(2, 5, 15, seed=9, dtype=torch.float64)
    with torch.no_grad():
        before = tcn.last(x)
    optimizer = torch.optim.AdamW(tcn.parameters(), lr=0.1, fused=True)
    tcn.last(x).square().sum().backward()
    with torch.no_grad():
        if looks:
            tcn.last(x)
    optimizer.step()
    with torch.no_grad():
        after = tcn.last(x)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, copy.deepcopy(tcn).last(x))


def test_evaluation_folds_once_and_sees_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    tcn = both()[1].eval()
    x = randn(2, 5, 15, seed=9, dtype=torch.float64)
    folds: list[int] = []
    for name, fold in (("pack", pack), ("fold_weight_norm", fold_weight_norm)):

        def count(*parts: Tensor, fold: Any = fold) -> Tensor:
            folds.append(1)
            return cast(Tensor, fold(*parts))

        monkeypatch.setattr(f"deepmsi.nn.tcn.{name}", count)
    with torch.inference_mode():
        first = tcn.last(x)
        once = len(folds)
        assert torch.equal(tcn.last(x), first)
        tcn(x)
    assert once == len(folds) == 8
    # Frozen weights: the gradient of x alone, through what inference mode folded.
    tcn.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    tcn.last(leaf).sum().backward()
    assert len(folds) == once
    with torch.no_grad():
        tcn.blocks()[1].conv2.parametrizations.weight.original0.mul_(2)
        assert not torch.equal(tcn.last(x), first)
    assert len(folds) == once + 1
    other = both(3)[1].eval()
    state = {name: value + 0.1 for name, value in other.state_dict().items()}
    for network in (tcn, other):
        network.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(tcn.last(x), other.last(x))
        tcn.float()
        torch.testing.assert_close(tcn.last(x.float()), other.last(x).float(), rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(tcn)
    assert all(not block.kept() for block in copied.blocks())
    tcn.train()
    assert all(not block.kept() for block in tcn.blocks())
    before = len(folds)
    fix_constants(tcn)
    assert len(folds) == before + 8
    with torch.no_grad():
        tcn.last(x.float())
    assert len(folds) == before + 8


def test_autocast_folds_into_its_own_type() -> None:
    tcn = TCN(5, (16, 16)).eval()
    x = randn(2, 5, 15, seed=9)
    with torch.inference_mode():
        plain = tcn.last(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = tcn.last(x)
        assert torch.equal(tcn.last(x), plain)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), plain, rtol=0.05, atol=0.05)


def test_a_fold_is_kept_for_each_type_that_calls_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tcn, x = TCN(5, (16, 16)).eval(), randn(2, 5, 15, seed=9)
    folds: list[int] = []
    monkeypatch.setattr("deepmsi.nn.tcn.fold_weight_norm", lambda v, g: folds.append(1) or fold_weight_norm(v, g))
    found: dict[bool, list[Tensor]] = {False: [], True: []}

    def run(low: bool) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            found[low].extend(tcn.last(x) for _ in range(200))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, found))
    for outputs in found.values():
        assert len(outputs) == 200
        assert all(torch.equal(y, outputs[0]) for y in outputs)
    # Four convolutions in two types, which two threads may begin at once.
    assert len(folds) <= 2 * 2 * 4


@pytest.mark.parametrize("training", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_whole_and_for_changing_sizes(training: bool) -> None:
    torch._dynamo.reset()
    tcn = TCN(5, (6, 6), dropout=0.2 if training else 0.0).train(training)
    compiled = torch.compile(tcn, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in ((2, 7), (3, 15)):
        x = randn(batch, 5, steps, seed=steps)
        results = []
        for function in (compiled, tcn):
            torch.manual_seed(1)
            y = function(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), list(tcn.parameters()))))
        if not training:
            for found, exact in zip(*results, strict=True):
                torch.testing.assert_close(found, exact)


def test_autocast_and_mistakes() -> None:
    tcn = TCN(5, (6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert tcn(torch.randn(2, 5, 7)).shape == (2, 6, 7)
        tcn.last(torch.randn(2, 5, 7)).float().sum().backward()
    with pytest.raises(UserError, match="must be positive"):
        TCN(5, ())
    with pytest.raises(ValueError, match="no time step"):
        tcn.last(torch.randn(2, 5, 0))
    for run in (tcn, tcn.last):
        with pytest.raises(ValueError, match=r"x must be \[B, 5, T\]"):
            run(torch.randn(2, 4, 7))
        with pytest.raises(ValueError, match=r"x is torch\.float64 and the weights are torch\.float32"):
            run(torch.randn(2, 5, 7).double())
    for x, state, words in (
        (torch.randn(2, 4), tcn.init_state(2), r"x must be \[B, 5\]"),
        (torch.randn(2, 5), tcn.init_state(2)[:3], r"init_state\(2\)"),
        (torch.randn(3, 5), tcn.init_state(2), r"init_state\(3\)"),
        (torch.randn(2, 5), tuple(part[:, :1] for part in tcn.init_state(2)), r"init_state\(2\)"),
        (torch.randn(2, 5), tuple(part[..., :4] for part in tcn.init_state(2)), r"init_state\(2\)"),
        (
            torch.randn(2, 5),
            tcn.init_state(2, dtype=torch.float64),
            r"x or the state is torch\.float64 and the weights",
        ),
        (torch.randn(2, 5).double(), tcn.init_state(2), r"x or the state is torch\.float64 and the weights"),
    ):
        with pytest.raises(ValueError, match=words):
            tcn.step(x, state)
    tcn.blocks()[1].conv2 = nn.Sequential(nn.Conv1d(6, 6, 3, padding=2, dilation=2))
    with pytest.raises(ValueError, match="Sequential maps 11 time steps to 11, not 7: it must have no padding"):
        tcn(torch.randn(2, 5, 7))
    with pytest.raises(UserError, match="dropout must lie"):
        TCN(5, (6,), dropout=1.0)


def test_transforms_of_torch_func_are_the_references() -> None:
    """Many networks at once, in evaluation too, and tangents."""
    torch.manual_seed(0)
    many = [TCN(6, (5, 7), 3, 0.0).eval() for _ in range(3)]
    x, tangent = randn(2, 6, 9, seed=1), randn(2, 6, 9, seed=2)
    weights, buffers = torch.func.stack_module_state(many)

    def one(weights: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(many[0], (weights, buffers), (x,))

    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(one)(weights, buffers), torch.stack([tcn(x) for tcn in many]))
        found = torch.func.jvp(many[0], (x,), (tangent,))[1]
        step = 1e-3
        torch.testing.assert_close(
            found, (many[0](x + step * tangent) - many[0](x - step * tangent)) / (2 * step), rtol=1e-2, atol=1e-3
        )
