"""A checkpoint's tables packed as they are: widths and scales by their error, no training."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from torchrec_mpe.files.progress import progress_bar
from torchrec_mpe.inference.convert.checkpoint_files import open_checkpoint
from torchrec_mpe.inference.convert.checkpoint_tables import CheckpointTable, find_tables, locate_tables
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags
from torchrec_mpe.packing.layout import END_PADDING
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.precision.from_errors import PostTrainingPrecision, precision_from_errors
from torchrec_mpe.precision.plan import PrecisionPlan, ZeroRow
from torchrec_mpe.precision.row_errors import RowErrors, quantized_rows
from torchrec_mpe.precision.row_histograms import RowSource, read_pieces

_TOLERANCE = 1e-5  # of what a table's rows can reach; float32's rounding stays far below, a wrong code far above
_OUTLIER = 100  # times the median row; trained rows stay below
_SECOND_COLLECTION = END_PADDING + 4  # bytes that a collection has once: the end of its weights, and of run_offsets


@dataclass(frozen=True)
class TableErrors:
    """How far a table's packed rows, read back, are from the checkpoint's.

    Attributes:
        weighted_relative_rms (Optional[float]): root of ``sum(lookups * |row - packed|^2) / sum(lookups * |row|^2)``;
            None without lookups, or if all rows with lookups are zeros.
        relative_rms (Optional[float]): the same with all rows alike; None if all are zeros.
        max_abs_error (float): largest difference of an element.
        outlier (Optional[int]): a row so much larger than the others that most of them have 0 bits for its sake, if
            there is one.
        outlier_size (float): its largest element against that of the median row.
    """

    weighted_relative_rms: float | None
    relative_rms: float | None
    max_abs_error: float
    outlier: int | None = None
    outlier_size: float = 1.0


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_checkpoint` made.

    Attributes:
        model (nn.Module): a PackedEmbeddingBagCollection; a ModuleDict of two, "unweighted" and "weighted", if only
            some tables are looked up with per-sample weights.
        plan (PrecisionPlan): the bit-widths.
        errors (Mapping[str, TableErrors]): by table.
    """

    model: nn.Module
    plan: PrecisionPlan
    errors: Mapping[str, TableErrors]

    def collections(self) -> list[PackedEmbeddingBagCollection]:
        """The model's packed collections."""
        return [m for m in self.model.modules() if isinstance(m, PackedEmbeddingBagCollection)]


