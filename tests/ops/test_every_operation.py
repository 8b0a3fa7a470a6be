"""What holds of every operation wherever it runs: nothing left out, torch's threads, CUDA graphs, far offsets."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepmsi import backend as backends
from deepmsi import ops, testing
from deepmsi.testing import DEVICES, PLACES, REFERENCES

KERNELS = list(backends.KERNELS)
# The tests that each kernel must have in tests/ops/test_<op>.py, by a part of their name, with its place as parameters.
PROOF = ("error_budget", "opcheck", "compile", "autocast", "same_bits")
FAR = 2**29  # elements between rows, of which the fifth lies past 2^31


Call = tuple[list[Tensor], Callable[..., Tensor]]


def vsc_compress(backend: str, device: str) -> Call:
    frames = 2 if backend == "triton" and device == "cpu" else 8  # the interpreter takes its time, and has one thread
    x = testing.tokens(frames * 96, 32, seed=1, device=device).view(frames, 96, 32)
    guide, weight = testing.randn(frames, 32, seed=2, device=device), torch.tensor(0.4, device=device)

    def run(x: Tensor, guide: Tensor, weight: Tensor) -> Tensor:
        out = ops.vsc_compress(x, None, guide, weight, keep=40, fuse_threshold=0.2, backend=backend)
        return out.tokens * out.gate[:, None]

    return [x, guide, weight], run


def window_attention(backend: str, device: str) -> Call:
    qkv = testing.randn(4, 16, 8, 3 * 32, seed=1, device=device)
    table, scale = testing.randn(15**2, 2, seed=2, device=device), testing.randn(2, seed=3, device=device)

    def run(qkv: Tensor, table: Tensor, scale: Tensor) -> Tensor:
        return ops.window_attention(qkv, 2, (16, 8), 8, 4, bias_table=table, logit_scale=scale, backend=backend)

    return [qkv, table, scale], run


def cross_modal_contrastive(backend: str, device: str) -> Call:
    rows = 130 if backend == "triton" and device == "cpu" else 200
    features = [testing.tokens(rows, 16, seed=s, device=device) for s in (1, 2, 3)]
    labels = torch.arange(rows, device=device) % 7
    return features, lambda a, b, c: ops.cross_modal_contrastive(a, (b, c), labels, backend=backend)


def dilated_causal_conv1d(backend: str, device: str) -> Call:
    x = testing.randn(4, 32, 15, seed=1, device=device)
    weight, bias = testing.randn(48, 32, 3, seed=2, device=device), testing.randn(48, seed=3, device=device)
    return [x, weight, bias], lambda *inputs: ops.dilated_causal_conv1d(*inputs, 2, backend=backend)


def position_bias(backend: str, device: str) -> Call:
    coordinates = testing.randn(49, 2, seed=1, device=device)
    weights = [testing.randn(*size, seed=2, device=device) for size in ((40, 2), (40,), (3, 40))]
    return weights, lambda *weights: ops.position_bias(coordinates, *weights, backend=backend)


def residual_norm(backend: str, device: str) -> Call:
    sizes = ((300, 40), (300, 40), (40,), (40,))
    inputs = [testing.randn(*size, seed=s, device=device) for s, size in enumerate(sizes, 1)]
    return inputs, lambda *inputs, **options: ops.residual_norm(*inputs, backend=backend, **options)


def residual_mlp(backend: str, device: str) -> Call:
    sizes = ((300, 40), (96, 40), (96,), (40, 96), (40,), (40,), (40,))
    # A GPU's fused kernels take 16 bits; a CPU's kernel float32.
    dtype = torch.float32 if device == "cpu" else torch.float16
    inputs = [testing.randn(*size, seed=s, device=device, dtype=dtype) for s, size in enumerate(sizes)]
    return inputs, lambda *inputs, **options: ops.residual_mlp(*inputs, backend=backend, **options)


def residual_window_attention(backend: str, device: str) -> Call:
    sizes = ((4, 16, 8, 32), (96, 32), (96,), (32, 32), (32,), (32,), (32,))
    # Triton's kernels take 16 bits alone.
    dtype = torch.float16 if backend == "triton" else torch.float32
    inputs = [testing.randn(*size, seed=s, device=device, dtype=dtype) for s, size in enumerate(sizes)]
    inputs.append(testing.randn(15**2, 2, seed=7, device=device))

    def run(*inputs: Tensor, **options: Any) -> Tensor:
        options = {"bias_table": inputs[-1], "backend": backend, **options}
        return ops.residual_window_attention(*inputs[:-1], 2, (16, 8), 8, 4, **options)

    return inputs, run


def project_cells(backend: str, device: str) -> Call:
    sizes = ((4, 16, 8, 12), (40, 48), (40,), (40,), (40,))
    dtype = torch.float16 if backend == "triton" else torch.float32
    inputs = [testing.randn(*size, seed=s, device=device, dtype=dtype) for s, size in enumerate(sizes)]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        cells = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        return ops.project_cells(cells, *weights, backend=backend)

    return inputs, run


CALLS = {
    "vsc_compress": vsc_compress,
    "window_attention": window_attention,
    "cross_modal_contrastive": cross_modal_contrastive,
    "dilated_causal_conv1d": dilated_causal_conv1d,
    "position_bias": position_bias,
    "residual_norm": residual_norm,
    "residual_mlp": residual_mlp,
    "residual_window_attention": residual_window_attention,
    "project_cells": project_cells,
}


def call(op: str, backend: str, device: str) -> Call:
    """Return an operation's differentiable inputs, large enough for several threads, and the operation on them."""
    return CALLS[op](backend, device)


