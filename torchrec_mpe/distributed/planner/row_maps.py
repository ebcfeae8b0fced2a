"""What a phase keeps for every row beside the row itself."""

from dataclasses import dataclass

from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.modules.row_quantizer import RetrainQuantizer, SearchQuantizer

_PLACE_BYTES = 4  # int32
# Before a phase is prepared: int16 reaches as far as 32,767 feature groups of one embedding dimension.
_MAP_BYTES = {Phase.PLAIN: 0, Phase.SEARCH: 2, Phase.RETRAIN: 1}


@dataclass(frozen=True)
class RowMapBytes:
    """Bytes a row.

    Attributes:
        device (int): the row map, on the device of the rows: the feature group (search) or candidate (retrain).
        host (int): the place in the frequency order, in host memory; 0 if the table's ids are in frequency order.
    """

    device: int = 0
    host: int = 0


def row_map_bytes(collection: MPEEmbeddingBagCollection, table: str, phase: Phase) -> RowMapBytes:
    """What a table keeps for every row in a phase.

    If the collection is not in that phase yet, a map of int16 (search) or uint8 (retrain) is taken and ids that are not
    places in the frequency order.

    Args:
        collection (MPEEmbeddingBagCollection): unsharded.
        table (str): one of its tables.
        phase (Phase): that is planned for.
    """
    if phase is Phase.PLAIN:
        return RowMapBytes()
    if collection.phase is not phase:
        return RowMapBytes(_MAP_BYTES[phase], _PLACE_BYTES)
    quantizer = next(q for q in collection.quantizers().values() if table in q.num_embeddings)
    order = None
    if isinstance(quantizer, SearchQuantizer):
        order = quantizer.groups.order[table]
    elif isinstance(quantizer, RetrainQuantizer):
        order = quantizer.widths[table].order
    return RowMapBytes(quantizer.row_map(table, 0, 1).dtype.itemsize, 0 if order is None else _PLACE_BYTES)
