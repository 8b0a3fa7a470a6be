"""The operations: public functions that check their arguments, choose a backend and call it."""

from deepmsi.ops.cross_modal_contrastive import cross_modal_contrastive
from deepmsi.ops.dilated_causal_conv1d import dilated_causal_conv1d
from deepmsi.ops.pack_weight import pack_weight
from deepmsi.ops.position_bias import position_bias
from deepmsi.ops.project_cells import project_cells
from deepmsi.ops.residual_mlp import residual_mlp
from deepmsi.ops.residual_norm import residual_norm
from deepmsi.ops.residual_window_attention import residual_window_attention
from deepmsi.ops.vsc_compress import CompressedTokens, vsc_compress
from deepmsi.ops.window_attention import window_attention

__all__ = [
    "CompressedTokens",
    "cross_modal_contrastive",
    "dilated_causal_conv1d",
    "pack_weight",
    "position_bias",
    "project_cells",
    "residual_mlp",
    "residual_norm",
    "residual_window_attention",
    "vsc_compress",
    "window_attention",
]
