"""A server's latency, requests a second and memory: fp32, FBGEMM's INT8 and INT4, and packed rows.

    python benchmarks/serve.py            # 4 minutes, 6 GB of memory: 26 tables of 200,000 rows, D=64
    python benchmarks/serve.py --quick    # within 2 minutes: 20,000 rows, fewer and shorter turns

Each variant is examples/serve in a process of its own with two model threads, all four running at once; packed rows
have the widths "mixA" of lookup.py (1.36 bits on average) and are memory-mapped. This process is the client: a few
connections, each sending its next request when the last is answered. Ids are Zipf (1.05), ten a bag. The servers are
driven in turns, for a few seconds each, so that a slow moment of the machine hits them alike.

Batch 1 and 64 are sent as JSON; batch 64 and 2048 in the binary form, for at 2048 parsing JSON would take longer than
the model. p50, p99 and requests a second are over all turns. "CPU" is what the server's process used for a request.
"model" is the mean time of the model alone, from the server's metrics, of a batch of as many examples as stand beside
it: requests that wait are joined, and "packed, not joined" shows what that is worth. A ratio is the median over the
turns of the best rival's p99 over packed's: above 1, packed is faster.

Memory is of the server process after the load, from smaps_rollup: RSS, and PSS, which divides shared pages among the
processes that share them. "no tables" is a server with one row a table: Python, torch and FBGEMM.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lookup import TABLES, draw_ids
from measure import versions, write_json
from serving_variants import NUM_DENSE, SHARE, VARIANTS, write_artifact
from tqdm import tqdm

from torchrec_mpe.files.text_table import text_table

LENGTH = 10
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""Of all servers. glibc keeps freed memory: else large batches get new pages from the system for every output."""

RIVALS = tuple(variant for variant in VARIANTS if variant != "packed")
ALONE, EMPTY = "packed, not joined", "no tables"
Record = dict[str, Any]
Memory = Mapping[str, dict[str, int]]


@dataclass(frozen=True)
class Cell:
    """Examples of a request, its form, and how many are on their way at a time."""

    batch: int
    form: str
    connections: int

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {self.form}, {self.connections} at a time"


BUSY = Cell(1, "JSON", 16)
CELLS = (Cell(1, "JSON", 4), Cell(64, "JSON", 4), Cell(64, "binary", 4), Cell(2048, "binary", 2))


class Server:
    """A process that becomes, or is, a running variant."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    @cached_property
    def port(self) -> int:
        """Where it serves; waits until it does."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("serving on "):
            raise RuntimeError(f"the server {self._process.args!r} ended before it served")
        return int(line.rsplit(":", 1)[1])

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {text}")
        return text

    def so_far(self) -> tuple[float, float, float, float]:
        """Seconds in the model, its batches and examples, and CPU seconds of the process."""
        lines = dict(line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if not line.startswith("#"))
        model = ("serve_model_seconds_sum", "serve_model_seconds_count", "serve_model_examples_sum")
        seconds, batches, examples, cpu = (float(lines[name]) for name in (*model, "process_cpu_seconds_total"))
        return seconds, batches, examples, cpu

    def memory(self) -> dict[str, int]:
        """Bytes of the process: rss, pss, and anonymous pages; waits until it serves."""
        assert self.port
        fields = {}
        for line in Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            fields[name] = int(rest.split()[0]) << 10
        return {"rss": fields["Rss"], "pss": fields["Pss"], "anonymous": fields["Anonymous"]}


