"""What others would do to the rows of a trained model, and the bytes that it takes; its network stays as it is."""

import copy
from collections.abc import Callable, Mapping

import torch
from fbgemm_gpu import split_table_batched_embeddings_ops_inference  # noqa: F401  (registers the operators)
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_mpe.inference.compress.compress import collections_of, configs_of
from torchrec_mpe.inference.compress.rows import owned_rows

Rival = Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], int]]
"""float32 rows by table -> the rows that are read in their place, and all bytes that are stored."""

_LARGEST_BOOK = 10  # bits of a product quantizer's codes; a book has 2**bits rows


def rows_of(model: nn.Module) -> dict[str, Tensor]:
    """All rows of a model in one process, float32 [num_embeddings, D] by table."""
    return {
        table: torch.cat([piece for _, piece in owned.pieces()])
        for collection in collections_of(get_unwrapped_module(model))
        for table, owned in owned_rows(collection).items()
    }


def with_rows(model: nn.Module, rows: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model in one process that reads other rows."""
    source = get_unwrapped_module(model)
    memo: dict[int, nn.Module] = {}
    for collection in collections_of(source):
        plain = EmbeddingBagCollection(tables=configs_of(collection), is_weighted=collection.is_weighted())
        for table, bag in plain.embedding_bags.items():
            bag.weight.data.copy_(rows[table])
        memo[id(collection)] = plain
    copied: nn.Module = copy.deepcopy(source, memo)
    return copied.eval()


def fbgemm_int(bits: int) -> Rival:
    """FBGEMM's INT8, INT4 or INT2: codes with a scale and a bias a row."""
    ops = torch.ops.fbgemm

    def quantize(rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        if bits == 8:
            packed = {table: ops.FloatToFused8BitRowwiseQuantized(values) for table, values in rows.items()}
            read = {table: ops.Fused8BitRowwiseQuantizedToFloat(values) for table, values in packed.items()}
        else:
            packed = {table: ops.FloatToFusedNBitRowwiseQuantizedSBHalf(values, bits) for table, values in rows.items()}
            read = {table: ops.FusedNBitRowwiseQuantizedSBHalfToFloat(v, bits) for table, v in packed.items()}
        return read, sum(values.numel() for values in packed.values())

    return quantize


def product_quantization(ratio: float) -> Rival:
    """faiss's product quantizer: a row is a few codes of a few bits, each of a book of its own; books are float32.

    Every table gets the number of codes and of bits whose bytes come nearest below its share.
    """
    try:
        import faiss  # type: ignore[import-not-found]
    except ImportError:
        raise SystemExit("rivals: product quantization is faiss's: pip install faiss-cpu") from None

    def quantize(rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        read: dict[str, Tensor] = {}
        total = 0
        for table, values in rows.items():
            count, dim = values.shape
            best: tuple[int, int, int] | None = None
            for codes in (c for c in (1, 2, 4, 8, 16, 32) if dim % c == 0):
                for bits in range(1, _LARGEST_BOOK + 1):
                    size = -(-count * codes * bits // 8) + 4 * dim * 2**bits
                    if 2**bits <= count and size <= 4 * values.numel() / ratio and (best is None or size > best[0]):
                        best = size, codes, bits
            if best is None:  # not even one bit a row: all read the mean
                read[table] = values.mean(0).expand_as(values)
                total += 4 * dim
                continue
            size, codes, bits = best
            quantizer = faiss.ProductQuantizer(dim, codes, bits)
            quantizer.train(values.numpy())
            read[table] = torch.from_numpy(quantizer.decode(quantizer.compute_codes(values.numpy())))
            total += size
        return read, total

    return quantize


def magnitude_pruning(ratio: float) -> Rival:
    """The elements of largest magnitude of all tables, each an int32 for its place and a float16."""

    def prune(rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        magnitudes = torch.cat([values.abs().flatten() for values in rows.values()])
        kept = int(4 * magnitudes.numel() / ratio / 6)
        least = magnitudes.kthvalue(magnitudes.numel() - kept + 1).values
        read = {table: values.half().float() * (values.abs() >= least) for table, values in rows.items()}
        return read, 6 * sum(int((values != 0).sum()) for values in read.values())

    return prune


def rivals_at(ratio: float) -> dict[str, Rival]:
    """Those that can be made to meet a ratio."""
    return {
        f"product quantization:{ratio:g}": product_quantization(ratio),
        f"pruned:{ratio:g}": magnitude_pruning(ratio),
    }
