"""AUC of a trained fp32 model and of its conversions without training, at equal bytes.

    python benchmarks/convert.py --ciao ciao.csv            # user,item,category,rating; positive: rating 5
    python benchmarks/convert.py --generated                # the demo's log, half of whose fields are useless
    python benchmarks/convert.py --generated --quick        # a tenth of the rows, one seed

Each seed has its own random 8:1:1 split, initial rows and order of batches. Two ways to the widths are compared, both
with step sizes, offset and 0-bit row of each table fitted to the trained rows: by the error of quantization
(`torchrec-mpe convert`), and by the frequency rule (one more bit per fourfold count) at the same bytes.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from click_logs import one_quiet_thread, parser_of, prepare_splits, write_records
from safetensors.torch import save_file
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from tqdm import tqdm

from torchrec_mpe.app.data.dataset import PreparedDataset
from torchrec_mpe.app.training.loop import evaluate
from torchrec_mpe.app.training.method import Method
from torchrec_mpe.app.training.pipeline import run_pipeline
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.app.training.settings import Settings
from torchrec_mpe.app.training.stages import Job
from torchrec_mpe.inference.convert.convert import convert_checkpoint
from torchrec_mpe.inference.packed_embedding_bag_collection import PackedEmbeddingBagCollection
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.precision.from_frequencies import precision_from_frequencies
from torchrec_mpe.precision.plan import PrecisionPlan
from torchrec_mpe.precision.row_errors import quantized_rows

RATIOS = (4.0, 8.0, 16.0, 30.0)
_SCALES = (9 + 16 + 1) * 4  # bytes of a table's own alpha, beta and their index, which the rule's plan counts once


def run_seed(job: Job, folder: Path) -> list[dict[str, Any]]:
    """Train one fp32 model, convert it at every ratio both ways, and evaluate on the test rows."""
    tables, counts, seed = job.tables, job.counts, job.settings.seed
    with process_group(job.run.device):
        outcome = run_pipeline(job)
        model: Any = outcome.model.module
        rows = {table.name: torch.zeros(table.num_embeddings, table.embedding_dim) for table in tables}
        for name, row, column, values in model.embedding_bag_collection.local_shards():
            rows[name][row : row + values.shape[0], column : column + values.shape[1]] = values
    records = [{"seed": seed, "method": "fp32", "ratio": 1.0, "auc": outcome.record["auc"]}]
    checkpoint = folder / f"fp32-{seed}.safetensors"
    save_file({f"embedding_bags.{name}.weight": values for name, values in rows.items()}, checkpoint)

    def record(method: str, asked: float, packed: PackedEmbeddingBagCollection, seconds: float) -> None:
        model.embedding_bag_collection = packed
        report = packed.size_report()
        auc = evaluate(model, job.data, "test", job.run.device)["auc"]
        records.append(
            {"seed": seed, "method": method, "asked": asked, "auc": auc, "bytes": report.total, "seconds": seconds}
            | {"ratio": report.compression_ratio}
        )

    for ratio in RATIOS:
        started = time.perf_counter()
        (packed,) = convert_checkpoint(checkpoint, counts=counts, ratio=ratio).collections()
        names = {table.name: table for table in packed.embedding_bag_configs()}
        ordered = [names[table.name] for table in tables]
        for config, table in zip(ordered, tables, strict=True):
            config.feature_names = table.feature_names
        by_error = PackedEmbeddingBagCollection(ordered, packed.packed_tables())
        record("error", ratio, by_error, time.perf_counter() - started)
        size = by_error.size_report().total - _SCALES * (len(tables) - 1)
        try:
            plan = precision_from_frequencies(counts, tables, bytes=size)
        except ValueError:
            continue  # the rule has 6 bits at most
        started = time.perf_counter()
        record("rule", ratio, by_rule(plan, tables, rows, counts), time.perf_counter() - started)
    return records


def by_rule(
    plan: PrecisionPlan, tables: Sequence[EmbeddingBagConfig], rows: Mapping[str, Tensor], counts: Mapping[str, Tensor]
) -> PackedEmbeddingBagCollection:
    """Rows packed at a plan's widths, each table's scales from a grid search of the weighted squared error."""
    packed = []
    for table in tables:
        name = table.name
        values, weights, bits = rows[name], counts[name].double(), plan.tables[name].of_rows()
        center, zero_row = (_mean(values, weights, chosen) for chosen in (bits > 0, bits == 0))
        spread = float((weights @ (values - center).double().square().sum(1) / weights.sum() / values.shape[1]).sqrt())
        best: tuple[float, Tensor, Tensor] | None = None
        for shift in (0.0, 0.03, 0.08, 0.2, 0.4, 0.8):
            beta, alpha, total = center + shift * spread, torch.zeros(9), 0.0
            for b in (int(b) for b in bits.unique() if b):
                chosen = bits == b
                error, alpha[b] = min(
                    (_error(values[chosen], weights[chosen], b, step, beta), step)
                    for step in (spread * torch.logspace(-2.5, 0.6, 60)).tolist()
                )
                total += error
            if best is None or total < best[0]:
                best = total, alpha, beta
        assert best is not None
        read = partial(lambda values, start, stop: values[start:stop], values)
        packed.append(TableToPack(name, plan.tables[name], read, best[1], best[2], zero_row))
    return PackedEmbeddingBagCollection(list(tables), pack_tables(packed))


def _mean(values: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    total = float(weights[chosen].sum())
    return (weights[chosen] @ values[chosen].double() / total).float() if total else torch.zeros(values.shape[1])


def _error(values: Tensor, weights: Tensor, bits: int, step: float, beta: Tensor) -> float:
    of_rows = torch.full((len(values),), bits, dtype=torch.uint8)
    quantized = quantized_rows(values, of_rows, torch.full((9,), step), beta, None)
    return float(weights @ (values - quantized).double().square().sum(1))


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds, in Markdown."""
    fp32 = {r["seed"]: r["auc"] for r in records if r["method"] == "fp32"}
    lines = ["| widths by | asked | AUC | vs fp32 | ratio | bytes | s |", "|---|---|---|---|---|---|---|"]
    lines.append(f"| fp32 | | {statistics.fmean(fp32.values()):.4f} | | 1.0x | | |")
    for ratio in RATIOS:
        for method in ("error", "rule"):
            rows = [r for r in records if r["method"] == method and r["asked"] == ratio]
            if not rows:
                lines.append(f"| {method} | {ratio:g}x | out of reach | | | | |")
                continue
            gaps = [r["auc"] - fp32[r["seed"]] for r in rows]
            error = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.4f}" if len(gaps) > 1 else ""
            auc, reached, size, seconds = (
                statistics.fmean(r[k] for r in rows) for k in ("auc", "ratio", "bytes", "seconds")
            )
            lines.append(
                f"| {method} | {ratio:g}x | {auc:.4f} | {statistics.fmean(gaps):+.4f}{error} | {reached:.1f}x | "
                f"{size:,.0f} | {seconds:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--resets", type=int, default=0, help="of the rows while training fp32 (default: 0)")
    options = parser.parse_args()
    one_quiet_thread()
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = prepare_splits(options, Path(temporary))
        for seed, folder in enumerate(tqdm(folders, desc="seeds", unit="seed")):
            settings = Settings(seed=seed, resets=options.resets)
            job = Job(Method.parse("fp32"), PreparedDataset.open(folder), settings)
            records += run_seed(job, Path(temporary))
    write_records(options.json, records)
    print(table(records))


if __name__ == "__main__":
    main()