@contextmanager
def running(*arguments: str) -> Iterator[Server]:
    """A server in a process of its own, ended at the end."""
    command = [sys.executable, str(Path(__file__).with_name("serving_variants.py")), *arguments]
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield Server(process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def bodies(cell: Cell, rows: int) -> list[bytes]:
    """A few different requests."""
    generator = torch.Generator().manual_seed(cell.batch)
    made: list[bytes] = []
    for _ in range(64 if cell.batch == 1 else 8):
        dense = torch.rand(cell.batch, NUM_DENSE, generator=generator)
        ids = draw_ids(rows, "zipf", TABLES * cell.batch * LENGTH, generator)
        if cell.form == "JSON":
            bags = ids.view(TABLES, cell.batch, LENGTH).tolist()
            sparse = {f"f{t}": bag for t, bag in enumerate(bags)}
            made.append(json.dumps({"dense": dense.tolist(), "sparse": sparse}).encode())
        else:
            lengths = torch.full((TABLES, cell.batch), LENGTH, dtype=torch.int32)
            features = json.dumps([f"f{t}" for t in range(TABLES)])
            tensors = {"dense": dense, "values": ids, "lengths": lengths}
            made.append(safetensors.torch.save(tensors, {"features": features}))
    return made


def drive(port: int, cell: Cell, requests: Sequence[bytes], seconds: float) -> tuple[list[float], float]:
    """Seconds of each request of a turn, and of the turn; raises RuntimeError if one is not answered with 200."""
    latencies: list[list[float]] = [[] for _ in range(cell.connections)]
    problems: list[str] = []
    headers = {"content-type": "application/json" if cell.form == "JSON" else "application/octet-stream"}
    stop = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            k = number
            while time.perf_counter() < stop:
                begin = time.perf_counter()
                connection.request("POST", "/predict", requests[k % len(requests)], headers)
                answer = connection.getresponse()
                body = answer.read()
                latencies[number].append(time.perf_counter() - begin)
                if answer.status != 200:
                    problems.append(f"{answer.status} {body[:200]!r}")
                    return
                k += cell.connections
        except OSError as error:
            problems.append(repr(error))
        finally:
            connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(cell.connections)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise RuntimeError(f"{cell.name}: {problems[0]}")
    return [latency for each in latencies for latency in each], time.perf_counter() - begin


def percentile(latencies: Sequence[float], percent: float) -> float:
    """The smallest latency that at least so many percent do not exceed."""
    ordered = sorted(latencies)
    return ordered[max(0, -(-len(ordered) * percent // 100).__trunc__() - 1)]


def measure(cell: Cell, servers: Mapping[str, Server], rows: int, rounds: int, seconds: float) -> list[Record]:
    """A record for each server."""
    requests = bodies(cell, rows)
    latencies: dict[str, list[list[float]]] = {name: [] for name in servers}
    elapsed, model = dict.fromkeys(servers, 0.0), {name: [0.0] * 4 for name in servers}
    for server in servers.values():
        drive(server.port, cell, requests, min(1.0, seconds))
    names = list(servers)
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            before = servers[name].so_far()
            turn, took = drive(servers[name].port, cell, requests, seconds)
            after = servers[name].so_far()
            latencies[name].append(turn)
            elapsed[name] += took
            model[name] = [m + a - b for m, a, b in zip(model[name], after, before, strict=True)]
    records: list[Record] = []
    for name in servers:
        every = [latency for turn in latencies[name] for latency in turn]
        in_model, batches, examples, cpu = model[name]
        records.append(
            {
                "case": cell.name,
                "variant": name,
                "rows": rows,
                "connections": cell.connections,
                "requests": len(every),
                "p50_ms": percentile(every, 50) * 1e3,
                "p99_ms": percentile(every, 99) * 1e3,
                "requests_per_second": len(every) / elapsed[name],
                "cpu_ms": cpu / len(every) * 1e3,
                "model_ms": in_model / batches * 1e3,
                "examples_per_model_call": examples / batches,
                "ratio": None,
                "goal": None,
            }
        )
    by_name = {record["variant"]: record for record in records}
    rival = min(RIVALS, key=lambda name: by_name[name]["p99_ms"])
    turns = zip(latencies[rival], latencies["packed"], strict=True)
    packed = by_name["packed"]
    packed["ratio"] = statistics.median(percentile(theirs, 99) / percentile(ours, 99) for theirs, ours in turns)
    packed["rival"], packed["goal"] = rival, 1.0
    return records


def memory_records(started: Memory, loaded: Memory, rows: int) -> Iterator[Record]:
    """A record for each server: bytes after the start and after the load."""
    rival = min(RIVALS, key=lambda name: loaded[name]["rss"])
    for name in loaded:
        record: Record = {"case": "memory", "variant": name, "rows": rows, "ratio": None, "goal": None}
        record |= {f"{kind}_at_start": size for kind, size in started[name].items()} | loaded[name]
        if name == "packed":
            record |= {"rival": rival, "ratio": loaded[rival]["rss"] / loaded[name]["rss"], "goal": 1.0}
        yield record


def show(records: Sequence[Record]) -> None:
    """Print the tables and what became of the goals."""
    head = ["", "variant", "p50 ms", "p99 ms", "requests/s", "CPU ms", "model ms", "examples"]
    lines = [head]
    for r in records:
        if "p50_ms" in r:
            keys = ("p50_ms", "p99_ms", "requests_per_second", "cpu_ms", "model_ms", "examples_per_model_call")
            lines.append([r["case"], r["variant"], *(f"{r[key]:.2f}" for key in keys)])
    print(text_table(lines), end="\n\n")
    lines = [["memory, MB", "RSS at start", "RSS", "PSS", "anonymous"]]
    for r in records:
        if r["case"] == "memory":
            sizes = [r[k] / 1e6 for k in ("rss_at_start", "rss", "pss", "anonymous")]
            lines.append([r["variant"], *(f"{size:,.0f}" for size in sizes)])
    print(text_table(lines), end="\n\n")
    for r in records:
        if r["goal"] is not None:
            what = "RSS" if r["case"] == "memory" else "p99"
            verdict = "reached" if r["ratio"] >= r["goal"] else "missed"
            print(f"{r['case']}: {what} of {r['rival']} / packed {r['ratio']:.2f}, goal {r['goal']:.2f}: {verdict}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 rows a table, fewer and shorter turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    rows, rounds, seconds = (20_000, 2, 0.7) if options.quick else (200_000, 5, 1.5)
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"packed rows: {SHARE}; {rows:,} rows a table")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        artifact = Path(folder) / "artifact"
        write_artifact(artifact, rows)
        packed = ["packed", "--artifact", str(artifact)]
        servers = {v: stack.enter_context(running(v, "--rows", str(rows))) for v in RIVALS}
        servers["packed"] = stack.enter_context(running(*packed))
        started = {name: server.memory() for name, server in servers.items()}
        records: list[Record] = []
        with running(*packed, "--max-joined", "1") as alone:
            records += measure(BUSY, {**servers, ALONE: alone}, rows, rounds, seconds)
        for cell in tqdm(CELLS, "cells"):
            records += measure(cell, servers, rows, rounds, seconds)
        loaded = {name: server.memory() for name, server in servers.items()}
        with running("fp32", "--rows", "1") as empty:
            started[EMPTY] = loaded[EMPTY] = empty.memory()
        records += memory_records(started, loaded, rows)
    if options.json:
        write_json(options.json, records)
    show(records)


if __name__ == "__main__":
    main()
