"""Triton kernels of the ops; importing this package does not import Triton."""
