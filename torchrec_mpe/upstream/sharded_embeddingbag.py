"""TorchRec's ShardedEmbeddingBagCollection, open to ours: what it keeps to itself, and where it can be changed."""

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext, KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_mpe.upstream.pooled_lookup import PooledLookup, configs_of_ranks, without_data_parallel
from torchrec_mpe.upstream.tbe import steps_kept

_ROWS_OVER_RANKS = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)


class OpenShardedEmbeddingBagCollection(ShardedEmbeddingBagCollection):
    """TorchRec's ShardedEmbeddingBagCollection with its lookups, configs and ranks at hand, and hooks for subclasses.

    It divides by bag lengths only the mean-pooled tables whose rows are split over ranks. TorchRec 1.8 divides all
    columns of a collection with such a table, those of other sharding types too and those of a sum-pooled table that
    reads the same feature.

    Arguments as ShardedEmbeddingBagCollection.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TorchRec would put 1 for the lengths of these features, also where a mean-pooled table reads them.
        self._pooling_type_to_rs_features[PoolingType.SUM.value] = []
        divided = self._divided_by_length()
        columns = [torch.full((dim,), name in divided) for name, dim in self._embeddings()]
        self._divides = torch.cat(columns).to(self._device)  # bool [sum of dims]

    # What subclasses override. TorchRec calls these while it makes the object.

    def create_lookup(self, sharding_type: str, sharding: Any) -> PooledLookup:
        """The lookup of all tables of one sharding type.

        Args:
            sharding_type (str): as ShardingType names it.
            sharding (EmbeddingSharding): of these tables.
        """
        return PooledLookup(sharding)

    def prepare_state_dict(self) -> None:
        """Called once there are lookups and parameters by table, to add to what TorchRec's state dict has."""

    def take_from_state_dict(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> None:
        """Called before rows are loaded.

        Args:
            state_dict (Dict[str, Any]): that is being loaded, to take out what TorchRec does not know.
            prefix (str): of the collection's keys.
            missing_keys (List[str]): to add to.
        """

    # What they use.

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that the tables are sharded over."""
        group: dist.ProcessGroup | None = self._env.process_group
        return group

    @property
    def device(self) -> torch.device:
        """Where this rank's shards are looked up."""
        device: torch.device = self._device
        return device

    def is_weighted(self) -> bool:
        """Whether features carry per-sample weights."""
        weighted: bool = self._is_weighted
        return weighted

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The table configs, as of the unsharded collection."""
        configs: list[EmbeddingBagConfig] = self._embedding_bag_configs
        return configs

    def config_of(self, table: str) -> EmbeddingBagConfig:
        """A table's config."""
        return self._table_name_to_config[table]

    def lookups(self) -> list[PooledLookup]:
        """This rank's lookups, one a sharding type."""
        return [without_data_parallel(lookup) for lookup in self._lookups]

    def kernel_configs(self) -> Iterator[tuple[str, list[list[GroupedEmbeddingConfig]]]]:
        """The model-parallel sharding types, and in each every rank's groups of tables, one a kernel."""
        for sharding_type, sharding in zip(self._sharding_types, self._embedding_shardings, strict=True):
            if groups := configs_of_ranks(sharding):
                yield sharding_type, groups

    def reset_tables(self, tables: Collection[str]) -> None:
        """TorchRec's ``reset_parameters``, of some tables."""
        some = copy.copy(self)
        some._embedding_bag_configs = [config for config in self._embedding_bag_configs if config.name in tables]
        ShardedEmbeddingBagCollection.reset_parameters(some)

    @torch.no_grad()
    def forward_without_trace(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """What the collection makes of a batch in eval mode, and nothing remembers that it did.

        TorchRec's forward takes features in the order of its first batch from then on, and a TBE counts each forward as
        a step of its optimizer. This one has an input dist of its own, whether or not there has been a batch, and looks
        past a train pipeline that has taken over ``forward``. Collective.

        Args:
            features (KeyedJaggedTensor): at least the collection's, in any order, all with the same number of bags.
        """
        at = {key: k for k, key in enumerate(features.keys())}
        context, parts, divided = self.create_context(), [], self._divided_by_length()
        for sharding in self._embedding_shardings:
            part = features.permute([at[name] for name in sharding.feature_names()])
            parts.append(sharding.create_input_dist()(part))
            context.sharding_contexts.append(
                EmbeddingShardingContext(batch_size_per_feature_pre_a2a=part.stride_per_key())
            )
        divisors = [
            features[divided[name]].lengths().clamp(min=1)[:, None].expand(-1, dim)
            if name in divided
            else torch.ones(features.stride(), dim, device=self._device)
            for name, dim in self._embeddings()
        ]
        context.divisor = torch.cat(divisors, dim=1)
        with steps_kept([kernel.emb_module for lookup in self.lookups() for kernel in lookup.kernels]):
            inputs = KJTListSplitsAwaitable(parts, context).wait().wait()
            # TorchRec's own: subclasses may count lookups.
            pooled: KeyedTensor = ShardedEmbeddingBagCollection.compute_and_output_dist(self, context, inputs).wait()
        return pooled

    def _embeddings(self) -> Iterator[tuple[str, int]]:
        """Name and columns of each embedding, in the order of the output."""
        return zip(self._embedding_names, self._embedding_dims, strict=True)

    # TorchRec's.

    def _create_lookups(self) -> None:
        for sharding_type, sharding in zip(self._sharding_types, self._embedding_shardings, strict=True):
            self._lookups.append(self.create_lookup(sharding_type, sharding))

    def _initialize_torch_state(self, *args: Any, **kwargs: Any) -> None:
        super()._initialize_torch_state(*args, **kwargs)
        self.prepare_state_dict()

    @staticmethod
    def _pre_load_state_dict_hook(
        self: "OpenShardedEmbeddingBagCollection", state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        self.take_from_state_dict(state_dict, prefix, args[2])
        ShardedEmbeddingBagCollection._pre_load_state_dict_hook(self, state_dict, prefix, *args)

    def input_dist(self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor) -> Any:
        """TorchRec's, with the right divisors for mean pooling."""
        awaitable = super().input_dist(ctx, features)
        if ctx.divisor is not None:
            ctx.divisor = torch.where(self._divides, ctx.divisor, 1)
        return awaitable

    def _divided_by_length(self) -> dict[str, str]:
        """The names of the embeddings that are mean-pooled over rows of several ranks, each with its feature."""
        return {
            name: feature
            for kind in _ROWS_OVER_RANKS
            for info in self.sharding_type_to_sharding_infos.get(kind, [])
            if self.config_of(info.embedding_config.name).pooling == PoolingType.MEAN
            for name, feature in zip(
                info.embedding_config.embedding_names, info.embedding_config.feature_names, strict=True
            )
        }
