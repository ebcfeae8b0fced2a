"""The model in a pool of threads; requests that wait for a thread go to it as one batch."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from batch import Batch, RequestError, joined
from metrics import Metrics
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class ModelThreads:
    """Runs a model in threads, which its operators let run side by side: they release Python's lock.

    A request never waits for another one to come. Those that come while all threads are busy wait, and the next free
    thread takes as many of them as fit into a batch: at batch 1 most of a forward is Python, paid once for all.

    Args:
        model (Callable): takes dense features and a KeyedJaggedTensor, returns logits [B, 1].
        metrics (Metrics): where batches and seconds are counted.
        threads (int): batches computed at a time.
        max_batch (int): examples that are joined at most; a larger request is computed alone.
        max_waiting (int): requests that may wait; more are refused with 503.
    """

    def __init__(
        self,
        model: Callable[[Tensor, KeyedJaggedTensor], Tensor],
        metrics: Metrics,
        threads: int = 2,
        max_batch: int = 512,
        max_waiting: int = 512,
    ) -> None:
        self._model, self._metrics = model, metrics
        self._threads, self._max_batch, self._max_waiting = threads, max_batch, max_waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="model")
        self._waiting: deque[tuple[Batch, asyncio.Future[Tensor]]] = deque()
        self._busy = 0

    async def predict(self, batch: Batch) -> Tensor:
        """Probabilities float32 [B]; raises RequestError if too many requests wait."""
        if len(self._waiting) >= self._max_waiting:
            raise RequestError(503, "overloaded", f"{self._max_waiting} requests wait already, try again later")
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.append((batch, answer))
        self._start()
        return await answer

    def close(self) -> None:
        """Wait for the batches that are being computed, and end the threads."""
        self._pool.shutdown()

    def run(self, batches: list[Batch]) -> Tensor:
        """The model on several batches as one, in the calling thread: probabilities float32 [sum of B]."""
        batch = joined(batches)
        begin = time.perf_counter()
        with torch.inference_mode():
            probabilities = torch.sigmoid(self._model(batch.dense, batch.kjt()).flatten().float())
        self._metrics.model_seconds.observe(time.perf_counter() - begin)
        self._metrics.joint_batch_size.observe(batch.dense.shape[0])
        self._metrics.rows.inc(batch.values.numel())
        return probabilities

    def _start(self) -> None:
        while self._waiting and self._busy < self._threads:
            taken = [self._waiting.popleft()]
            size = taken[0][0].dense.shape[0]
            while self._waiting and self._fits(taken[0][0], size, self._waiting[0][0]):
                taken.append(self._waiting.popleft())
                size += taken[-1][0].dense.shape[0]
            self._busy += 1
            loop = asyncio.get_running_loop()
            computed = loop.run_in_executor(self._pool, self.run, [batch for batch, _ in taken])
            computed.add_done_callback(partial(self._answer, taken))
        self._metrics.waiting.set(len(self._waiting))

    def _fits(self, first: Batch, size: int, other: Batch) -> bool:
        return size + other.dense.shape[0] <= self._max_batch and first.features == other.features

    def _answer(self, taken: list[tuple[Batch, "asyncio.Future[Tensor]"]], computed: "asyncio.Future[Tensor]") -> None:
        self._busy -= 1
        error = computed.exception()
        sizes = [batch.dense.shape[0] for batch, _ in taken]
        parts = [None] * len(taken) if error else computed.result().split(sizes)
        for (_, answer), part in zip(taken, parts, strict=True):
            if answer.done():  # its sender has gone
                continue
            if part is None:
                answer.set_exception(error or RuntimeError("no answer"))
            else:
                answer.set_result(part)
        self._start()