def step(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output of a call and the gradients of its inputs."""
    leaves = [x.requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out, *torch.autograd.grad(out, leaves, torch.cos(out.detach()))]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=["-".join(k) for k in KERNELS])
def test_a_graph_recorded_without_gradients_has_them(op: str, backend: str, device: str) -> None:
    testing.need(op, backend, device)
    inputs, run = call(op, backend, device)
    with torch.no_grad():
        recorded = torch.jit.trace(run, tuple(inputs), check_trace=False)
    for found, wanted in zip(step(recorded, inputs), step(run, inputs), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("op", ["residual_mlp", "cross_modal_contrastive"])
def test_backward_of_a_call_that_kept_nothing_is_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    testing.need(op, "cpp", "cpu")
    inputs, run = call(op, "cpp", "cpu")
    leaves = [x.requires_grad_() for x in inputs]
    module = importlib.import_module(f"deepmsi.ops.{op}")
    monkeypatch.setattr(module, "keeps_for_backward", lambda *_: False)
    with pytest.raises(RuntimeError, match=f"{op}: this call was recorded without gradients: record it with"):
        torch.autograd.grad(run(*leaves).square().sum(), leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=["-".join(k) for k in KERNELS])
def test_a_second_derivative_is_refused(op: str, backend: str, device: str) -> None:
    """Torch by itself warns, and leaves the operation out of it; so does a penalty beside what it is a penalty of."""
    testing.need(op, backend, device)
    inputs, run = call(op, backend, device)
    leaves = [x.requires_grad_() for x in inputs]
    for linear in (False, True):
        out = run(*leaves)
        loss = out.sum() if linear else out.square().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{op} has a second derivative on the reference backend alone"):
            torch.autograd.grad(loss + sum(grad.square().sum() for grad in grads), leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=["-".join(k) for k in KERNELS])
def test_autocast_around_backward_alone_changes_no_bit(op: str, backend: str, device: str) -> None:
    """A kernel's gradients are in the types of its forward pass, though torch's products within take part."""
    testing.need(op, backend, device)
    inputs, run = call(op, backend, device)
    wanted = step(run, inputs)
    leaves = [x.requires_grad_() for x in inputs]
    out = run(*leaves)
    with torch.autocast(device, torch.bfloat16):
        found = torch.autograd.grad(out, leaves, torch.cos(out.detach()))
    for value, other in zip(found, wanted[1:], strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("op", ["residual_norm", "residual_mlp", "residual_window_attention"])
@pytest.mark.parametrize(("backend", "device"), [*REFERENCES, *PLACES])
def test_the_factor_of_a_row_gets_no_gradient(op: str, backend: str, device: str) -> None:
    testing.need(op, backend, device)
    inputs, run = call(op, backend, device)
    scale = torch.full(inputs[0].shape[:-1], 0.5, dtype=inputs[0].dtype, device=device, requires_grad=True)
    assert not run(*inputs, row_scale=scale).requires_grad
    inputs[0].requires_grad_()
    run(*inputs, row_scale=scale).sum().backward()
    assert inputs[0].grad is not None
    assert scale.grad is None


@pytest.mark.parametrize("narrow", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("op", backends.OPS)
def test_integers_are_refused(op: str, narrow: bool) -> None:
    """Autocast narrows floating-point numbers alone."""
    (x, *others), run = call(op, "reference", "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow), pytest.raises(ValueError, match=r"must be float16, .*"):
        run(x.long(), *others)


@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=["-".join(k) for k in KERNELS])
def test_a_kernel_is_proven_wherever_it_can_run(request: pytest.FixtureRequest, op: str, backend: str) -> None:
    """Read from what pytest collected: a kernel without its tests, or a type or device that they leave out, fails."""
    options = request.config.option
    if options.keyword or options.markexpr or any("::" in chosen for chosen in request.config.args):
        pytest.skip("only some tests were asked for")
    items = [i for i in request.session.items if i.path.name == f"test_{op}.py" and hasattr(i, "callspec")]
    if not items:
        pytest.skip(f"tests/ops/test_{op}.py is not part of this run")
    kernel = backends.KERNELS[op, backend]
    missing = []
    for device in DEVICES:
        if device not in kernel.devices:
            continue
        here = [
            i for i in items if (i.callspec.params.get("backend"), i.callspec.params.get("device")) == (backend, device)
        ]
        missing += [f"{part} on {device}" for part in PROOF if not any(part in i.originalname for i in here)]
        budgets = {str(i.callspec.params.get("dtype")) for i in here if "error_budget" in i.originalname}
        # float64 has no budget: it is the precision of the reference that the others are held to.
        names = [str(dtype).removeprefix("torch.") for dtype in kernel.dtypes if dtype != torch.float64]
        missing += [f"error_budget of {name} on {device}" for name in names if not {name, f"torch.{name}"} & budgets]
    assert not missing, f"tests/ops/test_{op}.py leaves out, for {backend}: {', '.join(missing)}"


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_window_attention_reads_rows_past_2_to_the_31(backend: str, device: str) -> None:
    testing.need("window_attention", backend, device, torch.float16)
    near = testing.randn(6, 3 * 16, seed=1, dtype=torch.float16, device=device)
    # Memory that nothing touches is never there: six rows of a tensor of 5 GB take six pages of the CPU's.
    far = torch.empty(5 * FAR + 48, dtype=torch.float16, device=device).as_strided((6, 48), (FAR, 1))
    far.copy_(near)
    places = torch.tensor([0, 1, 5, 6, 7, 14], dtype=torch.int32, device=device)
    table = testing.randn(9, 2, seed=2, device=device)
    layout = {"positions": places, "cu_seqlens": testing.offsets([3, 3], device)}

    def run(qkv: Tensor) -> Tensor:
        return ops.window_attention(qkv, 2, (4, 4), 2, 1, bias_table=table, backend=backend, **layout)

    for actual, wanted in zip(step(run, [far]), step(run, [near]), strict=True):
        assert torch.equal(actual, wanted)


FAR_ROWS = (
    "dilated_causal_conv1d",
    "cross_modal_contrastive",
    "residual_norm",
    "residual_mlp",
    "residual_window_attention",
    "project_cells",
)


@pytest.mark.parametrize("op", FAR_ROWS)
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_rows_past_2_to_the_31_are_read(op: str, backend: str, device: str) -> None:
    testing.need(op, backend, device, torch.float16)
    near = testing.randn(6, 16, 3, seed=1, dtype=torch.float16, device=device)
    far = torch.empty(5 * FAR + 48, dtype=torch.float16, device=device).as_strided((6, 16, 3), (FAR, 3, 1))
    far.copy_(near)

    places = torch.tensor([0, 1, 5, 6, 7, 14], dtype=torch.int32, device=device)

    def draw(*size: int) -> Tensor:
        return testing.randn(*size, seed=len(size), dtype=torch.float16, device=device)

    def run(x: Tensor) -> Tensor:
        rows = x.flatten(1)
        if op == "dilated_causal_conv1d":
            return ops.dilated_causal_conv1d(x, draw(8, 16, 3), draw(8), 1, backend=backend)
        if op == "cross_modal_contrastive":
            labels = torch.arange(6, device=device) % 2
            return ops.cross_modal_contrastive(rows, rows.flip(0), labels, backend=backend)
        if op == "residual_norm":
            return ops.residual_norm(rows, rows, draw(48), draw(48), backend=backend)
        if op == "project_cells":
            return ops.project_cells(x.view(1, 1, 6, 4, 4, 3), draw(32, 48), *(draw(32),) * 3, backend=backend)
        if op == "residual_window_attention":
            layers = (draw(144, 48), draw(144), draw(48, 48), draw(48), draw(48), draw(48))
            layout = {"positions": places, "cu_seqlens": testing.offsets([3, 3], device)}
            table = testing.randn(9, 2, seed=2, device=device)
            return ops.residual_window_attention(
                rows, *layers, 2, (4, 4), 2, 1, bias_table=table, backend=backend, **layout
            )
        layers = (draw(32, 48), draw(32), draw(48, 32), draw(48))
        return ops.residual_mlp(rows, *layers, draw(48), draw(48), backend=backend)

    for actual, wanted in zip(step(run, [far]), step(run, [near]), strict=True):
        assert torch.equal(actual, wanted)


# The CPU kernel refuses rows before the first offset, and to compress 4 GB takes it a minute.
@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place != ("cpp", "cpu")])
def test_vsc_compress_reads_rows_past_2_to_the_31(backend: str, device: str) -> None:
    testing.need("vsc_compress", backend, device, torch.float16)
    channels, rows = 2**12, 20
    before = FAR * 4 // channels
    x = torch.empty(before + rows, channels, dtype=torch.float16, device=device)
    near = testing.tokens(rows, channels, seed=1, dtype=torch.float16, device=device)
    x[before:] = near
    guide, weight = testing.randn(1, channels, seed=2, device=device), torch.tensor(0.5, device=device)
    forward = getattr(torch.ops.deepmsi, f"vsc_compress_{backend}_fwd")
    fixed = (1.0, True, 0.3, None, 7, 1, 0.2, 0.9)
    far_cu = torch.tensor([before, before + rows], dtype=torch.int32, device=device)
    far = forward(x, far_cu, guide, weight, *fixed)
    wanted = forward(near, testing.offsets([rows], device), guide, weight, *fixed)
    assert torch.equal(far[0], wanted[0])
    assert torch.equal(far[2], wanted[2] + before)


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def count_threads() -> None:
    """Print how many threads this process has at the start, after all kernels on one thread, and after all on three."""
    torch.set_num_threads(1)
    found = [threads_of_this_process()]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for op, backend in KERNELS:
            if backend == "cpp" and "cpu" in backends.KERNELS[op, backend].devices:
                inputs, run = call(op, backend, "cpu")
                run(*inputs).sum().item()
                step(run, inputs)
        found.append(threads_of_this_process())
    print(*found)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list a process's threads")
def test_kernels_run_on_torchs_threads_and_no_others() -> None:
    testing.need("vsc_compress", "cpp", "cpu")
    done = subprocess.run([sys.executable, "-P", __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    start, one, three = map(int, done.stdout.split())
    # Backward runs on a thread of autograd's own in neither case: a CPU's backward stays on the caller's.
    assert one == start
    assert three == start + 2


@pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device is visible")
@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=["-".join(k) for k in KERNELS])
def test_a_cuda_graph_replays_it_on_new_numbers(op: str, backend: str) -> None:
    testing.need(op, backend, "cuda")
    inputs, run = call(op, backend, "cuda")
    graph, held = testing.captured(lambda: step(run, inputs))
    for seed in (1, 2):
        with torch.no_grad():
            inputs[0].copy_(testing.randn(*inputs[0].shape, seed=seed))
        for result in held:
            result.detach().fill_(torch.nan)
        graph.replay()
        for replayed, eager in zip(held, step(run, inputs), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device is visible")
@pytest.mark.parametrize(("op", "backend"), KERNELS, ids=["-".join(k) for k in KERNELS])
def test_a_cuda_device_is_waited_for_nowhere(op: str, backend: str) -> None:
    testing.need(op, backend, "cuda")
    inputs, run = call(op, backend, "cuda")
    step(run, inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(run, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    count_threads()
