"""What a search looks for, and how."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from torchrec_mpe.packing.bit_widths import check_candidate_bits
from torchrec_mpe.precision.plan import ZeroRow
from torchrec_mpe.precision.row_initialization import RowInitialization

Grouping = Literal["log_rank", "paper"]
Penalty = Literal["bits", "paper"]


@dataclass(frozen=True)
class SearchConfig:
    """Settings of the search phase.

    Attributes:
        candidate_bits (tuple[int, ...]): bit-widths that a group can get, any subset of 0 to 8.
        grouping (str): "log_rank", groups of each table's own with bounds even in log(1 + rank); or "paper", equal
            groups over all tables of one embedding dimension (MPE, section 3.2).
        num_groups (Optional[int]): groups a table for "log_rank" (default 12), groups in all for "paper" (default 128).
        penalty (str): "bits" counts what is stored, ``sum_g rows_g * E[b] / n``; "paper" weighs each group by the
            inverse of its frequency, ``sum_g E[b] / f_g`` with f relative to the least frequent group (section 3.3).
        penalty_weight (float): lambda, multiplies the penalty. What suits depends on the data: 1e-2 gave 0.2 bits a row
            on a log of 300,000 rows with "bits"; the authors used 2e-6 to 3e-4 with "paper".
        temperature (float): tau of the softmax over gamma (3e-3 in the authors' code).
        zero_row (str): "learned", 0-bit rows read a learned vector of their table; or "zero", as in the paper.
        initialization (RowInitialization): of the rows, here and again in retraining.
    """

    candidate_bits: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    grouping: Grouping = "log_rank"
    num_groups: int | None = None
    penalty: Penalty = "bits"
    penalty_weight: float = 1e-2
    temperature: float = 3e-3
    zero_row: ZeroRow = "learned"
    initialization: RowInitialization = field(default_factory=RowInitialization)

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidate_bits", check_candidate_bits(self.candidate_bits))
        for name, kinds in (("grouping", Grouping), ("penalty", Penalty), ("zero_row", ZeroRow)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {getattr(self, name)!r}")
        if self.num_groups is not None and self.num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {self.num_groups}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not self.penalty_weight >= 0:
            raise ValueError(f"penalty_weight must not be negative, got {self.penalty_weight}")
