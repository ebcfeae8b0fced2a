"""GPU kernels in Triton, which also run on CPU tensors in Triton's interpreter."""
