"""Where the kernels can run."""

# mypy: disable-error-code="import-untyped"
import triton
from torch import Tensor


def check_device(tensor: Tensor) -> None:
    """Check that a kernel can read the tensor.

    Raises:
        ValueError: for a CPU tensor outside Triton's interpreter.
    """
    if not tensor.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"the Triton backend runs CUDA tensors, got {tensor.device}: set TRITON_INTERPRET=1 before triton is "
            "first imported to run CPU tensors in its interpreter"
        )
