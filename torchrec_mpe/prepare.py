"""Switch a whole model from phase to phase, in place."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mpe.distributed import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.initialization import RowInitialization
from torchrec_mpe.modules import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.precision import PrecisionPlan
from torchrec_mpe.quantizer import RetrainQuantizer, RowQuantizer, SearchConfig


def prepare_search_(model: nn.Module, counts: Mapping[str, Tensor], config: SearchConfig | None = None) -> nn.Module:
    """Put every EmbeddingBagCollection of a model into the search phase, before it is sharded.

    Plain collections are replaced by MPEEmbeddingBagCollections; their rows start anew from
    ``config.initialization``, because retraining has to be able to return to them.

    Args:
        model (nn.Module): holds EmbeddingBagCollections, or is one; the meta device is fine.
        counts (Mapping[str, Tensor]): lookups of every row in the training data, for example a FrequencyCounter.
        config (Optional[SearchConfig]): settings; the defaults if None.

    Returns:
        nn.Module: ``model``, or its replacement if it is itself a plain EmbeddingBagCollection.

    Raises:
        ValueError: if there is no collection, one is sharded already, or one has weighted mean pooling.
        KeyError: if counts of a table are missing.

    Example::

        counts = count_frequencies(batches, model)
        prepare_search_(model, counts, SearchConfig(penalty_weight=1e-2))
        model = DistributedModelParallel(model, sharders=sharders(fused_params), ...)
        for batch in batches:
            loss = bce(model(batch), labels) + bit_penalty(model)
    """
    settings = config or SearchConfig()
    for _, sharded in _sharded_collections(model):
        raise ValueError(
            "the model is sharded: prepare it for the search before DistributedModelParallel, whose TBEs pool rows of "
            f"{', '.join(t.name for t in sharded.embedding_bag_configs())} otherwise"
        )
    return _enter_phase(
        model,
        Phase.SEARCH,
        settings.initialization,
        lambda collection: collection.search_quantizers(counts, settings),
    )


def prepare_retrain_(model: nn.Module, plan: PrecisionPlan) -> nn.Module:
    """Fix the bit-widths, and put every row back to its initial value.

    Step sizes, offset, 0-bit vectors and the dense network keep their values; the fused optimizers' state is cleared.
    Make a fresh optimizer for the other parameters: those of the search phase are gone.

    Args:
        model (nn.Module): an unsharded model in any phase; or a DistributedModelParallel or sharded model in the search
            or retrain phase, which stays sharded as it is.
        plan (PrecisionPlan): bit-widths of every table.

    Returns:
        nn.Module: ``model``, or its replacement if it is itself a plain EmbeddingBagCollection.

    Raises:
        KeyError: if the plan lacks a table.
        ValueError: if a table's shape differs from the plan's, or the model was sharded in the plain phase.
    """
    if isinstance(model, DistributedModelParallel):
        _rewrap_data_parallel(model, lambda: _retrain_sharded(model, plan))
    elif any(True for _ in _sharded_collections(model)):
        _retrain_sharded(model, plan)
    else:
        return _enter_phase(
            model,
            Phase.RETRAIN,
            plan.initialization,
            lambda collection: collection.retrain_quantizers(
                plan.tables, plan.candidate_bits, plan.initialization, plan.zero_row == "learned"
            ),
        )
    return model


def reset_rows_(model: nn.Module, initialization: RowInitialization | None = None) -> nn.Module:
    """Put every row back to its initial value and clear the fused optimizers' state; all else is kept.

    Training a phase, resetting and training again is better than training longer: see ``resets`` in the README.

    Args:
        model (nn.Module): plain or sharded, in any phase.
        initialization (Optional[RowInitialization]): needed in the plain phase; the phase's own by default.

    Raises:
        ValueError: if a collection is in the plain phase and no initialization is given.
    """
    for module in model.modules():
        if isinstance(module, MPEEmbeddingBagCollection | ShardedMPEEmbeddingBagCollection):
            chosen = initialization or module.row_initialization
            if chosen is None:
                raise ValueError("the model is in the plain phase: say which initial values its rows go back to")
            module.reset_rows(chosen)
    return model


def _sharded_collections(model: nn.Module) -> Iterator[tuple[str, ShardedMPEEmbeddingBagCollection]]:
    for name, module in model.named_modules():
        if isinstance(module, ShardedMPEEmbeddingBagCollection):
            yield name, module


def _enter_phase(
    model: nn.Module,
    phase: Phase,
    initialization: RowInitialization,
    build: Callable[[MPEEmbeddingBagCollection], dict[int, RowQuantizer]],
) -> nn.Module:
    """Swap plain collections for ours and let each enter a phase; nothing changes if one cannot."""
    collections = {
        name: module if isinstance(module, MPEEmbeddingBagCollection) else MPEEmbeddingBagCollection.from_plain(module)
        for name, module in model.named_modules()
        if type(module) is EmbeddingBagCollection or isinstance(module, MPEEmbeddingBagCollection)
    }
    if not collections:
        raise ValueError(f"{type(model).__name__} holds no EmbeddingBagCollection")
    quantizers = {name: build(collection) for name, collection in collections.items()}
    for name, collection in collections.items():
        collection.enter(phase, quantizers[name], initialization)
        if name == "":
            return collection
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, collection)
    return model


def _retrain_sharded(model: nn.Module, plan: PrecisionPlan) -> None:
    """Fix the bit-widths of all sharded collections; nothing changes if one cannot."""
    collections = [sharded for _, sharded in _sharded_collections(model)]
    built = [_retrain_quantizers(sharded, plan) for sharded in collections]
    for sharded, quantizers in zip(collections, built, strict=True):
        sharded.enter_retrain(quantizers, plan.initialization)


def _retrain_quantizers(sharded: ShardedMPEEmbeddingBagCollection, plan: PrecisionPlan) -> dict[int, RowQuantizer]:
    if sharded.phase is Phase.PLAIN:
        raise ValueError(
            "a collection sharded in the plain phase has TBEs that pool: prepare the model before sharding it"
        )
    quantizers: dict[int, RowQuantizer] = {}
    for dim, previous in sharded.quantizers().items():
        missing = [table for table in previous.table_number if table not in plan.tables]
        if missing:
            raise KeyError(f"the precision plan has no bit-widths for table {', '.join(missing)}")
        quantizer = RetrainQuantizer(
            {table: plan.tables[table] for table in previous.table_number},
            dim,
            plan.candidate_bits,
            plan.initialization,
            plan.zero_row == "learned",
            previous.alpha.device,
        )
        if quantizer.first_row != previous.first_row or quantizer.num_rows != previous.num_rows:
            raise ValueError(
                f"the precision plan's tables of dimension {dim} have other sizes than the model's: "
                f"{', '.join(previous.table_number)}"
            )
        quantizer.load_from(previous)
        quantizers[dim] = quantizer
    return quantizers


def _rewrap_data_parallel(model: DistributedModelParallel, change: Callable[[], None]) -> None:
    """Run ``change`` with DDP taken off: it holds on to the parameters that it was made with."""
    wrapped = model._dmp_wrapped_module
    if isinstance(wrapped, DistributedDataParallel):
        model._dmp_wrapped_module = wrapped.module
        model._ddp_wrapped = False
    change()
    if isinstance(wrapped, DistributedDataParallel):
        del wrapped  # its reducer takes its autograd hooks with it
        model.init_data_parallel()
