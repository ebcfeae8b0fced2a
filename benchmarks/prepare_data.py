"""How fast and with how much memory a log in Criteo's format is prepared, and what 46 million rows would take.

    python benchmarks/prepare_data.py             # 5 million rows, and a quarter and a half of them
    python benchmarks/prepare_data.py --quick     # 200,000 rows

The log is made up. Its fields have as many different ids in 46 million rows as those of Criteo's Kaggle log (33.8
million together), drawn so that the number of ids seen grows with the rows as in a real log: id i with probability
proportional to log(1 + 1/i), close to Zipf's law.

Every size is prepared in a process of its own, whose peak resident memory and wall time are reported. To extrapolate,
the number of different ids is fitted as a power of the rows, and memory and time as a straight line in that number and
in the rows, respectively, each on the two largest sizes.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchrec_mpe.app.hardware import cpu_name

FULL_ROWS = 46_000_000
BLOCK_ROWS = 100_000
# Different values of C1..C26 in Criteo's Kaggle log, and which of C1..C26 and I1..I13 are often missing there.
CATEGORY_IDS = (
    *(1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5683, 8_351_593, 3194),
    *(27, 14_992, 5_461_306, 10, 5652, 2173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
CATEGORY_MISSING = {19: 0.44, 20: 0.44, 22: 0.76, 25: 0.44, 26: 0.44}
NUMBER_MEDIANS = (1, 3, 6, 4, 4000, 40, 4, 8, 40, 1, 2, 1, 4)
NUMBER_MISSING = {1: 0.45, 3: 0.21, 4: 0.22, 6: 0.22, 10: 0.45, 12: 0.76}


def _possible_ids(seen: int) -> float:
    """How many ids to draw from, so that ``seen`` different ones are expected in ``FULL_ROWS`` rows."""
    import numpy as np

    if seen < 200_000:
        return float(seen)

    def expected(possible: float) -> float:
        edges = np.geomspace(1.0, possible, 20_000)  # the sum over ids as an integral
        middle = np.sqrt(edges[1:] * edges[:-1])
        chance = np.log1p(1 / middle) / math.log(possible + 1)
        return float(np.sum(np.diff(edges) * -np.expm1(-FULL_ROWS * chance)))

    low, high = float(seen), float(seen) * 100
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if expected(middle) < seen else (low, middle)
    return high


def generate(path: Path, rows: int) -> None:
    """Write ``rows`` rows, the same at every run."""
    import numpy as np
    import polars as pl
    import pyarrow as pa

    random = np.random.Generator(np.random.Philox(1))
    possible = [_possible_ids(seen) for seen in CATEGORY_IDS]

    def hexadecimal(ids: Any, field: int) -> pl.Series:
        scrambled = ((ids * 2654435761 + field * 40503) & 0xFFFFFFFF).astype(">u4")
        digits = scrambled.tobytes().hex().encode()
        offsets = np.arange(0, 8 * ids.size + 1, 8, dtype=np.int32)
        return pl.Series(pa.StringArray.from_buffers(ids.size, pa.py_buffer(offsets), pa.py_buffer(digits)))

    def missing(values: pl.Series, share: float) -> pl.Series:
        return values.zip_with(pl.Series(random.random(values.len()) >= share), values.clear(values.len()))

    with path.open("wb") as file:
        for start in range(0, rows, BLOCK_ROWS):
            count = min(BLOCK_ROWS, rows - start)
            columns = {"label": pl.Series(random.random(count) < 0.26).cast(pl.Int8)}
            for index, median in enumerate(NUMBER_MEDIANS, start=1):
                numbers = np.exp(random.standard_normal(count) * 1.8) * (median + 0.5) - (1 if index == 2 else 0)
                column = pl.Series(numbers.astype(np.int64))
                columns[f"I{index}"] = missing(column, NUMBER_MISSING.get(index, 0.02))
            for index, ids in enumerate(possible, start=1):
                drawn = np.exp(random.random(count) * math.log(ids + 1)).astype(np.uint64)
                columns[f"C{index}"] = missing(hexadecimal(drawn, index), CATEGORY_MISSING.get(index, 0.0))
            frame = pl.DataFrame(columns)
            file.write(frame.write_csv(separator="\t", include_header=False, quote_style="never").encode())


def measure(path: Path, out: Path) -> dict[str, float]:
    """Prepare the log in this process, which must be a fresh one."""
    from torchrec_mpe.app.data.log import criteo_log
    from torchrec_mpe.app.data.prepare_log import prepare_log

    unit = 1 if sys.platform == "darwin" else 1024
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    begin = time.perf_counter()
    dataset = prepare_log(criteo_log(path), out, progress=False)
    seconds = time.perf_counter() - begin
    return {
        "rows": dataset.manifest["source"]["rows"],
        "text_bytes": path.stat().st_size,
        "prepared_bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "values": dataset.manifest["source"]["values"],
        "seconds": seconds,
        "base_bytes": base,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def _in_fresh_process(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def extrapolate(small: dict[str, float], large: dict[str, float], rows: int) -> dict[str, float]:
    """Values, memory and time at ``rows`` rows from the results at two sizes."""
    power = math.log(large["values"] / small["values"]) / math.log(large["rows"] / small["rows"])
    values = large["values"] * (rows / large["rows"]) ** power
    bytes_a_value = (large["peak_bytes"] - small["peak_bytes"]) / (large["values"] - small["values"])
    seconds_a_row = (large["seconds"] - small["seconds"]) / (large["rows"] - small["rows"])
    return {
        "rows": rows,
        "values": values,
        "values_power": power,
        "bytes_a_value": bytes_a_value,
        "peak_bytes": large["peak_bytes"] + bytes_a_value * (values - large["values"]),
        "seconds": large["seconds"] + seconds_a_row * (rows - large["rows"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000, help="rows of the largest log (default: 5 million)")
    parser.add_argument("--quick", action="store_true", help="200,000 rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--folder", type=Path, help="where to put the logs, about 700 bytes a row (default: /tmp)")
    options = parser.parse_args()
    rows = 200_000 if options.quick else options.rows

    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for size in (rows // 4, rows // 2, rows):
            path, out = Path(folder) / f"{size}.tsv", Path(folder) / f"{size}"
            _in_fresh_process(generate, path, size)
            results.append(_in_fresh_process(measure, path, out))
            path.unlink()
    whole = extrapolate(results[-2], results[-1], FULL_ROWS)

    packages = {name: version(name) for name in ("polars", "pyarrow", "numpy", "torch")}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(), **packages}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'rows':>12} {'values':>12} {'text GB':>8} {'seconds':>8} {'rows/s':>9} {'peak GB':>8}")
    for row in results:
        print(
            f"{row['rows']:12,} {row['values']:12,} {row['text_bytes'] / 1e9:8.2f} {row['seconds']:8.1f} "
            f"{row['rows'] / row['seconds']:9,.0f} {row['peak_bytes'] / 1e9:8.2f}"
        )
    print(
        f"{whole['rows']:12,} {whole['values']:12,.0f} {'':8} {whole['seconds']:8.0f} "
        f"{whole['rows'] / whole['seconds']:9,.0f} {whole['peak_bytes'] / 1e9:8.2f}  extrapolated: values as rows^"
        f"{whole['values_power']:.2f}, {whole['bytes_a_value']:.0f} bytes a value"
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "measured": results, "extrapolated": whole}, indent=2))


if __name__ == "__main__":
    main()
