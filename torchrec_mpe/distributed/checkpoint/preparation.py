"""How a model was prepared, and whether given counts or a plan would prepare it the same way again."""

from collections.abc import Mapping

from torch import Tensor, nn

from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.modules.row_quantizer import RetrainQuantizer, SearchQuantizer
from torchrec_mpe.modules.search_config import SearchConfig
from torchrec_mpe.precision.frequency_order import counts_sha256
from torchrec_mpe.precision.plan import PrecisionPlan


def phase_of(model: nn.Module) -> Phase:
    """The phase of a model's collections, plain or sharded; Phase.PLAIN if it has none of ours.

    Raises:
        ValueError: if they are in different phases.
    """
    kinds = MPEEmbeddingBagCollection | ShardedMPEEmbeddingBagCollection
    phases = {module.phase for module in model.modules() if isinstance(module, kinds)} or {Phase.PLAIN}
    if len(phases) > 1:
        names = ", ".join(sorted(phase.value for phase in phases))
        raise ValueError(f"the model's collections are in different phases ({names}): a checkpoint is of one phase")
    return phases.pop()


def search_config_of(model: nn.Module) -> SearchConfig | None:
    """The settings of a model's search; None in another phase.

    Raises:
        ValueError: if its collections have different ones.
    """
    configs = {module.config for module in model.modules() if isinstance(module, SearchQuantizer)}
    if len(configs) > 1:
        raise ValueError("the model's collections have different SearchConfigs: a checkpoint has one")
    return configs.pop() if configs else None


def check_prepared_with(model: nn.Module, counts: Mapping[str, Tensor] | None, plan: PrecisionPlan | None) -> None:
    """Make sure that a model can be prepared again from what is saved with it.

    Raises:
        ValueError: if counts (search) or plan (retrain) are missing or not those that the model was prepared with.
    """
    for module in model.modules():
        if isinstance(module, SearchQuantizer):
            _check_counts(module, counts)
        elif isinstance(module, RetrainQuantizer):
            _check_plan(module, plan)


def _check_counts(quantizer: SearchQuantizer, counts: Mapping[str, Tensor] | None) -> None:
    if counts is None:
        raise ValueError(
            "a checkpoint of the search phase needs the counts that the model was prepared with: counts=..."
        )
    mine = {table: counts[table] for table in quantizer.num_embeddings if table in counts}
    if mine.keys() != quantizer.num_embeddings.keys() or counts_sha256(mine) != quantizer.groups.counts_sha256:
        raise ValueError(
            f"the counts of tables {', '.join(quantizer.num_embeddings)} are not those that the model was prepared "
            "with: give those, as they were then"
        )


def _check_plan(quantizer: RetrainQuantizer, plan: PrecisionPlan | None) -> None:
    if plan is None:
        raise ValueError("a checkpoint of the retrain phase needs the plan that the model was prepared with: plan=...")
    widths = {table: plan.tables[table] for table in quantizer.num_embeddings if table in plan.tables}
    same = {table: w.num_embeddings for table, w in widths.items()} == quantizer.num_embeddings
    if same:
        # The quantizer's own widths are sharded: one made from the plan has the same digest or is another.
        again = RetrainQuantizer(widths, quantizer.embedding_dim, plan.candidate_bits, plan.initialization, False)
        same = int(again.layout_digest) == int(quantizer.layout_digest)
    if not same:
        raise ValueError(
            f"the plan of tables {', '.join(quantizer.num_embeddings)} is not the one that the model was prepared with"
        )
