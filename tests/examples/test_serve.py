"""examples/serve: two servers in processes of their own, one of them with /reload and /update."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.threads import wait_for
from torchrec_mpe.inference.delta import save_delta
from torchrec_mpe.packing.bit_widths import TableBitWidths

pytest.importorskip("fastapi", reason="pip install torchrec-mpe[serve]")

_FOLDER = Path(__file__).parents[2] / "examples" / "serve"
_ROWS = {"user": 100, "item": 50, "shop": 7}
_ADMIN = ["--admin", "--header-timeout", "3", "--body-timeout", "3"]
_JSON, _BINARY = "application/json", "application/octet-stream"


def _network(rows: dict[str, int]) -> DLRM:
    tables = [
        EmbeddingBagConfig(name=f"t_{f}", num_embeddings=n, embedding_dim=8, feature_names=[f]) for f, n in rows.items()
    ]
    return DLRM(EmbeddingBagCollection(tables), 3, [16, 8], [16, 1])


def _write(folder: Path, rows: dict[str, int], seed: int, bias: float = 0.0) -> None:
    """A packed model with rows of 8, 3 and 0 bits; ``bias`` is added to the last layer's."""
    torch.manual_seed(seed)
    model = _network(rows)
    widths = {f"t_{f}": TableBitWidths(n, 8, (0, n // 2, n - 2, n), (8, 3, 0), None) for f, n in rows.items()}
    mpe.prepare_retrain_(model, mpe.PrecisionPlan(widths, tuple(range(9))))
    with torch.no_grad():
        for parameter in model.sparse_arch.parameters():
            parameter += 0.5 * torch.randn(parameter.shape)
        list(model.over_arch.parameters())[-1].add_(bias)
    mpe.save(mpe.emit_inference_model(model), folder)


class _Server:
    """A server of an artifact, until the end of the block."""

    def __init__(self, artifact: Path, *options: str) -> None:
        layers = ["--num-dense", "3", "--dense-arch", "16,8", "--over-arch", "16,1", "--port", "0"]
        limits = ["--max-batch", "20", "--max-body", "50000"]
        command = [sys.executable, str(_FOLDER / "server.py"), str(artifact), *layers, *limits, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def __enter__(self) -> "_Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def listen(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), line
        self.port = int(line.rsplit(":", 1)[1])

    def ask(self, method: str, path: str, body: Any = None, content_type: str = _JSON) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"content-type": content_type} if body is not None else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def predict(self, dense: Tensor, sparse: dict[str, list[list[int]]]) -> Tensor:
        status, body = self.ask("POST", "/predict", json.dumps({"dense": dense.tolist(), "sparse": sparse}))
        assert status == 200, body
        return torch.tensor(json.loads(body)["predictions"])

    def metrics(self) -> dict[str, float]:
        status, body = self.ask("GET", "/metrics")
        assert status == 200
        lines = [line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    _write(folder / "first", _ROWS, 0)
    _write(folder / "grown", {**_ROWS, "item": 60}, 1)
    _write(folder / "shrunk", {**_ROWS, "item": 40}, 2)
    _write(folder / "other", {"user": 100, "item": 50}, 3)
    _write(folder / "infinite", {**_ROWS, "item": 60}, 4, bias=float("inf"))
    shutil.copytree(folder / "first", folder / "damaged")
    (dense,) = (file for file in (folder / "damaged").glob("*.safetensors") if b"over_arch" in file.read_bytes()[:5000])
    damaged = bytearray(dense.read_bytes())
    damaged[-1] ^= 1
    dense.write_bytes(damaged)
    (folder / "link").symlink_to(folder / "first")
    return folder


@pytest.fixture(scope="module")
def servers(artifacts: Path) -> Iterator[SimpleNamespace]:
    with _Server(artifacts / "first") as plain, _Server(artifacts / "link", *_ADMIN) as admin:
        # Three at a time, for starting is what takes time.
        command = [sys.executable, str(_FOLDER / "server.py"), str(artifacts / "none"), "--port", "0"]
        wrong = subprocess.run(command, capture_output=True, text=True, timeout=100)
        plain.listen()
        admin.listen()
        yield SimpleNamespace(plain=plain, admin=admin, wrong=wrong)


@pytest.fixture
def server(servers: SimpleNamespace) -> _Server:
    return servers.plain


@pytest.fixture(scope="module")
def model(artifacts: Path) -> DLRM:
    return mpe.load(artifacts / "first", _network(_ROWS))


def _kjt(sparse: dict[str, list[list[int]]]) -> KeyedJaggedTensor:
    bags = [bag for feature in sparse.values() for bag in feature]
    ids = torch.tensor([i for bag in bags for i in bag], dtype=torch.int64)
    return KeyedJaggedTensor.from_lengths_sync(list(sparse), ids, torch.tensor([len(bag) for bag in bags]))


def _answer(model: DLRM, dense: Tensor, sparse: dict[str, list[list[int]]]) -> Tensor:
    with torch.no_grad():
        return torch.sigmoid(model(dense, _kjt(sparse)).flatten())


def _examples(batch: int, seed: int = 0) -> tuple[Tensor, dict[str, list[list[int]]]]:
    """Bags of none to three ids, the last row of each table among them."""
    generator = torch.Generator().manual_seed(seed)

    def bag(rows: int) -> list[int]:
        length = int(torch.randint(4, (), generator=generator))
        return torch.randint(rows, (length,), generator=generator).tolist()

    sparse = {feature: [bag(rows) for _ in range(batch)] for feature, rows in _ROWS.items()}
    for feature, rows in _ROWS.items():
        sparse[feature][0] = [rows - 1, 0]
    return torch.randn(batch, 3, generator=generator), sparse


def _binary(dense: Tensor, sparse: dict[str, list[list[int]]], **replaced: Any) -> bytes:
    kjt = _kjt(sparse)
    lengths = kjt.lengths().view(len(sparse), -1).int()
    tensors = {"dense": dense, "values": kjt.values().int(), "lengths": lengths, **replaced}
    features = tensors.pop("features", json.dumps(list(sparse)))
    return safetensors.torch.save(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        None if features is None else {"features": features},
    )


@pytest.mark.supports("HTTP server: predictions", "CPU")
def test_json_equals_the_model(server: _Server, model: DLRM) -> None:
    dense, sparse = _examples(5)
    torch.testing.assert_close(server.predict(dense, sparse), _answer(model, dense, sparse), rtol=1e-6, atol=1e-6)
    # Features come in any order, and rows beyond the first change the answer: the ids do reach the tables.
    shuffled = dict(reversed(sparse.items()))
    assert torch.equal(server.predict(dense, shuffled), server.predict(dense, sparse))
    assert not torch.equal(server.predict(dense, {**sparse, "item": [[3]] * 5}), server.predict(dense, sparse))


@pytest.mark.supports("HTTP server: predictions", "CPU")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_binary_equals_the_model(server: _Server, model: DLRM, dtype: torch.dtype) -> None:
    dense, sparse = _examples(20)
    sparse = dict(reversed(sparse.items()))
    body = _binary(dense, sparse, values=_kjt(sparse).values().to(dtype))
    status, answer = server.ask("POST", "/predict", body, _BINARY)
    assert status == 200, answer
    predictions = safetensors.torch.load(answer)["predictions"]
    torch.testing.assert_close(predictions, _answer(model, dense, sparse), rtol=1e-6, atol=1e-6)


def test_requests_at_the_same_time(server: _Server, model: DLRM) -> None:
    requests = [_examples(1 + k % 7, seed=k) for k in range(48)]
    before = server.metrics()

    def in_turns(k: int) -> Tensor:
        if k % 2:
            return server.predict(*requests[k])
        return safetensors.torch.load(server.ask("POST", "/predict", _binary(*requests[k]), _BINARY)[1])["predictions"]

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(in_turns, range(len(requests))))
    for request, answer in zip(requests, answers, strict=True):
        torch.testing.assert_close(answer, _answer(model, *request), rtol=1e-5, atol=1e-6)
    after = server.metrics()
    assert after["serve_model_examples_sum"] - before["serve_model_examples_sum"] == sum(len(d) for d, _ in requests)


_DENSE, _SPARSE = _examples(2)
_VALUES = _kjt(_SPARSE).values()


def _with(**parts: Any) -> str:
    return json.dumps({"dense": _DENSE.tolist(), "sparse": _SPARSE, **parts})


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ("{", 400, "the body is no JSON: "),
        ("[]", 422, "the body: "),
        (_with(dense=[[0.0, 1.0, "x"], [0, 0, 0]]), 422, "dense[0][2]: Input should be a valid number"),
        (_with(dense=[[0.0, 1.0], [0, 0, 0]]), 422, "dense[0] has 2 features, the model takes 3"),
        (_with(dense=[]), 422, "the request has no examples"),
        (_with(dense=[[0.0, 1.0, float("nan")], [0, 0, 0]]), 422, "dense[0][2]: Input should be a finite number"),
        (_with(dense=[[0.0, 1.0, 1e39], [0, 0, 0]]), 422, "dense must be finite numbers of float32"),
        (_with(extra=1), 422, "extra: Extra inputs are not permitted"),
        (_with(sparse={**_SPARSE, "shop": [[0], [1.0]]}), 422, "sparse.shop[1][0]: Input should be a valid integer"),
        (_with(sparse={**_SPARSE, "shop": [[0], [True]]}), 422, "sparse.shop[1][0]: Input should be a valid integer"),
        (_with(sparse={**_SPARSE, "shop": [[0], [1 << 70]]}), 422, "sparse.shop[1][0]: "),
        (
            _with(sparse={**_SPARSE, "town": [[0], []]}),
            422,
            "feature town is unknown, the model takes user, item",
        ),
        (_with(sparse={"user": [[], []], "item": [[], []]}), 422, "feature shop is missing"),
        (_with(sparse={**_SPARSE, "item": [[0]]}), 422, "feature item has 1 lists of ids, dense has 2 examples"),
        (
            _with(sparse={**_SPARSE, "item": [[0], [1, 50]]}),
            422,
            "feature item: id 50 of example 1 is no row of its table, ids are 0 to 49",
        ),
        (_with(sparse={**_SPARSE, "shop": [[-1], []]}), 422, "feature shop: id -1 of example 0 is no row"),
        (_with(weights={f: [[1.0] * len(b) for b in bags] for f, bags in _SPARSE.items()}), 422, "the model takes no"),
        (_with(weights={}), 422, "feature user: weights must be 2 lists with a weight for each id"),
        (_with(dense=[[0.0] * 3] * 21), 413, "the request has 21 examples, 20 are allowed"),
    ],
)
def test_json_that_is_refused(server: _Server, body: str, status: int, reason: str) -> None:
    answer = server.ask("POST", "/predict", body)
    assert answer[0] == status and json.loads(answer[1])["detail"].startswith(reason), answer


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"no safetensors", 400, "the body is no safetensors file: "),
        (_binary(_DENSE, _SPARSE, features=None), 422, "the metadata's features must be a JSON list of names"),
        (_binary(_DENSE, _SPARSE, features="user"), 422, "the metadata's features must be a JSON list of names"),
        (_binary(_DENSE, _SPARSE, features='["user", "item", "town"]'), 422, "feature town is unknown"),
        (
            _binary(_DENSE, _SPARSE, features='["user", "item", "shop", "shop"]'),
            422,
            "the metadata's features name",
        ),
        (
            _binary(_DENSE, _SPARSE, more=_DENSE + 1),
            422,
            "the tensors must be dense, values, lengths and perhaps weights",
        ),
        (_binary(_DENSE, _SPARSE, values=None), 422, "the tensors must be dense, values, lengths and perhaps weights"),
        (_binary(_DENSE.double(), _SPARSE), 422, "dense must be float32 [B, 3], not float64 [2, 3]"),
        (_binary(_DENSE[:, :2].contiguous(), _SPARSE), 422, "dense must be float32 [B, 3], not float32 [2, 2]"),
        (_binary(_DENSE / 0, _SPARSE), 422, "dense must be finite numbers"),
        (_binary(_DENSE, _SPARSE, values=_VALUES.float()), 422, "values must be int32 or int64 [N], not float32"),
        (_binary(_DENSE, _SPARSE, values=_VALUES[:-1]), 422, "lengths add up to"),
        (_binary(_DENSE, _SPARSE, lengths=torch.tensor([[1, 2]] * 2)), 422, "lengths must be int32 or int64 [3, 2]"),
        (
            _binary(_DENSE, _SPARSE, lengths=torch.tensor([[1 << 62, 1 << 62]] * 3)),
            422,
            "lengths must be between 0 and",
        ),
        (_binary(_DENSE, _SPARSE, lengths=torch.tensor([[-1, 2]] * 3)), 422, "lengths must be between 0 and"),
        (_binary(_DENSE, _SPARSE, weights=torch.ones(1)), 422, "weights must be float32 ["),
        (_binary(_DENSE, _SPARSE, weights=torch.ones(len(_VALUES))), 422, "the model takes no weights"),
        (_binary(_DENSE, {**_SPARSE, "user": [[], [100]]}), 422, "feature user: id 100 of example 1 is no row"),
        (
            _binary(torch.zeros(21, 3), {f: [[]] * 21 for f in _ROWS}),
            413,
            "the request has 21 examples, 20 are allowed",
        ),
    ],
)
def test_binary_that_is_refused(server: _Server, body: bytes, status: int, reason: str) -> None:
    answer = server.ask("POST", "/predict", body, _BINARY)
    assert answer[0] == status and json.loads(answer[1])["detail"].startswith(reason), answer


