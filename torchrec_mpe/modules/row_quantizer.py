"""The learned LSQ+ quantizers that the tables of one embedding dimension share."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_mpe.modules.search_config import SearchConfig
from torchrec_mpe.ops.bags import Bags
from torchrec_mpe.ops.quantized_embedding_bag import quantized_embedding_bag
from torchrec_mpe.packing.bit_widths import MAX_BITS, TableBitWidths, check_candidate_bits
from torchrec_mpe.precision.groups import FeatureGroups
from torchrec_mpe.precision.row_initialization import RowInitialization
from torchrec_mpe.upstream.modules import ChecksItsState

OrderByTable = Mapping[str, Tensor | None]

FLOATS = (torch.float32, torch.float64)
"""In which rows are quantized."""

_MIN_STEP_SIZE = 1e-10
_DIGEST_ROWS = 1 << 20  # rows at a time: no table's whole map needs to exist


def trained_in_float32(dtype: torch.dtype) -> str:
    """Why rows and quantizers of another dtype are refused, and the way out."""
    return (
        f"rows and quantizers are {dtype}, they are trained in float32 and packed to their bit-widths afterwards: "
        "leave the collection out of .half() and .bfloat16()"
    )


class _WidthsInOrder(Mapping[str, TableBitWidths]):
    """Bit-widths whose places in the frequency order come from elsewhere when they are read."""

    def __init__(self, widths: Mapping[str, TableBitWidths], order: OrderByTable) -> None:
        self._in_order = {table: replace(w, order=None) for table, w in widths.items()}
        self._order = order

    def __getitem__(self, table: str) -> TableBitWidths:
        return replace(self._in_order[table], order=self._order[table])

    def __iter__(self) -> Iterator[str]:
        return iter(self._in_order)

    def __len__(self) -> int:
        return len(self._in_order)


class RowQuantizer(ChecksItsState):
    """Step sizes, offset and 0-bit vectors of the tables of one embedding dimension D.

    What each row belongs to is not stored here but made by :meth:`row_map`, for a whole table or a shard of it: a
    sharded collection keeps only the maps of its own rows.

    Args:
        num_embeddings (Mapping[str, int]): rows of each table, in order.
        embedding_dim (int): D.
        candidate_bits (Sequence[int]): the m bit-widths that a row can have, increasing, each 0 to 8.
        initialization (RowInitialization): of the rows; step sizes start at ``2 * mean|row| / sqrt(2**(b-1))``.
        learn_zero_row (bool): a 0-bit row reads a learned vector of its table instead of zero.
        device (Optional[torch.device]): device of the parameters; the meta device is taken as CPU.

    Parameters:
        alpha (Tensor): float32 [m], used as ``|alpha| + 1e-10``; the entry of bit-width 0 is never read.
        beta (Tensor): float32 [D], starts at 0.
        zero_rows (Tensor): float32 [tables, D], starts at 0; None without ``learn_zero_row``.

    Buffers:
        layout_digest (Tensor): int64 scalar, of what each row belongs to; loading a state dict with another one fails.
    """

    layout_digest: Tensor

    def __init__(
        self,
        num_embeddings: Mapping[str, int],
        embedding_dim: int,
        candidate_bits: Sequence[int],
        initialization: RowInitialization,
        learn_zero_row: bool,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.candidate_bits: tuple[int, ...] = check_candidate_bits(candidate_bits)
        self.embedding_dim = embedding_dim
        self.table_number: dict[str, int] = {table: t for t, table in enumerate(num_embeddings)}
        self.num_embeddings = dict(num_embeddings)
        self.num_rows = sum(num_embeddings.values())
        if device is not None and device.type == "meta":
            device = None  # learned values cannot live there: materializing the model would lose them
        half_codes = [2.0 ** (b - 1) if b else 1.0 for b in self.candidate_bits]
        step_sizes = [2 * initialization.mean_absolute_value / math.sqrt(h) for h in half_codes]
        self.alpha = nn.Parameter(torch.tensor(step_sizes, device=device))
        self.beta = nn.Parameter(torch.zeros(embedding_dim, device=device))
        self.zero_rows: nn.Parameter | None = None
        if learn_zero_row and 0 in self.candidate_bits:
            self.zero_rows = nn.Parameter(torch.zeros(len(num_embeddings), embedding_dim, device=device))
        numel = self.num_rows * embedding_dim
        self._gradient_scale = [1 / math.sqrt(h * numel) for h in half_codes]

    def row_map(self, table: str, start: int = 0, stop: int | None = None) -> Tensor:
        """What the rows ``start`` to ``stop`` of a table belong to, integer [stop - start], on CPU.

        In the search phase a row's feature group, in the retrain phase its index among the candidate bit-widths.
        """
        raise NotImplementedError

    def replace_order(self, make: Callable[[OrderByTable], OrderByTable]) -> None:
        """Hold the tables' places in the frequency order in another form, such as sharded over the ranks of a job."""
        raise NotImplementedError

    def _register_layout_digest(self) -> None:
        """Counts or plan make the row maps again, so that only a digest of them is in the state dict."""
        digest = hashlib.sha256(str(self.candidate_bits).encode())
        for table, rows in self.num_embeddings.items():
            for start in range(0, rows, _DIGEST_ROWS):
                digest.update(self.row_map(table, start, min(start + _DIGEST_ROWS, rows)).numpy().tobytes())
        number = int.from_bytes(digest.digest()[:8], "little", signed=True)
        self.register_buffer("layout_digest", torch.tensor(number, device=self.alpha.device))

    def refusal(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why the state of a quantizer of other counts or another plan cannot be loaded; None if it can."""
        loaded = state_dict.get(f"{prefix}layout_digest")
        if loaded is None or int(loaded) == int(self.layout_digest):
            return None
        return (
            f"{prefix}layout_digest: the saved quantizer of tables {', '.join(self.table_number)} was prepared "
            "with other counts, groups or bit-widths; prepare the model with the same counts and config, or plan"
        )

    def step_sizes(self) -> Tensor:
        """The positive step size of each candidate bit-width, [m]."""
        return self.alpha.abs() + _MIN_STEP_SIZE

    def step_size_of_width(self) -> Tensor:
        """Step sizes by bit-width, float32 [9], 0 where the width is no candidate and for width 0; detached."""
        by_width = torch.zeros(MAX_BITS + 1, dtype=self.alpha.dtype, device=self.alpha.device)
        for bits, step in zip(self.candidate_bits, self.step_sizes().detach(), strict=True):
            if bits:
                by_width[bits] = step
        return by_width

    def zero_row(self, table: str) -> Tensor:
        """What the 0-bit rows of a table read, [D], detached."""
        if self.zero_rows is None:
            return torch.zeros_like(self.beta.detach())
        return self.zero_rows.detach()[self.table_number[table]]

    def probabilities(self) -> Tensor | None:
        """Of the candidate bit-widths, by feature group, [G, m]; None where every row has one bit-width."""
        return None

    def forward(
        self,
        rows: Tensor,
        bags: Bags,
        row_map: Tensor,
        columns: slice = slice(None),
        gradient_factor: float = 1,
    ) -> Tensor:
        """Quantize looked-up rows and pool them into their bags.

        Args:
            rows (Tensor): [N, local D] values, float32 or float64.
            bags (Bags): the N ids and their bags; ``bags.table`` are numbers of :attr:`table_number`.
            row_map (Tensor): integer, of the rows of the tables, or of a rank's shards of them: see :meth:`row_map`.
            columns (slice): the columns that ``rows`` holds, all by default.
            gradient_factor (float): multiplies the gradients of this module's parameters, not those of ``rows``.

        Returns:
            Tensor: [bags, local D], or [B, F * local D] side by side.

        Raises:
            TypeError: naming the tables, if rows or parameters were made float16 or bfloat16.
        """
        dtype = rows.dtype
        for of in (dtype, self.alpha.dtype):
            if of not in FLOATS:
                raise TypeError(f"tables {', '.join(self.table_number)}: {trained_in_float32(of)}")
        # In this order: backward adds up the gradients of what was made last first.
        alpha, beta = self.step_sizes().to(dtype), self.beta[columns].to(dtype)
        zero_rows = None if self.zero_rows is None else self.zero_rows[:, columns].to(dtype)
        probabilities = self.probabilities()
        return quantized_embedding_bag(
            rows,
            bags,
            row_map,
            None if probabilities is None else probabilities.to(dtype),
            alpha,
            beta,
            zero_rows,
            self.candidate_bits,
            torch.tensor(self._gradient_scale, dtype=dtype, device=self.alpha.device),
            gradient_factor=gradient_factor,
        )


class SearchQuantizer(RowQuantizer):
    """A :class:`RowQuantizer` that learns a probability per feature group and candidate bit-width.

    Args:
        groups (FeatureGroups): the groups of the tables.
        config (SearchConfig): candidate bit-widths, temperature and the rest.
        num_embeddings, embedding_dim, device: as :class:`RowQuantizer`.

    Parameters:
        gamma (Tensor): float32 [G, m], starts at 0.
    """

    def __init__(
        self,
        groups: FeatureGroups,
        num_embeddings: Mapping[str, int],
        embedding_dim: int,
        config: SearchConfig,
        device: torch.device | None = None,
    ) -> None:
        learn_zero_row = config.zero_row == "learned"
        super().__init__(
            num_embeddings, embedding_dim, config.candidate_bits, config.initialization, learn_zero_row, device
        )
        self.config = config
        self.groups = groups
        self.gamma = nn.Parameter(torch.zeros(groups.num_groups, len(self.candidate_bits), device=self.alpha.device))
        self._register_layout_digest()

    def row_map(self, table: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The feature group of the rows ``start`` to ``stop`` of a table, int16 or int32 [stop - start], on CPU."""
        return self.groups.group_of_rows(table, start, stop)

    def replace_order(self, make: Callable[[OrderByTable], OrderByTable]) -> None:
        self.groups = replace(self.groups, order=make(self.groups.order))

    def probabilities(self) -> Tensor:
        """``softmax(gamma / temperature)``, [G, m]."""
        return torch.softmax(self.gamma / self.config.temperature, dim=1)

    def expected_bits(self) -> Tensor:
        """Expected bit-width of each group, [G]."""
        bits = torch.tensor(self.candidate_bits, dtype=self.gamma.dtype, device=self.gamma.device)
        return (self.probabilities() * bits).sum(1)


class RetrainQuantizer(RowQuantizer):
    """A :class:`RowQuantizer` with one fixed bit-width per row.

    Args:
        widths (Mapping[str, TableBitWidths]): the bit-widths of each table, in order.
        embedding_dim, candidate_bits, initialization, learn_zero_row, device: as :class:`RowQuantizer`.

    Raises:
        ValueError: if a row's bit-width is not among the candidates.
    """

    def __init__(
        self,
        widths: Mapping[str, TableBitWidths],
        embedding_dim: int,
        candidate_bits: Sequence[int],
        initialization: RowInitialization,
        learn_zero_row: bool,
        device: torch.device | None = None,
    ) -> None:
        num_embeddings = {table: w.num_embeddings for table, w in widths.items()}
        super().__init__(num_embeddings, embedding_dim, candidate_bits, initialization, learn_zero_row, device)
        self.widths: Mapping[str, TableBitWidths] = dict(widths)
        for table, w in widths.items():
            if not set(w.bits) <= set(self.candidate_bits):
                raise ValueError(
                    f"a row of table {table} has a bit-width not among the candidates {self.candidate_bits}"
                )
        self._candidate_of_width = torch.zeros(MAX_BITS + 1, dtype=torch.uint8)
        self._candidate_of_width[list(self.candidate_bits)] = torch.arange(len(self.candidate_bits), dtype=torch.uint8)
        self._register_layout_digest()

    def row_map(self, table: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The candidate, as an index, of the rows ``start`` to ``stop``, uint8 [stop - start], on CPU."""
        return self._candidate_of_width[self.widths[table].of_rows(start, stop).long()]

    def replace_order(self, make: Callable[[OrderByTable], OrderByTable]) -> None:
        self.widths = _WidthsInOrder(self.widths, make({table: w.order for table, w in self.widths.items()}))

    def load_from(self, other: RowQuantizer) -> None:
        """Take over alpha, beta and the 0-bit vectors of another quantizer of the same tables."""
        with torch.no_grad():
            for k, bits in enumerate(self.candidate_bits):
                if bits in other.candidate_bits:
                    self.alpha[k] = other.alpha[other.candidate_bits.index(bits)]
            self.beta.copy_(other.beta)
            if self.zero_rows is not None and other.zero_rows is not None:
                self.zero_rows.copy_(other.zero_rows)
