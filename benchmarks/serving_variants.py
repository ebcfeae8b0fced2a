"""The servers that serve.py drives: examples/serve with one DLRM, its tables stored in different ways.

python benchmarks/serving_variants.py int8 --rows 200000   # prints where it serves, until SIGTERM

"packed" needs --artifact, a folder that :func:`write_artifact` made, and memory-maps it. All have the same network and
26 tables of D=64. The fp32 rows are TorchRec's EmbeddingBagCollection, INT8 and INT4 what
torchrec.quant.EmbeddingBagCollection makes of them: FBGEMM's inference TBE, its rows padded to 16 bytes.
"""

import argparse
import ctypes
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lookup import SHARES, TABLES, packed_tables
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.inference.modules import quantize_embeddings
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig

import torchrec_mpe as mpe

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "serve"))

from app import create_app
from current_model import CurrentModel
from dlrm import load_dlrm
from server import serve

DIM, NUM_DENSE, DENSE_ARCH, OVER_ARCH = 64, 13, [256, 64], [256, 64, 1]
QUANTIZED = {"int8": torch.qint8, "int4": torch.quint4x2}
VARIANTS = ("fp32", "int8", "int4", "packed")
SHARE = "mixA"
"""Bit-widths of the packed rows, 1.36 bits on average: see lookup.py."""


def tables(rows: int) -> list[EmbeddingBagConfig]:
    """26 tables with a feature each."""
    return [
        EmbeddingBagConfig(name=f"t{t}", num_embeddings=rows, embedding_dim=DIM, feature_names=[f"f{t}"])
        for t in range(TABLES)
    ]


def dlrm(collection: nn.Module) -> DLRM:
    """The network around a collection, the same for all."""
    torch.manual_seed(0)
    return DLRM(collection, NUM_DENSE, DENSE_ARCH, OVER_ARCH).eval()


def float_model(rows: int) -> nn.Module:
    """fp32 rows."""
    collection = EmbeddingBagCollection(tables(rows), device=torch.device("meta")).to_empty(device="cpu")
    values = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for bag in collection.embedding_bags.values():
            bag.weight.copy_(values)
    return dlrm(collection)


def quantized_model(rows: int, dtype: torch.dtype) -> nn.Module:
    """TorchRec's INT8 or INT4 of the fp32 rows."""
    return quantize_embeddings(float_model(rows), dtype, inplace=True).eval()


def write_artifact(folder: Path, rows: int) -> None:
    """Write the packed model; its rows are quantized from values distributed as the fp32 ones."""
    model = dlrm(EmbeddingBagCollection(tables(rows), device=torch.device("meta")))
    packed = packed_tables(rows, DIM, SHARES[SHARE])
    model.sparse_arch.embedding_bag_collection = mpe.PackedEmbeddingBagCollection(tables(rows), packed)
    mpe.save(model, folder)


def loader(variant: str, rows: int, artifact: Path | None) -> Callable[[], nn.Module]:
    """How a variant's model is made."""
    if variant == "packed":
        assert artifact is not None
        return partial(load_dlrm, artifact, NUM_DENSE, DENSE_ARCH, OVER_ARCH)
    return partial(float_model, rows) if variant == "fp32" else partial(quantized_model, rows, QUANTIZED[variant])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--rows", type=int, default=200_000, help="of each table")
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--max-joined", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = CurrentModel(loader(options.variant, options.rows, options.artifact), NUM_DENSE, max_batch=4096)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what quantizing took, so that no variant is charged for how its rows were made
    serve(create_app(model, max_joined=options.max_joined), "127.0.0.1", 0)


if __name__ == "__main__":
    main()
