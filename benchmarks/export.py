"""Exported models: sizes, time to load and speed, with packed rows and on stock FBGEMM, side by side.

    python benchmarks/export.py             # 4 minutes
    python benchmarks/export.py --quick     # within 2 minutes

A DLRM of 26 tables of D=16 whose rows have the widths "mixA" of lookup.py (1.36 bits on average), B=2048, ten Zipf
(1.05) ids a bag, one thread. Each backend is run as the eager module, as a torch.export program and compiled by
AOTInductor, weights beside the file. All are timed in turns; "speed" is the eager packed model's time over that of the
row, a median over the turns. The bytes are all that is stored, and for eager the buffers and parameters;
"tables" are those of the rows and their directory alone. "load" is the file already in the page cache.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lookup import BATCH, SHARES, TABLES, draw_ids, packed_tables
from measure import interleave, medians, ratio, versions, write_json
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.files.text_table import text_table

DIM, DENSE, POOLING = 16, 13, 10
FORMS = ("eager", "program", "aoti")
BACKENDS = ("packed", "fbgemm")


def dlrm(rows: int) -> nn.Module:
    """Random weights; ids out of range are tolerated, as on a serving host."""
    packed = packed_tables(rows, DIM, SHARES["mixA"])
    configs = [
        EmbeddingBagConfig(name=t.name, num_embeddings=rows, embedding_dim=DIM, feature_names=[f"f{k}"])
        for k, t in enumerate(packed.tables)
    ]
    torch.manual_seed(0)
    collection = mpe.PackedEmbeddingBagCollection(configs, packed, bounds_check_mode=2)
    return DLRM(collection, DENSE, [512, 256, DIM], [512, 256, 1]).eval()


def inputs(rows: int, batch: int, seed: int = 0) -> tuple[Tensor, KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(0, TABLES * batch * POOLING + 1, POOLING, dtype=torch.int32)
    ids = draw_ids(rows, "zipf", TABLES * batch * POOLING, generator)
    sparse = KeyedJaggedTensor([f"f{k}" for k in range(TABLES)], ids, offsets=offsets)
    return torch.randn(batch, DENSE, generator=generator), sparse


def on_fbgemm(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.sparse_arch.embedding_bag_collection = other.sparse_arch.embedding_bag_collection.on_fbgemm()
    return other


def measured(rows: int, seconds: float) -> list[dict[str, Any]]:
    """One record a backend and form."""
    model = dlrm(rows)
    eager = {"packed": model, "fbgemm": on_fbgemm(model)}
    dense, sparse = inputs(rows, BATCH)
    flat = dense, sparse.values(), sparse.offsets()
    calls: dict[str, Callable[[], object]] = {}
    records: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in BACKENDS:
            want = eager[backend](dense, sparse)
            for form in FORMS:
                name, record = f"{backend} {form}", {"backend": backend, "form": form}
                if form == "eager":
                    tensors = [*eager[backend].parameters(), *eager[backend].buffers()]
                    record["bytes"] = sum(t.numel() * t.element_size() for t in tensors)
                    calls[name] = lambda backend=backend: eager[backend](dense, sparse)
                else:
                    file = Path(folder) / f"{backend}-{form}" / "model.pt2"
                    begin = time.perf_counter()
                    mpe.export(model, inputs(rows, 4), file, form=form, backend=backend, weights="beside")
                    record["export_seconds"] = time.perf_counter() - begin
                    begin = time.perf_counter()
                    loaded = mpe.load_exported(file)
                    record["load_seconds"] = time.perf_counter() - begin
                    record["bytes"] = sum(f.stat().st_size for f in file.parent.iterdir())
                    torch.testing.assert_close(loaded(*flat), want, rtol=1e-4, atol=1e-5)
                    calls[name] = lambda loaded=loaded: loaded.run(*flat)
                record["table_bytes"] = eager[backend].sparse_arch.embedding_bag_collection.nbytes
                records[name] = record
        times = interleave(calls, seconds, warm=True)
    middle = medians(times)
    for name, record in records.items():
        record |= {"case": name, "rows": rows, "dim": DIM, "seconds": middle[name]}
        record["speed"] = ratio(times, "packed eager", name)
    return list(records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller tables and fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    rows = 20_000 if options.quick else 200_000
    with torch.no_grad():
        records = measured(rows, 10 if options.quick else 60)
    print(f"{TABLES} tables of {rows:,} rows")
    lines = [["backend", "form", "MB", "tables MB", "export s", "load s", "ms a batch", "speed"]]
    for r in records:
        seconds = [f"{r[key]:.2f}" if key in r else "-" for key in ("export_seconds", "load_seconds")]
        sizes = [f"{r[key] / 1e6:.1f}" for key in ("bytes", "table_bytes")]
        lines.append([r["backend"], r["form"], *sizes, *seconds, f"{r['seconds'] * 1e3:.2f}", f"{r['speed']:.2f}"])
    print(text_table(lines))
    if options.json:
        write_json(options.json, records)


if __name__ == "__main__":
    main()
