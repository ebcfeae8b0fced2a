"""A model that is replaced while it answers requests."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchrec.sparse.jagged_tensor import KeyedTensor


class ServedModel:
    """Answers each request with the model of the moment; any number of threads may ask.

    A swap waits for no request and no request for a swap: requests in flight end on the model they began with, those
    that come later get the new one, and the old one is let go when its last request has ended. On CUDA it is let go
    after all that was queued on its devices, on whatever stream.

    For new values of some rows use ``apply_update`` of the packed collections in :attr:`model`: that needs no second
    model in memory.

    Args:
        model (Callable): a module in eval mode, or an exported model.
        probe (Sequence): the arguments of a request, to which every model must answer alike: the same nesting, keys,
            dtypes, shapes and devices.

    Raises:
        ValueError: if the model is not in eval mode, or its answer to the probe is not finite.

    Example::

        >>> served = ServedModel(mpe.load("artifact-1"), probe=(batch,))
        >>> served(batch)                                   # from many threads
        >>> served.swap(mpe.load("artifact-2")).wait()      # from one more
    """

    def __init__(self, model: Callable[..., Any], probe: Sequence[Any]) -> None:
        self._probe = tuple(probe)
        self._answer = _describe(_ask(model, self._probe))
        self._current = _InService(model)
        self._lock = threading.Lock()
        self._swapping = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer, without gradients; raises what the model raises."""
        with self._lock:
            serving = self._current
            serving.requests += 1
        try:
            with torch.no_grad():
                return serving.model(*args, **kwargs)
        finally:
            with self._lock:
                serving.requests -= 1
                ended = serving.replaced and serving.requests == 0
            if ended:
                serving.let_go()

    @property
    def model(self) -> Callable[..., Any]:
        """The model that the next request gets."""
        with self._lock:
            return self._current.model

    def swap(self, model: Callable[..., Any]) -> threading.Event:
        """Let ``model`` answer from now on.

        It is asked the probe first, in the calling thread, which also brings in what a first request is slow for.

        Args:
            model (Callable): as the first one. Load it whole before: both are in memory until the last request on
                the old one has ended.

        Returns:
            threading.Event: set when the old model is let go. Its memory is free then, unless something else refers to
            it; the files it may be mapped from can go.

        Raises:
            ValueError: if the model is not in eval mode, answers with NaN or infinity, or with other keys, dtypes,
                shapes or devices than the first one did. Then, and if it fails at the probe, the old model stays.
        """
        with self._swapping:
            answer = _describe(_ask(model, self._probe))
            if answer != self._answer:
                raise ValueError(
                    f"the new model answers the probe with {answer}, the one it would replace with {self._answer}"
                )
            with self._lock:
                old, self._current = self._current, _InService(model)
                old.replaced = True
                ended = old.requests == 0
        if ended:
            old.let_go()
        return old.gone


class _InService:
    """A model, and the requests that it is answering."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.requests = 0
        self.replaced = False
        self.gone = threading.Event()

    def let_go(self) -> None:
        # A kernel still queued may read tensors whose memory another stream would get: the allocator does not know.
        for device in _cuda_devices(self.model):
            torch.cuda.synchronize(device)
        del self.model
        self.gone.set()


def _cuda_devices(model: Callable[..., Any]) -> set[torch.device]:
    if not torch.cuda.is_initialized():
        return set()
    if not isinstance(model, nn.Module):
        return {torch.device("cuda")}
    return {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}


def _ask(model: Callable[..., Any], probe: tuple[Any, ...]) -> Any:
    # A graph that torch.export made has the mode of its export, whatever its modules say.
    if isinstance(model, nn.Module) and not isinstance(model, fx.GraphModule):
        for name, module in model.named_modules():
            if module.training:
                name = name or type(module).__name__
                raise ValueError(f"{name} is in training mode, in which requests change a model: call eval() first")
    with torch.no_grad():
        return model(*probe)


def _describe(answer: Any) -> Any:
    """Nesting, keys, dtypes, shapes and devices of an answer, which must be finite."""
    if isinstance(answer, Tensor):
        if answer.is_floating_point() and not bool(answer.isfinite().all()):
            raise ValueError("the model answers the probe with values that are not finite: its weights are damaged")
        return f"{answer.dtype} {list(answer.shape)} on {answer.device}"
    if isinstance(answer, KeyedTensor):
        return list(zip(answer.keys(), answer.length_per_key(), strict=True)), _describe(answer.values())
    if isinstance(answer, Mapping):
        return {key: _describe(value) for key, value in answer.items()}
    if isinstance(answer, (list, tuple)):
        return [_describe(value) for value in answer]
    return type(answer).__name__
