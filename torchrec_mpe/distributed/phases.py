"""Switch a whole model from phase to phase, in place."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase, build_retrain_quantizers
from torchrec_mpe.modules.row_quantizer import RowQuantizer
from torchrec_mpe.modules.search_config import SearchConfig
from torchrec_mpe.precision.frequency_counter import embedding_bag_configs
from torchrec_mpe.precision.plan import PrecisionPlan
from torchrec_mpe.precision.row_initialization import RowInitialization
from torchrec_mpe.upstream.data_parallel import rewrap_data_parallel
from torchrec_mpe.upstream.feature_processed import prepare_around_

_SHARDED_AS_PREPARED = (EmbeddingBagCollection, FeatureProcessedEmbeddingBagCollection)


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
        ValueError: if there is no collection, one is sharded already, has weighted mean pooling, or is in a module that
            TorchRec shards as a whole, other than a FeatureProcessedEmbeddingBagCollection.
        KeyError: if counts of a table are missing.

    Example::

        counts = count_frequencies(batches, model).merge_across_ranks()
        prepare_search_(model, counts, SearchConfig(penalty_weight=1e-2))
        model = DistributedModelParallel(model, sharders=sharders(fused_params), ...)
        for batch in batches:
            loss = bce(model(batch), labels) + bit_penalty(model)
    """
    settings = config or SearchConfig()
    for sharded in _sharded_collections(model):
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
        rewrap_data_parallel(model, lambda: _retrain_sharded(model, plan))
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

    Training a phase, resetting and training again is better than training longer: see docs/commands.md.

    Args:
        model (nn.Module): plain or sharded, in any phase.
        initialization (Optional[RowInitialization]): needed in the plain phase; the phase's own by default.

    Raises:
        ValueError: if a collection is in the plain phase and no initialization is given, or is TorchRec's own; nothing
            is reset then.
    """
    collections = [
        module
        for module in model.modules()
        if isinstance(module, MPEEmbeddingBagCollection | ShardedMPEEmbeddingBagCollection)
    ]
    _refuse_stock_collections(model)
    if not collections:
        raise ValueError(f"{type(model).__name__} holds no MPEEmbeddingBagCollection")
    chosen = [initialization or module.row_initialization for module in collections]
    for values in chosen:
        if values is None:
            raise ValueError("the model is in the plain phase: say which initial values its rows go back to")
    for module, values in zip(collections, chosen, strict=True):
        if values is not None:
            module.reset_rows(values)
    return model


def _refuse_stock_collections(model: nn.Module) -> None:
    """TorchRec's own sharded collections cannot be told from here to reset or quantize their rows."""
    for name, module in model.named_modules():
        ours = isinstance(module, MPEEmbeddingBagCollection | ShardedMPEEmbeddingBagCollection)
        if isinstance(module, EmbeddingBagCollection | ShardedEmbeddingBagCollection) and not ours:
            raise ValueError(
                f"collection {name or type(module).__name__} is TorchRec's own {type(module).__name__}: use "
                "MPEEmbeddingBagCollection and shard it with torchrec_mpe.sharders()"
            )


def _refuse_collections_in_others(model: nn.Module) -> None:
    """TorchRec shards some modules with the collection in them, by a sharder of their own that knows no quantizers."""
    own = {sharder.module_type for sharder in get_default_sharders()}
    for name, module in model.named_modules():
        if type(module) not in own or isinstance(module, _SHARDED_AS_PREPARED):
            continue
        for inner in module.modules():
            if isinstance(inner, EmbeddingBagCollection):
                tables = ", ".join(table.name for table in inner.embedding_bag_configs())
                raise ValueError(
                    f"tables {tables} are in {name or 'the model'}, a {type(module).__name__}, which TorchRec shards "
                    "as a whole and without quantizing rows: put them into an EmbeddingBagCollection of its own"
                )


def _sharded_collections(model: nn.Module) -> Iterator[ShardedMPEEmbeddingBagCollection]:
    return (module for module in model.modules() if isinstance(module, ShardedMPEEmbeddingBagCollection))


def _enter_phase(
    model: nn.Module,
    phase: Phase,
    initialization: RowInitialization,
    build: Callable[[MPEEmbeddingBagCollection], dict[int, RowQuantizer]],
) -> nn.Module:
    """Swap plain collections for ours and let each enter a phase; nothing changes if one cannot."""
    # A collection may be reached under several names, all of which are replaced.
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is EmbeddingBagCollection or isinstance(module, MPEEmbeddingBagCollection)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} holds no EmbeddingBagCollection")
    _refuse_collections_in_others(model)
    embedding_bag_configs(model)  # refuses a table name that two collections use
    for name, module in found.items():
        if not module.embedding_bag_configs():
            raise ValueError(f"collection {name or type(module).__name__} has no tables: leave it out of the model")
    ours = {
        id(module): module
        if isinstance(module, MPEEmbeddingBagCollection)
        else MPEEmbeddingBagCollection.from_plain(module)
        for module in found.values()
    }
    with _not_on_meta():
        quantizers = {key: build(collection) for key, collection in ours.items()}
        for key, collection in ours.items():
            collection.enter(phase, quantizers[key], initialization)
    for module in model.modules():
        prepare_around_(module)
    for name, module in found.items():
        if name == "":
            return ours[id(module)]
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, ours[id(module)])
    return model


def _retrain_sharded(model: nn.Module, plan: PrecisionPlan) -> None:
    """Fix the bit-widths of all sharded collections; nothing changes if one cannot."""
    _refuse_stock_collections(model)
    collections = list(_sharded_collections(model))
    unsharded = [name for name, module in model.named_modules() if isinstance(module, MPEEmbeddingBagCollection)]
    if unsharded or not collections:
        raise ValueError(
            f"{type(model).__name__} holds {', '.join(unsharded) or 'no collection'} unsharded: give "
            "torchrec_mpe.sharders() to DistributedModelParallel and to the planner"
        )
    with _not_on_meta():
        built = [_retrain_quantizers(sharded, plan) for sharded in collections]
        for sharded, quantizers in zip(collections, built, strict=True):
            sharded.enter_retrain(quantizers, plan.initialization)


def _not_on_meta() -> AbstractContextManager[object]:
    """For ``with torch.device("meta")`` around a model's making: quantizers have values, wherever the rows are."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _retrain_quantizers(sharded: ShardedMPEEmbeddingBagCollection, plan: PrecisionPlan) -> dict[int, RowQuantizer]:
    if sharded.phase is Phase.PLAIN:
        raise ValueError(
            "a collection sharded in the plain phase has TBEs that pool: prepare the model before sharding it"
        )
    return build_retrain_quantizers(
        sharded.embedding_bag_configs(),
        plan.tables,
        plan.candidate_bits,
        plan.initialization,
        plan.zero_row == "learned",
        sharded.quantizers(),
        sharded.device,
    )
