"""The DistributedDataParallel that a DistributedModelParallel wraps its dense part in."""

from collections.abc import Callable

from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel


def rewrap_data_parallel(model: DistributedModelParallel, change: Callable[[], None]) -> None:
    """Run ``change`` with DDP taken off, which holds on to the parameters that it was made with, and put on a new one.

    If ``change`` raises, the model keeps its DDP.
    """
    wrapped = model._dmp_wrapped_module
    if not isinstance(wrapped, DistributedDataParallel):
        change()
        return
    model._dmp_wrapped_module, model._ddp_wrapped = wrapped.module, False
    try:
        change()
    except BaseException:
        model._dmp_wrapped_module, model._ddp_wrapped = wrapped, True
        raise
    del wrapped  # its reducer takes its autograd hooks with it
    model.init_data_parallel()
