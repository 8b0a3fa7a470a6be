"""What modules hand to an operation: the table of position biases of both kinds of Swin V2 blocks."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deepmsi
from deepmsi.nn.fusing import plain
from deepmsi.nn.swin_blocks import WindowAttention
from deepmsi.testing import need

timm = pytest.importorskip("timm")
Made = tuple[nn.Module, Callable[[], Tensor]]


def ours() -> Made:
    torch.manual_seed(0)
    attention = WindowAttention(8, 2, 2, 0, 2)
    return attention.cpb_mlp, attention.bias_table


def fused() -> Made:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 8, "window_size": 2, "embed_dim": 8, "depths": (1,), "num_heads": (2,)}
    block = deepmsi.fuse(timm.create_model("swinv2_tiny_window8_256", **sizes)).layers[0].blocks[0]
    return block.attn.cpb_mlp, block._bias_table


MODULES = pytest.mark.parametrize("make", [ours, fused])


class Operators(TorchDispatchMode):
    """Counts the operators that compute anything; a view and an empty tensor are no work for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deepmsi" or not (func.is_view or "empty" in func.__name__):
            self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@MODULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_makes_the_table_in_one_launch_each_way(make: Callable[[], Made], dtype: torch.dtype) -> None:
    need("position_bias", "triton", "cpu", dtype)
    network, table = make()
    network.to(dtype)
    with deepmsi.use_backend("triton"), Operators() as forward:
        biases = table()
    with Operators() as backward:
        biases.backward(torch.ones_like(biases))
    assert forward.counts == {"position_bias_triton_fwd": 1}
    del backward.counts["ones_like"], backward.counts["detach"]
    assert backward.counts == {"position_bias_triton_bwd": 1}


@MODULES
def test_the_table_is_in_float32_under_autocast(make: Callable[[], Made]) -> None:
    _, table = make()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = table()
    assert narrow.dtype == torch.float32
    assert narrow.equal(table())


@MODULES
def test_a_backend_that_has_no_kernel_of_it_leaves_it_to_the_reference(make: Callable[[], Made]) -> None:
    need("vsc_compress", "cpp", "cpu")
    _, table = make()
    with deepmsi.use_backend("cpp"):
        found = table()
    assert found.equal(table())


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_is_plain_whose_weights_are_lent_for_a_call(has_bias: bool) -> None:
    """As FSDP and DataParallel do, with tensors that are no parameters."""
    layer = nn.Linear(3, 2, bias=has_bias)
    for name, parameter in list(layer.named_parameters()):
        delattr(layer, name)
        setattr(layer, name, parameter.view_as(parameter))
    x = torch.zeros(1, 3)
    assert plain(x, layer) is has_bias
    assert plain(x, bare=(layer,))
    layer.weight = layer.weight.double()
    assert not plain(x, bare=(layer,))
