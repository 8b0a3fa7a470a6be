"""Triton kernels and their launchers, installed as ``deepmsi._triton``; they import torch and triton alone."""