def test_other_requests_that_are_refused(server: _Server) -> None:
    status, body = server.ask("POST", "/predict", "x", "text/plain")
    assert (status, json.loads(body)["detail"]) == (
        415,
        "the content type must be application/json or application/octet-stream, not 'text/plain'",
    )
    assert server.ask("GET", "/predict")[0] == 405
    assert server.ask("GET", "/nothing")[0] == 404
    for path in ("/reload", "/update"):
        assert server.ask("POST", path, b"")[0] == 404


def test_requests_that_come_too_slowly(servers: SimpleNamespace) -> None:
    """A connection without a request, one without its last header, and one without its last byte."""
    port = servers.admin.port
    header = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: {_JSON}\r\ncontent-length: 9\r\n".encode()
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)) for _ in range(3)]
        sockets[1].sendall(header)
        sockets[2].sendall(header + b"\r\n{")
        answers = [b"".join(iter(lambda s=s: s.recv(4096), b"")) for s in sockets]  # type: ignore[misc]
    assert answers[:2] == [b"", b""]
    assert answers[2].startswith(b"HTTP/1.1 408 ") and b"the body has not come within 3 seconds" in answers[2]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(server: _Server, chunked: bool) -> None:
    body = b" " * 50_001
    answer = server.ask("POST", "/predict", iter([body[:30_000], body[30_000:]]) if chunked else body)
    assert (answer[0], json.loads(answer[1])["detail"]) == (413, "the body is larger than 50000 bytes")


