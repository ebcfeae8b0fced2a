"""From the body of a request to a batch for the model; what does not fit is refused in one sentence."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

JSON, BINARY = "application/json", "application/octet-stream"

Int64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
# The first mistake ends the parsing: a body of nothing but mistakes would take seconds and a list of them all.
Floats = Annotated[list[Annotated[list[float], FailFast()]], FailFast()]
Ids = Annotated[list[Annotated[list[Int64], FailFast()]], FailFast()]


class RequestError(Exception):
    """A request that is not answered: HTTP status, kind (for the metrics) and one sentence for its sender."""

    def __init__(self, status: int, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.kind, self.reason = status, kind, reason


class BadIdsError(RequestError):
    """Ids that are no rows of a feature's table: how many."""

    def __init__(self, feature: str, count: int, reason: str) -> None:
        super().__init__(422, "bad ids", reason)
        self.feature, self.count = feature, count


class PredictRequest(BaseModel):
    """B examples; strict: no text for numbers, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    dense: Floats = Field(description="B lists, the dense features of each example")
    sparse: dict[str, Ids] = Field(description="by feature B lists, the ids of each example")
    weights: dict[str, Floats] | None = Field(None, description="a weight for each id, as sparse")


@dataclass(frozen=True)
class Inputs:
    """What the model takes, and how much of it at once.

    Attributes:
        num_dense (int): dense features of an example.
        rows (Mapping[str, int]): features, to the rows of the smallest table that each reads.
        weighted (bool): whether ids carry weights.
        max_batch (int): examples of a request.
    """

    num_dense: int
    rows: Mapping[str, int]
    weighted: bool
    max_batch: int


@dataclass(frozen=True)
class Batch:
    """B examples of F features with N ids, feature by feature, example by example.

    Attributes:
        features (tuple[str, ...]): F features.
        dense (Tensor): float32 [B, num_dense].
        values (Tensor): int32 or int64 [N].
        lengths (Tensor): int64 [F, B], ids of each bag.
        weights (Optional[Tensor]): float32 [N].
    """

    features: tuple[str, ...]
    dense: Tensor
    values: Tensor
    lengths: Tensor
    weights: Tensor | None

    def kjt(self) -> KeyedJaggedTensor:
        """The sparse features."""
        return KeyedJaggedTensor(list(self.features), self.values, self.weights, lengths=self.lengths.flatten())


def batch_of_json(body: bytes, inputs: Inputs) -> Batch:
    """A batch of a :class:`PredictRequest` in JSON; raises RequestError."""
    # An example has a list of dense features, and of each feature one of ids and one of weights.
    most = (inputs.max_batch + 1) * (1 + 2 * len(inputs.rows)) + 2 * sum(name.count("[") for name in inputs.rows)
    if body.count(b"[") > most + inputs.max_batch:
        raise RequestError(413, "too large", f"the request has more lists than {inputs.max_batch} examples can have")
    try:
        request = PredictRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise RequestError(400, "malformed", f"the body is no JSON: {first['msg']}") from error
        raise RequestError(422, "invalid", f"{_place(first['loc'])}: {first['msg']}") from error
    batch = len(request.dense)
    _check_batch(batch, inputs)
    for k, example in enumerate(request.dense):
        if len(example) != inputs.num_dense:
            raise _invalid(f"dense[{k}] has {len(example)} features, the model takes {inputs.num_dense}")
    _check_features(request.sparse, inputs)
    lengths = [_lengths(f"feature {feature}", request.sparse[feature], batch) for feature in inputs.rows]
    weights = None
    if request.weights is not None:
        for feature, expected in zip(inputs.rows, lengths, strict=True):
            given = request.weights.get(feature, [])
            if [len(bag) for bag in given] != expected:
                raise _invalid(f"feature {feature}: weights must be {batch} lists with a weight for each id")
        bags = chain.from_iterable(request.weights[feature] for feature in inputs.rows)
        weights = torch.tensor(list(chain.from_iterable(bags)), dtype=torch.float32)
    ids = chain.from_iterable(chain.from_iterable(request.sparse[feature] for feature in inputs.rows))
    return _checked(
        Batch(
            tuple(inputs.rows),
            torch.tensor(request.dense, dtype=torch.float32).view(batch, inputs.num_dense),
            torch.tensor(list(ids), dtype=torch.int64),
            torch.tensor(lengths, dtype=torch.int64),
            weights,
        ),
        inputs,
    )


def batch_of_safetensors(body: bytes, inputs: Inputs) -> Batch:
    """A batch of safetensors, for large batches, where parsing JSON takes longer than the model; raises RequestError.

    Tensors are those of :class:`Batch` (lengths int32 or int64, weights only if the model takes them). The metadata's
    ``features``, a JSON list, names the rows of ``lengths``, in any order.
    """
    try:
        tensors = safetensors.torch.load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        features = json.loads(header["__metadata__"]["features"])
        assert isinstance(features, list) and all(isinstance(feature, str) for feature in features)
    except safetensors.SafetensorError as error:
        raise RequestError(400, "malformed", f"the body is no safetensors file: {error}") from error
    except RecursionError as error:
        raise _invalid("the metadata's features must be a JSON list of names") from error
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        raise RequestError(400, "malformed", "the body has a tensor of a shape that cannot be") from error
    except (AssertionError, KeyError, ValueError) as error:
        raise _invalid("the metadata's features must be a JSON list of names") from error
    _check_features(dict.fromkeys(features), inputs)
    if len(features) != len(inputs.rows):
        raise _invalid("the metadata's features name one twice")
    known = {"dense", "values", "lengths", "weights"}
    if not known - {"weights"} <= tensors.keys() <= known:
        raise _invalid(f"the tensors must be dense, values, lengths and perhaps weights, not {sorted(tensors)}")
    dense, values, lengths, weights = (tensors.get(k) for k in ("dense", "values", "lengths", "weights"))
    assert dense is not None and values is not None and lengths is not None
    if dense.dtype != torch.float32 or dense.dim() != 2 or dense.shape[1] != inputs.num_dense:
        raise _invalid(
            f"dense must be float32 [B, {inputs.num_dense}], not {_described(dense)}",
        )
    _check_batch(dense.shape[0], inputs)
    integers = (torch.int32, torch.int64)
    if lengths.dtype not in integers or lengths.shape != (len(features), dense.shape[0]):
        raise _invalid(
            f"lengths must be int32 or int64 [{len(features)}, {dense.shape[0]}], features by examples, not "
            f"{_described(lengths)}"
        )
    if values.dtype not in integers or values.dim() != 1:
        raise _invalid(f"values must be int32 or int64 [N], not {_described(values)}")
    if weights is not None and (weights.dtype != torch.float32 or weights.shape != values.shape):
        raise _invalid(f"weights must be float32 [{values.numel()}], a weight for each id, not {_described(weights)}")
    lengths = lengths.long()
    # Each is bounded before they are added up, or the sum could wrap around.
    if lengths.numel() and not 0 <= lengths.min() <= lengths.max() <= values.numel():
        raise _invalid(f"lengths must be between 0 and {values.numel()}, the number of values")
    if int(lengths.sum()) != values.numel():
        raise _invalid(f"lengths add up to {int(lengths.sum())} ids, values has {values.numel()}")
    return _checked(Batch(tuple(features), dense, values, lengths, weights), inputs)


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch with the examples of several, in order."""
    first = batches[0]
    if len(batches) == 1:
        return first

    def by_feature(tensors: Sequence[Tensor]) -> Tensor:
        pieces = [t.split(b.lengths.sum(1).tolist()) for t, b in zip(tensors, batches, strict=True)]
        return torch.cat([piece[f] for f in range(len(first.features)) for piece in pieces])

    return Batch(
        first.features,
        torch.cat([batch.dense for batch in batches]),
        by_feature([batch.values for batch in batches]),
        torch.cat([batch.lengths for batch in batches], dim=1),
        None if first.weights is None else by_feature([b.weights for b in batches if b.weights is not None]),
    )


