"""An EmbeddingBagCollection whose tables train in low precision, with a full-precision cache."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig

from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.precision.plan import PrecisionPlan


class CachedEmbeddingBagCollection(MPEEmbeddingBagCollection):
    """An MPEEmbeddingBagCollection whose tables, once sharded, live in INT8 or INT4 with a cache of fp32 rows.

    As TorchRec's fused kernels do, store and cache come with sharding: until then, on the meta device, a table takes no
    memory at all. Which tables are cached is up to the sharding plan: those with the compute kernel
    ``customized_kernel``, the only one that is proposed for a table with a CacheConfig.

    Args:
        tables (List[EmbeddingBagConfig]): the tables; FP32.
        is_weighted (bool): whether input KeyedJaggedTensors carry per-sample weights.
        device (Optional[torch.device]): "meta" to let the sharder allocate.
        cache (Union[CacheConfig, Mapping[str, CacheConfig]]): for all tables, or by table name; tables that are not
            named are not cached.
        precision (Optional[PrecisionPlan]): rows that the plan gives more than 4 bits are stored in 8 bits and the
            others in 4, in place of ``CacheConfig.bits``.

    Raises:
        ValueError: naming the table, for a cache or a plan of an unknown table or of another size, or a data type other
            than FP32.

    Example::

        tables = [EmbeddingBagConfig(name="t1", num_embeddings=1000, embedding_dim=8, feature_names=["f1"])]
        cache = CacheConfig(bits=8, load_factor=0.05)
        model = CachedEmbeddingBagCollection(tables, device=torch.device("meta"), cache=cache)
        fused = sharders({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02})
        planner = MPEShardingPlanner(topology, batch_size=512)     # TorchRec's has no estimates for the kernel
        plan = planner.collective_plan(model, fused, dist.GroupMember.WORLD)
        dmp = DistributedModelParallel(model, device=device, plan=plan, sharders=fused)
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        cache: CacheConfig | Mapping[str, CacheConfig] | None = None,
        precision: PrecisionPlan | None = None,
    ) -> None:
        super().__init__(tables, is_weighted, device)
        names = [table.name for table in tables]
        cache = CacheConfig() if cache is None else cache
        self.cache_configs: dict[str, CacheConfig] = (
            dict.fromkeys(names, cache) if isinstance(cache, CacheConfig) else dict(cache)
        )
        self._widths: dict[str, TableBitWidths] = {} if precision is None else dict(precision.tables)
        if unknown := sorted(set(self.cache_configs) - set(names)):
            raise ValueError(f"a cache is configured for table {unknown[0]}, the tables are {', '.join(names)}")
        for table in tables:
            if table.name in self.cache_configs and table.data_type != DataType.FP32:
                raise ValueError(f"table {table.name} has data type {table.data_type.value}: the cache is for FP32")
            widths = self._widths.get(table.name)
            if widths is not None and widths.num_embeddings != table.num_embeddings:
                raise ValueError(
                    f"table {table.name} has {table.num_embeddings} rows, in the precision plan {widths.num_embeddings}"
                )

    def bit_widths(self, table: str) -> TableBitWidths | None:
        """The bit-widths that the precision plan gives a table's rows; None without one."""
        return self._widths.get(table)

    def wide_rows(self, table: str, start: int, stop: int) -> Tensor | None:
        """Which of some neighbouring rows are stored in 8 bits, bool [stop - start]; None without a precision plan."""
        widths = self._widths.get(table)
        return None if widths is None else widths.of_rows(start, stop) > 4
