"""Initial embedding rows from a counter-based generator, so that any shard can be made again without storing it.

Retraining sets every row back to its initial value (MPE, arXiv 2409.20305, section 3.4). A value here depends only on
(seed, table name, global row, global column): whatever the sharding, the world size or the order of calls, the same
row comes out, bit for bit.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

_QUANTILES = 1 << 16
_COLUMNS_PER_WORD = 4  # one 64-bit word gives four 16-bit quantile numbers
_ROWS_PER_CHUNK = 1 << 16


@lru_cache(maxsize=1)
def _normal_quantiles() -> Tensor:
    """The mid-point quantiles of N(0, 1) that a 16-bit number picks, float32 [65536], symmetric about zero."""
    normal = NormalDist()
    upper = [normal.inv_cdf((k + 0.5) / _QUANTILES) for k in range(_QUANTILES // 2, _QUANTILES)]
    return torch.tensor([-x for x in reversed(upper)] + upper, dtype=torch.float32)


def _int64(unsigned: int) -> int:
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 seen as uint64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 words (Steele, Lea and Flood, OOPSLA 2014); wraps modulo 2**64."""
    x = (x ^ _shift_right(x, 30)) * _int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _int64(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def stream_key(seed: int, name: str) -> int:
    """A 64-bit key for (seed, name), the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@torch.no_grad()
def fill_initial_rows_(
    rows: Tensor, *, seed: int, table: str, std: float, first_row: int = 0, first_column: int = 0
) -> Tensor:
    """Write the initial values of a shard into ``rows``, in place.

    Args:
        rows (Tensor): [local rows, local columns], any floating dtype and device.
        seed (int): the seed of the run.
        table (str): table name; tables of different names get independent values.
        std (float): standard deviation of the values, N(0, std).
        first_row (int): the shard's first row in the whole table.
        first_column (int): the shard's first column in the whole table.

    Returns:
        Tensor: ``rows``.
    """
    device = rows.device
    if device.type == "meta":
        return rows
    last_column = first_column + rows.shape[1]
    first_word = first_column // _COLUMNS_PER_WORD
    last_word = -(-last_column // _COLUMNS_PER_WORD)
    words = torch.arange(first_word, last_word, device=device, dtype=torch.int64)
    key = stream_key(seed, table)
    # The word's index is hashed on its own, so that a row's values do not depend on the table's width.
    word_keys = splitmix64(words * _int64(0x9E3779B97F4A7C15) + key)
    shifts = torch.arange(0, 64, 16, device=device, dtype=torch.int64)
    quantiles = (_normal_quantiles() * std).to(device)
    skip = first_column - first_word * _COLUMNS_PER_WORD
    for start in range(0, rows.shape[0], _ROWS_PER_CHUNK):
        stop = min(start + _ROWS_PER_CHUNK, rows.shape[0])
        index = torch.arange(first_row + start, first_row + stop, device=device, dtype=torch.int64)
        row_keys = splitmix64((index + 1) * _int64(0x9E3779B97F4A7C15) ^ key)
        bits = splitmix64(row_keys[:, None] ^ word_keys[None, :])
        numbers = (bits[:, :, None] >> shifts) & (_QUANTILES - 1)
        values = quantiles[numbers.reshape(stop - start, -1)[:, skip : skip + rows.shape[1]]]
        rows[start:stop].copy_(values)
    return rows


@dataclass(frozen=True)
class RowInitialization:
    """How the rows of a model start: N(0, std) from a counter-based generator.

    Attributes:
        seed (int): tables of the same name, size and seed start equal.
        std (float): standard deviation; the MPE authors' code uses 0.003.
    """

    seed: int = 0
    std: float = 3e-3

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"the standard deviation of initial rows must be positive, got {self.std}")

    def fill_(self, rows: Tensor, table: str, first_row: int = 0, first_column: int = 0) -> Tensor:
        """:func:`fill_initial_rows_` with this seed and standard deviation."""
        return fill_initial_rows_(
            rows, seed=self.seed, table=table, std=self.std, first_row=first_row, first_column=first_column
        )

    @property
    def mean_absolute_value(self) -> float:
        """Mean of abs(x) for x of N(0, std)."""
        return self.std * math.sqrt(2 / math.pi)
