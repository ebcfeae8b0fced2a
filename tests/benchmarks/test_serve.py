"""The arithmetic and the tables of the serving benchmark, with servers that answer at once."""

import http.server
import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import safetensors.torch

pytest.importorskip("fastapi", reason="pip install torchrec-mpe[serve]")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve.py"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    path, modules = list(sys.path), set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("serve_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_benchmark", module)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    local = (str(SCRIPT.parent), str(SCRIPT.parents[1] / "examples"))
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(local):
            del sys.modules[name]


class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status = 200

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Answers.status = 200
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server.server_address[1]
        server.shutdown()


def test_percentile(serve: ModuleType) -> None:
    values = [float(k) for k in range(100, 0, -1)]
    assert [serve.percentile(values, p) for p in (50, 99, 100)] == [50.0, 99.0, 100.0]
    assert serve.percentile([3.0], 99) == serve.percentile([3.0], 50) == 3.0
    assert serve.percentile([1.0, 2.0, 3.0], 50) == 2.0


def test_requests_are_what_the_server_takes(serve: ModuleType) -> None:
    sys.path.insert(0, str(SCRIPT.parents[1] / "examples" / "serve"))
    from batch import Inputs, batch_of_json, batch_of_safetensors

    inputs = Inputs(serve.NUM_DENSE, {f"f{t}": 50 for t in range(serve.TABLES)}, False, 4096)
    for form, parse in (("JSON", batch_of_json), ("binary", batch_of_safetensors)):
        for body in serve.bodies(serve.Cell(3, form, 1), 50):
            batch = parse(body, inputs)
            assert batch.lengths.tolist() == [[serve.LENGTH] * 3] * serve.TABLES
    binary = safetensors.torch.load(serve.bodies(serve.Cell(3, "binary", 1), 50)[0])
    assert binary["values"].unique().numel() > 10


def test_every_answer_is_timed_and_a_failure_ends_it(serve: ModuleType, port: int) -> None:
    latencies, elapsed = serve.drive(port, serve.Cell(1, "JSON", 3), [b"{}"], 0.2)
    assert len(latencies) > 3 and 0 < sum(latencies) <= 3 * elapsed and 0.2 <= elapsed < 5
    Answers.status = 422
    with pytest.raises(RuntimeError, match="batch 1, JSON, 3 at a time: 422"):
        serve.drive(port, serve.Cell(1, "JSON", 3), [b"{}"], 0.2)


def test_records_and_tables(
    serve: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed answers in 2 ms, int4 in 3, the others in 5; each model call has 4 of the server's 10 CPU ms a request."""
    ms = {"fp32": 5.0, "int8": 5.0, "int4": 3.0, "packed": 2.0}
    count = dict.fromkeys(ms, 0)

    def drive(port: str, *_: object) -> tuple[list[float], float]:
        count[port] += 100
        return [ms[port] / 1e3] * 99 + [2 * ms[port] / 1e3], 0.5

    def so_far(name: str) -> tuple[float, float, float, float]:
        return count[name] * 0.004, count[name], count[name] * 7.0, count[name] * 0.010

    monkeypatch.setattr(serve, "drive", drive)
    servers = {name: SimpleNamespace(port=name, so_far=lambda name=name: so_far(name)) for name in ms}
    records = serve.measure(serve.CELLS[0], servers, 1000, rounds=3, seconds=1.0)
    by_name = {record["variant"]: record for record in records}
    packed = by_name["packed"]
    assert packed["ratio"] == pytest.approx(1.5) and packed["rival"] == "int4" and by_name["int4"]["ratio"] is None
    expected = {"p50_ms": 2, "p99_ms": 2, "requests": 300, "requests_per_second": 200, "cpu_ms": 10, "model_ms": 4}
    assert {key: packed[key] for key in expected} == pytest.approx(expected)
    assert packed["examples_per_model_call"] == pytest.approx(7)

    sizes = {name: {"rss": 100 * k, "pss": 90 * k, "anonymous": 80 * k} for k, name in enumerate(reversed(ms), 1)}
    memory = list(serve.memory_records(sizes, sizes, 1000))
    assert [record["ratio"] for record in memory if record["variant"] == "packed"] == [2.0]
    assert json.dumps([*records, *memory])
    serve.show([*records, *memory])
    shown = capsys.readouterr().out
    assert "p99 of int4 / packed 1.50, goal 1.00: reached" in shown
    assert "memory: RSS of int4 / packed 2.00, goal 1.00: reached" in shown
