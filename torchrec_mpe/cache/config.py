"""How a table is stored in low precision, and what its cache is like."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm

from torchrec_mpe.ops.cache_tensors import STATE_BYTES, WAYS
from torchrec_mpe.upstream.fused_optimizers import traits_of

SPILL_GROWTH = 1.25
"""Spill rows made at a time, over those needed."""


@dataclass(frozen=True)
class CacheConfig:
    """Backing store and cache of a table.

    Attributes:
        bits (int): of a stored value, 8 or 4.
        load_factor (float): rows that the cache holds in fp32, as a share of the table's, above 0 and at most 1;
            FBGEMM's ``cache_load_factor``. It holds at least one set of 32.
        algorithm (CacheAlgorithm): which row makes room: the one looked up longest ago (LRU) or least often (LFU).
            LFU keeps a count of 1 byte for every row.
        optimizer_state_dtype (Optional[str]): how the store holds optimizer state: "fp32", "bf16" or, for states that
            are never negative, "ue6m2" (1 byte). By default the last for row-wise Adagrad and "bf16" for others. In the
            cache it is fp32.
        location (str): "host" or "device" memory for the store; of one kind on a CPU. Host memory is pinned.
        stochastic_rounding (bool): round to the store so that the expected value is exact. Without it, updates smaller
            than half a step of the grid get lost.
        seed (int): of the rounding, below 2^63.
        half_life (float): LFU counts are halved whenever the table has been looked up this many times its number of
            rows; ``inf`` for never.
        spill_rows (int): rows that the spill area has from the start. It grows by itself, but not between a forward and
            its backward.

    Raises:
        ValueError: for a value out of range.
    """

    bits: Literal[4, 8] = 8
    load_factor: float = 0.05
    algorithm: CacheAlgorithm = CacheAlgorithm.LRU
    optimizer_state_dtype: Literal["fp32", "bf16", "ue6m2"] | None = None
    location: Literal["host", "device"] = "host"
    stochastic_rounding: bool = True
    seed: int = 0
    half_life: float = 32.0
    spill_rows: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        if not 0 < self.load_factor <= 1:
            raise ValueError(f"load_factor must be above 0 and at most 1, got {self.load_factor}")
        if self.optimizer_state_dtype not in (None, *STATE_BYTES):
            raise ValueError(
                f"optimizer_state_dtype must be one of {', '.join(STATE_BYTES)}, got {self.optimizer_state_dtype!r}"
            )
        if self.location not in ("host", "device"):
            raise ValueError(f"location must be host or device, got {self.location!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        if not self.half_life > 0:
            raise ValueError(f"half_life must be positive, got {self.half_life}")
        if self.spill_rows < 0:
            raise ValueError(f"spill_rows must not be negative, got {self.spill_rows}")

    def num_sets(self, rows: int) -> int:
        """Sets of the cache of a table or shard of some rows."""
        sets = max(1, -(-int(self.load_factor * rows) // WAYS))
        # An odd number spreads ids that have a power of two as their stride.
        return min(sets | 1, max(1, -(-rows // WAYS)))

    def state_dtype(self, optimizer: EmbOptimType, elements: int) -> str:
        """How the store holds an optimizer state of so many elements a row, a key of ``STATE_BYTES``."""
        by_row = "ue6m2" if traits_of(optimizer).never_negative else "bf16"
        return self.optimizer_state_dtype or (by_row if elements == 1 else "bf16")

    def table_seed(self, table: str) -> int:
        """The seed of a table's random numbers, below 2^63."""
        return int(hashlib.sha256(f"{self.seed} {table}".encode()).hexdigest()[:16], 16) >> 1


def parse_cache_config(text: str) -> CacheConfig:
    """Read "int8:0.05" or "int4:0.01", with ":lru" or ":lfu" after it; without, LRU for INT8 and LFU for INT4.

    Raises:
        ValueError: if it has another form.
    """
    width, _, rest = text.partition(":")
    factor, named, algorithm = rest.partition(":")
    bits: dict[str, Literal[4, 8]] = {"int8": 8, "int4": 4}
    algorithms = {"lru": CacheAlgorithm.LRU, "lfu": CacheAlgorithm.LFU}
    if not named:
        algorithm = {"int4": "lfu"}.get(width, "lru")
    try:
        load_factor = float(factor)
    except ValueError:
        load_factor = 0.0
    if width not in bits or algorithm not in algorithms or not 0 < load_factor <= 1:
        raise ValueError(
            f"{text!r} is no cache: use int8:FRACTION or int4:FRACTION, FRACTION of the rows at most 1, with :lru or "
            ":lfu after it or without"
        )
    return CacheConfig(bits[width], load_factor, algorithms[algorithm])
