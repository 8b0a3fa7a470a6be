"""Weights laid out beforehand, for inference on the CPU."""

import torch
from torch import Tensor

from deepmsi.backend import why_not
from deepmsi.ops import _schemas as _schemas  # registers the operator
from deepmsi.ops._arguments import shape


def pack_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Lay a weight out as the CPU's kernels read it, for ``packed`` of the operations that take it.

    They do so themselves in every call, where it costs as much as 25 to 45 rows of 768 channels do. What comes back
    holds for this process alone: the layout is that of the instruction set in use. It has no gradient.

    Args:
        weight: [out, in], float32 or bfloat16, on the CPU.
        dtype: Type that products are in, as autocast has it: the weight's own, which is the default, or bfloat16.

    Returns:
        [panels, in, columns of a panel], with zeros behind the last column, and behind an odd ``in`` where bfloat16 is
        multiplied; of the type that is multiplied.

    Raises:
        ValueError: The weight is no dense matrix on the CPU, or of another type.
        RuntimeError: The C++ extension is missing.
    """
    dtype = dtype or weight.dtype
    if weight.dim() != 2 or weight.layout != torch.strided or weight.device.type != "cpu":
        raise ValueError(
            f"pack_weight: weight must be [out, in], dense and on the CPU, not {shape(weight)}, {weight.layout}, on "
            f"{weight.device}"
        )
    if dtype not in (torch.float32, torch.bfloat16) or weight.dtype not in (torch.float32, dtype):
        raise ValueError(f"pack_weight: products are in float32 or bfloat16, not in {dtype} of {weight.dtype}")
    reason = why_not("residual_mlp", "cpp", "cpu", dtype)  # one of those that read it
    if reason is not None:
        raise RuntimeError(f"pack_weight: {reason}")
    return torch.ops.deepmsi.pack_weight_cpp(weight.detach(), dtype == torch.bfloat16)
