"""Parts of examples/serve that need no server: weights, joining, what waits too long, a model that fails."""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

pytest.importorskip("fastapi", reason="pip install torchrec-mpe[serve]")

_FOLDER = Path(__file__).parents[2] / "examples" / "serve"


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(_FOLDER))
    yield
    for name in ("app", "batch", "current_model", "metrics", "model_threads"):
        sys.modules.pop(name, None)


def test_weights() -> None:
    from batch import Inputs, RequestError, batch_of_json, batch_of_safetensors, joined

    inputs = Inputs(3, {"user": 100, "item": 50}, True, 20)
    sparse = {"user": [[1, 2], []], "item": [[3], [4]]}
    weights = {"item": [[0.25], [4]], "user": [[0.5, 2.0], []]}
    body = json.dumps({"dense": [[0, 0, 0]] * 2, "sparse": sparse, "weights": weights}).encode()
    batch = batch_of_json(body, inputs)
    assert batch.values.tolist() == [1, 2, 3, 4] and batch.lengths.tolist() == [[2, 0], [1, 1]]
    assert batch.weights is not None and batch.weights.tolist() == [0.5, 2.0, 0.25, 4.0]
    tensors = {"dense": batch.dense, "values": batch.values, "lengths": batch.lengths, "weights": batch.weights}
    binary = safetensors.torch.save(tensors, {"features": json.dumps(["user", "item"])})
    both = joined([batch, batch_of_safetensors(binary, inputs)])
    assert both.values.tolist() == [1, 2, 1, 2, 3, 4, 3, 4] and both.lengths.tolist() == [[2, 0] * 2, [1] * 4]
    assert both.weights is not None and both.weights.tolist() == [0.5, 2.0, 0.5, 2.0, 0.25, 4.0, 0.25, 4.0]
    with pytest.raises(RequestError, match="the model takes a weight for each id"):
        batch_of_json(json.dumps({"dense": [[0, 0, 0]] * 2, "sparse": sparse}).encode(), inputs)


def test_requests_that_wait_are_joined_or_refused() -> None:
    from batch import Batch, RequestError
    from metrics import Metrics
    from model_threads import ModelThreads

    free, sizes = threading.Event(), []

    def model(dense: Tensor, _: KeyedJaggedTensor) -> Tensor:
        assert free.wait(30)
        sizes.append(len(dense))
        return dense[:, :1]

    def request(value: float, size: int) -> Batch:
        lengths = torch.zeros(1, size, dtype=torch.int64)
        return Batch(("f",), torch.full((size, 1), value), torch.zeros(0, dtype=torch.int64), lengths, None)

    async def scenario() -> None:
        threads = ModelThreads(model, Metrics(), threads=1, max_batch=5, max_waiting=4)
        sent = [asyncio.ensure_future(threads.predict(request(k, size))) for k, size in enumerate((1, 2, 2, 9, 3))]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="4 requests wait already") as refused:
            await threads.predict(request(9, 1))
        assert refused.value.status == 503
        sent[2].cancel()  # its sender has gone; the others still get their own
        free.set()
        answers = await asyncio.gather(*sent, return_exceptions=True)
        for k, size in ((0, 1), (1, 2), (3, 9), (4, 3)):
            torch.testing.assert_close(answers[k], torch.sigmoid(torch.full((size,), float(k))))
        threads.close()

    asyncio.run(scenario())
    # The first alone, two that wait together, one larger than what is joined alone, the last.
    assert sizes == [1, 4, 9, 3]


def test_a_model_that_fails_fails_its_requests_only() -> None:
    from batch import Batch
    from metrics import Metrics
    from model_threads import ModelThreads

    def model(dense: Tensor, _: KeyedJaggedTensor) -> Tensor:
        if dense[0, 0] < 0:
            raise RuntimeError("no")
        return dense

    async def scenario() -> None:
        threads = ModelThreads(model, Metrics(), threads=1)
        empty = torch.zeros(0, dtype=torch.int64)
        for value in (-1.0, 1.0):
            batch = Batch(("f",), torch.full((1, 1), value), empty, empty.view(1, 0).new_zeros(1, 1), None)
            if value < 0:
                with pytest.raises(RuntimeError, match="no"):
                    await threads.predict(batch)
            else:
                torch.testing.assert_close(await threads.predict(batch), torch.sigmoid(torch.ones(1)))
        threads.close()

    asyncio.run(scenario())


def _safetensors(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"dense": ' + b"[" * 100_000, 413),
        (b'{"dense": [' + b"[]," * 300_000 + b"[]]}", 413),
        (b'{"dense": ' + b"[" * 400 + b"}", 400),
        (b'{"dense": [[1' + b"0" * 5000 + b"]]}", 400),
        (b'{"dense": [[1' + b"0" * 400 + b"]]}", 422),
        (_safetensors({"x": {"dtype": "F32", "shape": [1 << 63, 0], "data_offsets": [0, 0]}}), 400),
        (_safetensors({"x": {"dtype": "F32", "shape": [0, (1 << 63) - 1, 3], "data_offsets": [0, 0]}}), 400),
        (_safetensors({"x": {"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}}), 400),
        (_safetensors({"__metadata__": {"features": "[" * 100_000}}), 422),
    ],
)
def test_absurd_bodies_are_the_senders_mistake(body: bytes, status: int) -> None:
    from batch import Inputs, RequestError, batch_of_json, batch_of_safetensors

    parse = batch_of_json if body.startswith(b"{") else batch_of_safetensors
    with pytest.raises(RequestError) as refused:
        parse(body, Inputs(3, {"user": 100}, False, 200))
    assert refused.value.status == status and len(refused.value.reason) < 300


def test_the_first_mistake_ends_the_parsing() -> None:
    from batch import PredictRequest
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as refused:
        PredictRequest.model_validate_json('{"dense": [["x", "x"], ["x"]], "sparse": {"user": [["x", "x"], ["x"]]}}')
    assert refused.value.error_count() == 2  # one a field


def test_an_answer_that_is_no_number_is_the_senders_mistake() -> None:
    from app import create_app
    from batch import Inputs

    class Overflowing:
        inputs = Inputs(1, {"f": 5}, False, 4)

        def table_bytes(self) -> int:
            return 0

        def __call__(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
            return dense * 1e20 - dense * 1e20

    async def status_of(dense: float) -> tuple[int, str]:
        body = json.dumps({"dense": [[0.0], [dense]], "sparse": {"f": [[1], []]}}).encode()
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/predict",
            "raw_path": b"/predict", "query_string": b"", "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        await create_app(Overflowing())(scope, receive, send)  # type: ignore[arg-type]
        return sent[0]["status"], sent[1]["body"].decode()  # type: ignore[return-value, attr-defined]

    assert asyncio.run(status_of(1.0))[0] == 200
    status, answer = asyncio.run(status_of(1e30))
    assert status == 422 and "the answer to example 1 is not a number" in answer
