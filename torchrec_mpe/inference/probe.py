"""A batch that reaches every kind of row of packed tables."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.directory_lines import row_bits

_CHUNK_ROWS = 1 << 20
_MAX_RUNS = 64  # both ends of this many; of a table with more, evenly spaced ones
_SPREAD_IDS = 32
_IDS_IN_A_BAG = 8


def probe_ids(widths: TableBitWidths) -> Tensor:
    """Ids that show whether a table is packed right; work is per run, or per row if ids are not in frequency order.

    Returns:
        Tensor: int64, increasing: the first and last row, the first and last of each bit-width and, where ids are
        order, of each run, and rows spread evenly between.
    """
    rows = widths.num_embeddings
    ids = {0, rows - 1, *torch.linspace(0, rows - 1, _SPREAD_IDS, dtype=torch.float64).long().tolist()}
    if widths.order is None:
        starts = [first for first, _ in widths.runs()]
        ends = [*(start - 1 for start in starts[1:]), rows - 1]
        step = -(-len(starts) // _MAX_RUNS)
        first_of_width = {bits: k for k, (_, bits) in reversed(list(enumerate(widths.runs())))}
        for k in {*range(0, len(starts), step), *first_of_width.values()}:
            ids |= {starts[k], ends[k]}
    else:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for start in range(0, rows, _CHUNK_ROWS):
            bits = row_bits(widths, start, min(start + _CHUNK_ROWS, rows))
            for width in bits.unique().tolist():
                found = (bits == width).nonzero()
                first.setdefault(width, start + int(found[0]))
                last[width] = start + int(found[-1])
        ids |= {*first.values(), *last.values()}
    return torch.tensor(sorted(ids))


def draw_probe(
    tables: Sequence[EmbeddingBagConfig], ids: Mapping[str, Tensor], is_weighted: bool, device: torch.device
) -> KeyedJaggedTensor:
    """One batch of a collection's features: an empty bag, a bag of several ids, then a bag for each id.

    Args:
        tables (Sequence[EmbeddingBagConfig]): of the collection.
        ids (Mapping[str, Tensor]): of each table, as :func:`probe_ids` returns them. A feature of several tables gets
            the ids of all that are rows in each of them.
        is_weighted (bool): with per-sample weights, some above and some below 1.
        device (torch.device): of the batch.

    Returns:
        KeyedJaggedTensor: int64 ids and lengths, the same batch size for all features.
    """
    readers: dict[str, list[EmbeddingBagConfig]] = {}
    for table in tables:
        for feature in table.feature_names:
            readers.setdefault(feature, []).append(table)
    chosen: list[Tensor] = []
    for of in readers.values():
        rows = min(table.num_embeddings for table in of)
        every = torch.cat([*(ids[table.name] for table in of), torch.tensor([rows - 1])]).unique()
        chosen.append(every[every < rows])
    batch = 2 + max(len(each) for each in chosen)
    lengths = torch.zeros(len(chosen), batch, dtype=torch.int64)
    values: list[Tensor] = []
    for of_feature, each in zip(lengths, chosen, strict=True):
        several = each[:: -(-len(each) // _IDS_IN_A_BAG)]
        of_feature[1] = len(several)
        of_feature[2 : 2 + len(each)] = 1
        values += [several, each]
    all_values = torch.cat(values)
    weights = 0.5 + 0.25 * (torch.arange(len(all_values)) % 5) if is_weighted else None
    return KeyedJaggedTensor.from_lengths_sync(list(readers), all_values, lengths.flatten(), weights).to(device)
