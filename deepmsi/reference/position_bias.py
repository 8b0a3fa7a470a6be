"""The table of position biases of a Swin V2 block in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import linear


def position_bias(coordinates: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, out_weight: Tensor) -> Tensor:
    """Return 16 · sigmoid of a network of two layers at each offset; all of it is in float32 or wider."""
    types = (hidden_weight.dtype, hidden_bias.dtype, out_weight.dtype)
    wide = torch.float64 if torch.float64 in types else torch.float32
    hidden = linear(coordinates.to(wide), hidden_weight.to(wide), hidden_bias.to(wide)).relu()
    return 16 * linear(hidden, out_weight.to(wide)).sigmoid()
