"""The methods that `torchrec-mpe run` compares, by their names on the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.cache.config import CacheConfig, parse_cache_config
from torchrec_mpe.coding.size import smallest_bytes
from torchrec_mpe.errors import UserError
from torchrec_mpe.modules.search_config import SearchConfig
from torchrec_mpe.precision.from_frequencies import cut_precision, precision_from_frequencies, uniform_precision
from torchrec_mpe.precision.plan import PrecisionPlan

FORMS = (
    "fp32", "cache:int8:FRACTION", "cache:int4:FRACTION", "uniform:BITS", "cut:BITS:FRACTION", "rule:RATIO",
    "coded:RATIO", "mpe",
)  # fmt: skip
"""How methods are named; after a cache's fraction may come :lru or :lfu, after the ratio of coded tables :nodistill."""

_NO_DISTILLATION = ":nodistill"


@dataclass(frozen=True)
class Method:
    """One way to size embedding tables.

    Attributes:
        name (str): as given on the command line, "fp32", "cache:int8:0.05", "uniform:6", "cut:4:0.1", "rule:60",
            "coded:100" or "mpe".
        kind (str): the part before the first colon.
        numbers (tuple[float, ...]): the parts after it, but of "cache".
        cache (Optional[CacheConfig]): of "cache".
        distills (bool): whether the dense network is distilled after coding, of "coded".
    """

    name: str
    kind: str
    numbers: tuple[float, ...]
    cache: CacheConfig | None = None
    distills: bool = False

    @classmethod
    def parse(cls, name: str) -> "Method":
        """Read a method's name.

        Raises:
            UserError: if it is none of the known forms.
        """
        kind, *rest = name.split(":")
        if kind == "cache":
            try:
                return cls(name, kind, (), parse_cache_config(name.partition(":")[2]))
            except ValueError as error:
                raise UserError(
                    f"method {name!r} is unknown: use cache:int8:FRACTION or cache:int4:FRACTION, FRACTION of the rows "
                    "above 0 and at most 1, with :lru or :lfu after it or without"
                ) from error
        distills = kind == "coded" and not name.endswith(_NO_DISTILLATION)
        if kind == "coded":
            rest = name.removesuffix(_NO_DISTILLATION).split(":")[1:]
        parts = {form.partition(":")[0]: form.count(":") for form in FORMS}
        try:
            numbers = tuple(float(part) for part in rest)
        except ValueError:
            numbers = ()
        if len(rest) != parts.get(kind) or len(numbers) != len(rest):
            raise UserError(f"method {name!r} is unknown: use {', '.join(FORMS[:-1])} or {FORMS[-1]}")
        if kind in ("uniform", "cut") and numbers[0] not in range(1, 9):
            raise UserError(f"method {name!r} needs a bit-width from 1 to 8")
        if kind == "cut" and not 0 < numbers[1] <= 1:
            raise UserError(f"method {name!r} needs a fraction of rows above 0 and at most 1")
        if kind in ("rule", "coded") and not 1 < numbers[0] < float("inf"):
            raise UserError(f"method {name!r} needs a compression ratio above 1")
        return cls(name, kind, numbers, distills=distills)

    @property
    def searches(self) -> bool:
        """Whether a search chooses the bit-widths."""
        return self.kind == "mpe"

    def plan(
        self, counts: Mapping[str, Tensor], tables: Sequence[EmbeddingBagConfig], search: SearchConfig
    ) -> PrecisionPlan | None:
        """The bit-widths that the method chooses without training; None if it has none, or searches them.

        Raises:
            UserError: if the method's size cannot be reached with these tables.
        """
        initialization, zero_row = search.initialization, search.zero_row
        if self.kind == "coded":
            # Its widths come from trained rows; whether there is room for them is known before.
            fp32 = sum(4 * table.num_embeddings * table.embedding_dim for table in tables)
            smallest = smallest_bytes(counts, {table.name: table.embedding_dim for table in tables})
            if fp32 / self.numbers[0] < smallest:
                raise UserError(
                    f"method {self.name} does not fit this data: without any bits its tables take {smallest:,} bytes "
                    f"({fp32 / smallest:.1f}x)"
                )
        try:
            if self.kind == "uniform":
                return uniform_precision(tables, int(self.numbers[0]), initialization=initialization)
            if self.kind == "cut":
                bits, fraction = int(self.numbers[0]), self.numbers[1]
                return cut_precision(counts, tables, bits, fraction, initialization=initialization, zero_row=zero_row)
            if self.kind == "rule":
                ratio = self.numbers[0]
                return precision_from_frequencies(
                    counts, tables, ratio=ratio, initialization=initialization, zero_row=zero_row
                )
        except ValueError as error:
            raise UserError(f"method {self.name} does not fit this data: {error}") from error
        return None
