"""Where the packed tables of a model go."""

from collections.abc import Mapping, Sequence

import torch

from torchrec_mpe.distributed.planner.packed_placement import PackedPlacement, PackedShard, place_tables
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.inference.sharded.row_ranges import RowRange, coding_of_range
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.size import packed_bytes
from torchrec_mpe.packing.table_coding import TableCoding

_RESERVED = 0.15  # of a GPU's free memory, for activations and the allocator


def place_collections(
    collections: Mapping[str, PackedEmbeddingBagCollection], devices: int, memory: int | None
) -> PackedPlacement:
    """Place packed tables, by the bytes that they really have, on the fewest devices.

    Args:
        collections (Mapping[str, PackedEmbeddingBagCollection]): of one model, with the "packed" backend.
        devices (int): how many there are.
        memory (Optional[int]): bytes that each device has for packed tables; None: enough for all of them.

    Raises:
        PlannerError: if they are too few, with the bytes of each table.
        ValueError: if two collections have a table of one name.
    """
    reports = [collection.size_report() for collection in collections.values()]
    sizes = {table.name: table for report in reports for table in report.tables}
    if len(sizes) < sum(len(report.tables) for report in reports):
        raise ValueError("two collections have a table of one name: shard them one by one")
    total = sum(report.total for report in reports)
    if memory is None or total <= memory:
        shards = tuple(
            PackedShard(name, 0, 0, size.num_embeddings, size.embedding_dim, size.total) for name, size in sizes.items()
        )
        return PackedPlacement(shards, (total,), total, total if memory is None else memory, devices)
    packed = [collection.packed_tables().cpu() for collection in collections.values()]
    tables = codings_of_tables(packed)
    learned = any(bool((each.zero_row_offsets >= 0).any()) for each in packed)
    # What these tables take beyond those sizes: directories that were asked for, scales of their own, several
    # collections. No device's share of it is larger than all of it.
    beyond = max(0, total - packed_bytes(tables, learned_zero_rows=learned).total)
    return place_tables(tables, memory - beyond, devices, learned_zero_rows=learned)


def free_memory(devices: Sequence[torch.device]) -> int | None:
    """85% of the bytes that are free on the CUDA device with the fewest; None if there is none."""
    free = [torch.cuda.mem_get_info(device)[0] for device in devices if device.type == "cuda"]
    return int(min(free) * (1 - _RESERVED)) if free else None


def codings_of_tables(packed: Sequence[PackedTables]) -> dict[str, TableBitWidths | TableCoding]:
    """The bit-widths of packed tables, read from their directories, and the codings of coded ones."""
    return {
        table.name: coding_of_range(each, RowRange(t, 0, table.num_embeddings))
        for each in packed
        for t, table in enumerate(each.tables)
    }