@torch.no_grad()
def convert_checkpoint(
    path: str | os.PathLike[str],
    tables: Sequence[CheckpointTable] | None = None,
    counts: Mapping[str, Tensor] | None = None,
    *,
    ratio: float | None = None,
    bytes: int | None = None,
    max_error: float | None = None,
    zero_row: ZeroRow = "learned",
    allow_pickle: bool = False,
    progress: bool = False,
) -> Conversion:
    """Choose bit-widths for a checkpoint's tables by :func:`precision_from_errors`, pack them, and measure the error.

    Rows are read in pieces of a few MiB and computed in float32, whatever their dtype; see :func:`open_checkpoint` for
    what stays in memory besides the packed tables.

    Args:
        path (PathLike): a checkpoint that :func:`open_checkpoint` reads.
        tables (Optional[Sequence[CheckpointTable]]): in the collection's order. None: the tables of all
            EmbeddingBagCollections, as :func:`find_tables` finds them.
        counts (Optional[Mapping[str, Tensor]]): per table, int64 [num_embeddings] lookups, for example a
            FrequencyCounter; None: all rows alike.
        ratio (Optional[float]): compression against FP32 rows; give this, ``bytes`` or ``max_error``.
        bytes (Optional[int]): bytes of all packed tables.
        max_error (Optional[float]): largest relative error of each table.
        zero_row (str): "learned" or "zero", what 0-bit rows read.
        allow_pickle (bool): read DCP's pickled metadata.
        progress (bool): show progress bars.

    Returns:
        Conversion: packed on the CPU, with errors measured on all rows as the lookup op reads them back.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        KeyError: naming the table, if checkpoint or counts lack it.
        ValueError: if the checkpoint cannot be read; naming the table, if its shape or counts do not fit or its rows
            are not finite; or saying what can be reached, if the target cannot.
        RuntimeError: naming the table, if rows read back are not what was to be packed.

    Example::

        found = convert_checkpoint("model.safetensors", counts=FrequencyCounter.load("counts.safetensors"), ratio=8)
        found.errors["t_user"].weighted_relative_rms
        save(found.model, "artifact", plan=found.plan)
    """
    files = open_checkpoint(path, allow_pickle=allow_pickle)
    tables = find_tables(files) if tables is None else tables
    keys = locate_tables(files, tables)
    configs = [table.config for table in tables]
    rows: dict[str, RowSource] = {name: partial(files.rows, key) for name, key in keys.items()}
    both = len({table.weighted for table in tables}) > 1
    if ratio is not None and both and ratio > 0:
        ratio, bytes = None, math.floor(sum(4 * c.num_embeddings * c.embedding_dim for c in configs) / ratio)
    found = precision_from_errors(
        rows,
        configs,
        counts,
        ratio=ratio,
        bytes=bytes - _SECOND_COLLECTION if bytes is not None and both else bytes,
        max_error=max_error,
        zero_row=zero_row,
        progress=progress,
    )
    collections: dict[str, PackedEmbeddingBagCollection] = {}
    for name, weighted in (("unweighted", False), ("weighted", True)):
        chosen = [table.config for table in tables if table.weighted == weighted]
        if chosen:
            packed = pack_tables([_to_pack(config.name, found, rows[config.name]) for config in chosen])
            collections[name] = PackedEmbeddingBagCollection(chosen, packed, weighted)
    errors: dict[str, TableErrors] = {}
    total = sum(config.num_embeddings for config in configs)
    with progress_bar(total=total, desc="reading back", unit="row", unit_scale=True, disable=not progress) as bar:
        for collection in collections.values():
            # Every table is a feature of its own here, whatever features the model has.
            tbe = PackedTableBatchedEmbeddingBags(collection.packed_tables())
            for number, table in enumerate(collection.packed_tables().tables):
                lookups = torch.ones(table.num_embeddings) if counts is None else counts[table.name].cpu()
                errors[table.name] = _measure(tbe, number, table.name, found, rows[table.name], lookups, bar.update)
    model = nn.ModuleDict(collections) if both else next(iter(collections.values()))
    return Conversion(model.eval(), found.plan, {config.name: errors[config.name] for config in configs})


def _to_pack(name: str, found: PostTrainingPrecision, rows: RowSource) -> TableToPack:
    scales = found.scales[name]
    return TableToPack(name, found.plan.tables[name], rows, scales.alpha, scales.beta, scales.zero_row)


def _measure(
    tbe: PackedTableBatchedEmbeddingBags,
    number: int,
    name: str,
    found: PostTrainingPrecision,
    rows: RowSource,
    lookups: Tensor,
    done: Callable[[int], object],
) -> TableErrors:
    """Read every row back by the op that serves it."""
    widths, scales = found.plan.tables[name], found.scales[name]
    dim = widths.embedding_dim
    reach = float((scales.alpha * 2.0 ** torch.arange(-1, 8)).max() + scales.beta.abs().max())
    reach += 0.0 if scales.zero_row is None else float(scales.zero_row.abs().max())
    errors, reaches, without_bits = RowErrors(), torch.zeros(widths.num_embeddings), 0
    for start, chunk in read_pieces(name, rows, dim, widths.num_embeddings):
        stop = start + len(chunk)
        read = tbe.lookup(slice(number, number + 1), torch.arange(start, stop), torch.arange(len(chunk) + 1), None)
        bits = widths.of_rows(start, stop)
        meant = quantized_rows(chunk, bits, scales.alpha, scales.beta, scales.zero_row)
        difference = float((read - meant).abs().max())
        if not difference <= _TOLERANCE * reach:
            raise RuntimeError(
                f"table {name}: packed rows read back differ by {difference:.2e} from what was packed: packing is wrong"
            )
        errors.add(chunk, read, lookups[start:stop])
        reaches[start:stop] = chunk.abs().amax(1)
        without_bits += int((bits == 0).sum())
        done(len(chunk))
    measured = TableErrors(errors.weighted_relative_rms, errors.relative_rms, errors.max_abs_error)
    largest = int(reaches.argmax())
    times = float(reaches[largest] / reaches.median()) if reaches.median() > 0 else 1.0
    is_outlier = times >= _OUTLIER and 2 * without_bits > widths.num_embeddings
    return replace(measured, outlier=largest, outlier_size=times) if is_outlier else measured
