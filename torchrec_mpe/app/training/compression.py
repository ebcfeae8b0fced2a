"""After the training of fp32 rows: coded tables, and a dense network that has adapted to them."""

from collections.abc import Iterator, Mapping
from itertools import islice

import torch.distributed as dist
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.training.loop import evaluate
from torchrec_mpe.app.training.method import Method
from torchrec_mpe.app.training.settings import RunSettings, Settings
from torchrec_mpe.errors import UserError
from torchrec_mpe.inference.compress.compress import compress
from torchrec_mpe.inference.compress.curvature import measure_curvature
from torchrec_mpe.inference.compress.distill import distill_

_CURVATURE_BATCHES = 60
_CURVATURE, _DISTILLATION = 98, 99  # their orders of rows differ from those of all phases of training


def compress_trained(
    method: Method,
    data: PreparedDataset,
    counts: Mapping[str, Tensor],
    model: DistributedModelParallel,
    settings: Settings,
    run: RunSettings,
) -> nn.Module:
    """A trained fp32 model with coded tables at the method's ratio; ``model`` stays as it is.

    What ids read that training never saw, and whether distillation is kept, is decided by the AUC of the validation
    rows.

    Raises:
        UserError: if the method's size cannot be reached with these tables.
    """

    def score(candidate: nn.Module) -> float:
        return evaluate(candidate, data, "validation", run.device)["auc"]

    def batches(order: int) -> Iterator[Batch]:
        seed = (settings.seed * 100 + order) * 1000
        ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        return iter(data.batches("train", settings.batch_size, shuffle_seed=seed, drop_last=True, **ranks))

    progress = run.progress and dist.get_rank() == 0
    steps = data.num_batches("train", settings.batch_size, drop_last=True, world_size=dist.get_world_size())
    few = min(steps, _CURVATURE_BATCHES)
    curvature = measure_curvature(model, islice(batches(_CURVATURE), few), num_batches=few, progress=progress)
    try:
        coded = compress(model, counts, curvature, ratio=method.numbers[0], score=score, progress=progress)
    except ValueError as error:
        raise UserError(f"method {method.name} does not fit this data: {error}") from error
    if method.distills:
        distill_(coded, model, batches(_DISTILLATION), steps=steps, score=lambda: score(coded), progress=progress)
    return coded
