"""Whose warnings a job shows."""

import logging
import warnings

import pytest

from torchrec_mpe.app.training.quiet import quiet_dependencies


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        ("torch", False),
        ("torch.optim.lr_scheduler", False),
        ("torchrec.distributed.planner", False),
        ("fbgemm_gpu.split", False),
        ("torchrec_mpe.distributed.checkpoint.folder", True),
        ("torchvision", True),
    ],
)
def test_warnings_of_dependencies_are_not_shown_and_ours_are(module: str, shown: bool) -> None:
    levels = {name: logging.getLogger(name).level for name in ("torch", "torchrec")}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_dependencies()
            warnings.warn_explicit("passed over", RuntimeWarning, "file.py", 1, module=module)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert bool(caught) is shown
