"""Modules on deepmsi's operations: compression, VSC-Swin, the temporal network, the contrastive loss, drop-ins."""

from deepmsi.nn.constants import fix_constants
from deepmsi.nn.contrastive import CrossModalContrastiveLoss
from deepmsi.nn.drop_in import fuse
from deepmsi.nn.schedule import Schedule
from deepmsi.nn.swin_blocks import KeptTokens
from deepmsi.nn.tcn import TCN
from deepmsi.nn.vsc import VSC
from deepmsi.nn.vsc_swin import VSCSwin

__all__ = ["TCN", "VSC", "CrossModalContrastiveLoss", "KeptTokens", "Schedule", "VSCSwin", "fix_constants", "fuse"]