def _checked(batch: Batch, inputs: Inputs) -> Batch:
    """The batch, if numbers are finite, weights are there where the model takes them, and every id is a row."""
    if inputs.weighted != (batch.weights is not None):
        raise _invalid("the model takes a weight for each id" if inputs.weighted else "the model takes no weights")
    for name, tensor in (("dense", batch.dense), ("weights", batch.weights)):
        if tensor is not None and not tensor.isfinite().all():
            raise _invalid(f"{name} must be finite numbers of float32")
    ids_per_feature = batch.lengths.sum(1).tolist()
    for f, ids in enumerate(batch.values.split(ids_per_feature)):
        feature, rows = batch.features[f], inputs.rows[batch.features[f]]
        if not ids.numel() or (int(ids.min()) >= 0 and int(ids.max()) < rows):
            continue
        bad = ((ids < 0) | (ids >= rows)).nonzero().flatten()
        example = int(torch.searchsorted(batch.lengths[f].cumsum(0), bad[0], right=True))
        reason = f"id {int(ids[bad[0]])} of example {example} is no row of its table, ids are 0 to {rows - 1}"
        raise BadIdsError(feature, bad.numel(), f"feature {feature}: {reason}")
    return batch


def _check_batch(batch: int, inputs: Inputs) -> None:
    if not batch:
        raise _invalid("the request has no examples")
    if batch > inputs.max_batch:
        raise RequestError(413, "too large", f"the request has {batch} examples, {inputs.max_batch} are allowed")


def _check_features(given: Mapping[str, object], inputs: Inputs) -> None:
    for feature in given:
        if feature not in inputs.rows:
            raise _invalid(f"feature {feature} is unknown, the model takes {', '.join(inputs.rows)}")
    for feature in inputs.rows:
        if feature not in given:
            raise _invalid(f"feature {feature} is missing")


def _lengths(what: str, bags: Sequence[Sequence[object]], batch: int) -> list[int]:
    if len(bags) != batch:
        raise _invalid(f"{what} has {len(bags)} lists of ids, dense has {batch} examples")
    return [len(bag) for bag in bags]


def _invalid(reason: str) -> RequestError:
    return RequestError(422, "invalid", reason)


def _place(location: Sequence[int | str]) -> str:
    """``("sparse", "user", 0, 2)`` as people write it: sparse.user[0][2]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".") or "the body"


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