def test_health_and_what_the_model_takes(server: _Server) -> None:
    assert server.ask("GET", "/healthz") == (200, b"ok\n")
    assert server.ask("GET", "/readyz") == (200, b"ok\n")
    assert json.loads(server.ask("GET", "/model")[1]) == {
        "num_dense": 3,
        "rows": _ROWS,
        "weighted": False,
        "max_batch": 20,
        "max_body_bytes": 50_000,
        "max_json_bytes": 50_000,
    }


def test_metrics_count(server: _Server, model: DLRM) -> None:
    before = server.metrics()
    sparse = {"user": [[1, 2], []], "item": [[], [3]], "shop": [[4, 5], [6]]}
    server.predict(torch.zeros(2, 3), sparse)
    for item in ([[50, 51], [0]], [[-1], [0]]):
        assert server.ask("POST", "/predict", _with(sparse={**_SPARSE, "item": item}))[0] == 422
    assert server.ask("POST", "/predict", "{")[0] == 400
    after = server.metrics()
    rises = {
        'serve_requests_total{form="json"}': 4,
        'serve_errors_total{kind="bad ids"}': 2,
        'serve_errors_total{kind="malformed"}': 1,
        'serve_bad_ids_total{feature="item"}': 3,
        'serve_request_seconds_count{form="json"}': 1,
        "serve_request_examples_sum": 2,
        "serve_model_examples_sum": 2,
        "serve_model_seconds_count": 1,
        "serve_rows_looked_up_total": 6,
    }
    assert {name: after[name] - before.get(name, 0) for name in rises} == rises
    assert after["serve_waiting_requests"] == 0
    assert after["process_resident_memory_bytes"] > 1e8
    assert after["serve_table_bytes"] == model.sparse_arch.embedding_bag_collection.nbytes


