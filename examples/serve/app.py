"""The HTTP interface: /predict, health, metrics, and for administrators /reload and /update."""

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

import safetensors.torch
from batch import (
    BINARY,
    JSON,
    BadIdsError,
    Batch,
    Inputs,
    PredictRequest,
    RequestError,
    batch_of_json,
    batch_of_safetensors,
)
from current_model import CurrentModel
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from metrics import Metrics
from model_threads import ModelThreads
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect

_FORMS: dict[str, tuple[str, Callable[[bytes, Inputs], Batch]]] = {
    JSON: ("json", batch_of_json),
    BINARY: ("binary", batch_of_safetensors),
}
_LOG = logging.getLogger("uvicorn.error")
_SMALL = 64 << 10
"""Bodies up to so many bytes are parsed at once: a thread would cost more than it frees."""

_BODY = {
    "required": True,
    "content": {
        JSON: {"schema": PredictRequest.model_json_schema()},
        BINARY: {"schema": {"type": "string", "format": "binary", "description": batch_of_safetensors.__doc__}},
    },
}


def create_app(
    model: CurrentModel,
    *,
    threads: int = 2,
    max_joined: int = 512,
    max_body: int = 64 << 20,
    max_json: int = 1 << 20,
    body_seconds: float = 30.0,
    admin: bool = False,
) -> FastAPI:
    """The application.

    Args:
        model (CurrentModel): what answers.
        threads (int): batches that are computed at a time.
        max_joined (int): examples of waiting requests that are computed as one batch; 1: none.
        max_body (int): bytes of a request; larger ones are refused with 413 before they are read.
        max_json (int): of those in JSON, which takes a hundred times the time and memory to parse.
        body_seconds (float): in which a body must have come.
        admin (bool): offer /reload and /update, to whoever reaches the port.
    """
    metrics = Metrics()
    metrics.table_bytes.set_function(model.table_bytes)
    model_threads = ModelThreads(model, metrics, threads, max_joined)
    parsers = ThreadPoolExecutor(1, thread_name_prefix="parser")  # one large body at a time

    async def reload() -> None:
        try:
            await asyncio.to_thread(model.reload)
        except Exception as error:  # whatever it is, the old model goes on
            metrics.reloads.labels("failed").inc()
            expected = isinstance(error, OSError | ValueError)
            reason = f"the old model goes on, the new one cannot be served: {error}"
            _LOG.error("%s", reason, exc_info=None if expected else error)
            raise RequestError(409, "reload", reason) from error
        metrics.reloads.labels("swapped").inc()
        _LOG.warning("reloaded the model")

    async def reload_on_signal() -> None:
        with suppress(RequestError):
            await reload()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        reloads: set[asyncio.Task[None]] = set()  # the loop itself does not keep tasks alive

        def on_signal() -> None:
            task = loop.create_task(reload_on_signal())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, on_signal)
        yield
        loop.remove_signal_handler(signal.SIGHUP)
        model_threads.close()
        parsers.shutdown()

    app = FastAPI(title="Mixed-precision embeddings", lifespan=lifespan)

    @app.post("/predict", openapi_extra={"requestBody": _BODY})
    async def predict(request: Request) -> Response:
        """Probabilities of B examples, in the form of the request: JSON or safetensors with a tensor "predictions"."""
        begin = time.perf_counter()
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in _FORMS:
            raise RequestError(
                415, "content type", f"the content type must be {JSON} or {BINARY}, not {content_type!r}"
            )
        form, parse = _FORMS[content_type]
        metrics.requests.labels(form).inc()
        body = await _read(request, min(max_json, max_body) if form == "json" else max_body, body_seconds)
        if len(body) <= _SMALL:
            batch = parse(body, model.inputs)
        else:
            batch = await asyncio.get_running_loop().run_in_executor(parsers, parse, body, model.inputs)
        metrics.batch_size.observe(batch.dense.shape[0])
        predictions = await model_threads.predict(batch)
        if not predictions.isfinite().all():
            example = int((~predictions.isfinite()).nonzero()[0])
            reason = f"the answer to example {example} is not a number: its dense features or weights are too large"
            raise RequestError(422, "not finite", reason)
        metrics.seconds.labels(form).observe(time.perf_counter() - begin)
        if form == "json":
            return JSONResponse({"predictions": predictions.tolist()})
        return Response(safetensors.torch.save({"predictions": predictions.contiguous()}), media_type=BINARY)

    @app.get("/model")
    async def features() -> JSONResponse:
        """What /predict takes: the features and the rows of their tables."""
        inputs = model.inputs
        limits = {"max_batch": inputs.max_batch, "max_body_bytes": max_body, "max_json_bytes": min(max_json, max_body)}
        return JSONResponse(
            {"num_dense": inputs.num_dense, "rows": dict(inputs.rows), "weighted": inputs.weighted, **limits}
        )

    @app.get("/healthz")
    async def healthz() -> Response:
        """Answers while the process and its event loop live."""
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz")
    async def readyz() -> Response:
        """Answers once the model has answered; not any more after SIGTERM, when the socket is closed."""
        return Response("ok\n", media_type="text/plain")

    @app.get("/metrics")
    async def prometheus() -> Response:
        """In Prometheus' text format."""
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    if admin:

        @app.post("/reload")
        async def reload_now() -> JSONResponse:
            """Open the artifact's folder again: as SIGHUP."""
            await reload()
            return JSONResponse({"rows": dict(model.inputs.rows)})

        @app.post("/update")
        async def update(request: Request) -> JSONResponse:
            """New values for rows: a file of torchrec_mpe.save_delta. They last until the next reload."""
            body = await _read(request, max_body, body_seconds)
            try:
                return JSONResponse(await asyncio.to_thread(model.update, body))
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise RequestError(422, "update", str(error.args[0])) from error

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        metrics.errors.labels(error.kind).inc()
        if isinstance(error, BadIdsError):
            metrics.bad_ids.labels(error.feature).inc(error.count)
        # What was not read of the body is still to come: the connection cannot be used again.
        headers = {"connection": "close"} if error.status in (408, 413, 415) else None
        return JSONResponse({"detail": error.reason}, error.status, headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        metrics.errors.labels("client gone").inc()
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        metrics.errors.labels("internal").inc()
        return JSONResponse({"detail": "the server failed, its log says why"}, 500)

    return app


async def _read(request: Request, limit: int, seconds: float) -> bytes:
    """The body; a header that announces more than the limit ends it at once, chunks when they exceed it."""
    try:
        return await asyncio.wait_for(_chunks(request, limit), seconds)
    except asyncio.TimeoutError as error:  # the builtin one only since Python 3.11
        raise RequestError(408, "slow", f"the body has not come within {seconds:g} seconds") from error


async def _chunks(request: Request, limit: int) -> bytes:
    too_large = RequestError(413, "too large", f"the body is larger than {limit} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)
