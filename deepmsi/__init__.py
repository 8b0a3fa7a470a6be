"""deepmsi: multimodal emotion recognition in the manner of DeepMSI-MER, as a performance engine and a tool."""

from deepmsi._version import __version__

__all__ = ["__version__"]