def _point(link: Path, target: Path) -> None:
    new = link.with_name("new-link")
    new.symlink_to(target)
    new.replace(link)


def _sockets(state: int) -> list[tuple[int, int, int]]:
    """Local port, remote port and bytes that nobody has read yet of this machine's IPv4 sockets in a TCP state."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        (int(line[1].split(":")[1], 16), int(line[2].split(":")[1], 16), int(line[4].split(":")[1], 16))
        for line in lines
        if int(line[3], 16) == state
    ]


def _unread(client: int, server: int) -> int | None:
    """Bytes that a client has sent and the server has not read; None before the server has the connection."""
    return next((unread for local, remote, unread in _sockets(1) if (local, remote) == (server, client)), None)


def _listens(server: int) -> bool:
    return any(local == server for local, *_ in _sockets(10))


@pytest.mark.supports("HTTP server: reload and update under load", "CPU")
def test_reload_under_load(servers: SimpleNamespace, artifacts: Path, model: DLRM) -> None:
    admin, link = servers.admin, artifacts / "link"
    grown = mpe.load(artifacts / "grown", _network({**_ROWS, "item": 60}))
    dense, sparse = _examples(4)
    expected = [_answer(model, dense, sparse), _answer(grown, dense, sparse)]
    beyond = {**sparse, "item": [[59]] * 4}
    assert not torch.allclose(*expected)
    stop, seen = threading.Event(), [0, 0]

    def client() -> None:
        while not stop.is_set():
            answer = admin.predict(dense, sparse)  # asserts that it succeeds
            matches = [torch.allclose(answer, e, rtol=1e-5, atol=1e-6) for e in expected]
            assert sum(matches) == 1, "an answer of neither model"
            seen[matches.index(True)] += 1

    with ThreadPoolExecutor(3) as clients:
        running = [clients.submit(client) for _ in range(3)]
        try:
            wait_for(lambda: seen[0] > 0)
            for _ in range(2):
                _point(link, artifacts / "grown")
                status, body = admin.ask("POST", "/reload", b"")
                assert (status, json.loads(body)) == (200, {"rows": {**_ROWS, "item": 60}})
                assert torch.allclose(admin.predict(dense, beyond), _answer(grown, dense, beyond), atol=1e-6)
                # Back to fewer rows, or to other features, is refused, and the model goes on.
                for wrong, reason in (
                    ("first", "feature item: its table has 50 rows, before it had 60"),
                    ("other", "the new model takes user, item, the one it would replace user, item, shop"),
                    ("nothing", f"{link} "),
                    ("damaged", " has another digest"),
                    (
                        "infinite",
                        "the model answers the probe with values that are not finite: its weights are damaged",
                    ),
                ):
                    _point(link, artifacts / wrong)
                    status, body = admin.ask("POST", "/reload", b"")
                    assert status == 409 and reason in json.loads(body)["detail"], body
                assert torch.allclose(admin.predict(dense, beyond), _answer(grown, dense, beyond), atol=1e-6)
            wait_for(lambda: seen[1] > 0)
        finally:
            stop.set()
        for future in running:
            future.result()
    assert admin.metrics()['serve_reloads_total{outcome="swapped"}'] == 2
    assert admin.metrics()['serve_reloads_total{outcome="failed"}'] == 10


def test_update_lasts_until_sighup(servers: SimpleNamespace, artifacts: Path, tmp_path: Path) -> None:
    admin = servers.admin
    _point(artifacts / "link", artifacts / "grown")
    assert admin.ask("POST", "/reload", b"")[0] == 200
    updated = mpe.load(artifacts / "grown", _network({**_ROWS, "item": 60}))
    dense, sparse = _examples(4)
    original = _answer(updated, dense, sparse)
    assert torch.allclose(admin.predict(dense, sparse), original, atol=1e-6)

    rows = {"t_item": (torch.tensor([0, 30, 59]), torch.randn(3, 8, generator=torch.Generator().manual_seed(4)))}
    save_delta(tmp_path / "delta.safetensors", rows)
    status, body = admin.ask("POST", "/update", (tmp_path / "delta.safetensors").read_bytes(), _BINARY)
    assert (status, json.loads(body)) == (200, {"t_item": {"written": 2, "zero_bits": 1}})
    updated.sparse_arch.embedding_bag_collection.apply_update(rows)
    changed = _answer(updated, dense, sparse)
    assert not torch.allclose(changed, original)
    assert torch.allclose(admin.predict(dense, sparse), changed, atol=1e-6)

    save_delta(tmp_path / "bad.safetensors", {"t_item": (torch.tensor([60]), torch.zeros(1, 8))})
    save_delta(tmp_path / "infinite.safetensors", {"t_item": (torch.tensor([1]), torch.full((1, 8), float("inf")))})
    for bad in (*((tmp_path / f"{name}.safetensors").read_bytes() for name in ("bad", "infinite")), b"nonsense"):
        status, body = admin.ask("POST", "/update", bad, _BINARY)
        assert status == 422 and json.loads(body)["detail"], body
    assert torch.allclose(admin.predict(dense, sparse), changed, atol=1e-6)

    swapped = 'serve_reloads_total{outcome="swapped"}'
    before = admin.metrics()[swapped]
    admin.process.send_signal(signal.SIGHUP)
    wait_for(lambda: admin.metrics()[swapped] > before)
    assert torch.allclose(admin.predict(dense, sparse), original, atol=1e-6)


def test_an_artifact_that_is_not_there(servers: SimpleNamespace, artifacts: Path) -> None:
    assert servers.wrong.returncode == 1
    last = servers.wrong.stderr.splitlines()[-1]
    assert last.startswith("server.py: ") and str(artifacts / "none") in last


@pytest.mark.supports("HTTP server: graceful shutdown", "CPU")
def test_sigterm_answers_what_was_begun(server: _Server, model: DLRM) -> None:
    """The last test of this server."""
    dense, sparse = _examples(2)
    body = _with(dense=dense.tolist(), sparse=sparse).encode()
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    assert not children.exists() or not children.read_text()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        header = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: {_JSON}\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(header.encode() + body[:10])
        wait_for(lambda: _unread(connection.getsockname()[1], server.port) == 0)
        server.process.terminate()
        wait_for(lambda: not _listens(server.port))
        connection.sendall(body[10:])
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 200
        predictions = torch.tensor(json.loads(answer.read())["predictions"])
        torch.testing.assert_close(predictions, _answer(model, dense, sparse), rtol=1e-5, atol=1e-6)
    assert server.process.wait(20) in (0, -signal.SIGTERM)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)
