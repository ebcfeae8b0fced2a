"""Fewer words from the packages below."""

import logging
import warnings


def quiet_dependencies() -> None:
    """TorchRec logs its plans, and torch warns about itself: none of it is for the person who runs a job.

    Our own warnings are: of a damaged checkpoint that was passed over, for example.
    """
    for name in ("torchrec", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|torchrec|fbgemm_gpu|tensordict|torchmetrics)(\.|$)")
