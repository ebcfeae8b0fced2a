"""What FBGEMM's fused optimizers do, on an unsharded table."""

from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn


@dataclass(frozen=True)
class _Table:
    weight: nn.Parameter
    optimizer: EmbOptimType
    columns: int
    gradient_factor: float


class RowOptimizer:
    """SGD, Adagrad and row-wise Adagrad from their definitions.

    Row-wise Adagrad keeps one sum per row *and column shard*, over the mean of the squared gradients of the shard's
    columns: under column-wise and grid sharding it is another optimizer than in one process, in TorchRec itself.

    Attributes:
        state (dict[tuple[str, int], Tensor]): by table and first column of the shard, [rows, columns or 1].
    """

    def __init__(self, learning_rate: float, eps: float) -> None:
        self.state: dict[tuple[str, int], Tensor] = {}
        self._tables: dict[str, _Table] = {}
        self._learning_rate, self._eps = learning_rate, eps

    def add(
        self, table: str, weight: nn.Parameter, optimizer: EmbOptimType, columns: int, gradient_factor: float
    ) -> None:
        """Train a table with shards of so many columns, its gradient multiplied by a factor."""
        self._tables[table] = _Table(weight, optimizer, columns, gradient_factor)

    @torch.no_grad()
    def step(self) -> None:
        for name, table in self._tables.items():
            assert table.weight.grad is not None
            for column in range(0, table.weight.shape[1], table.columns):
                part = slice(column, column + table.columns)
                gradient = table.weight.grad[:, part] * table.gradient_factor
                if table.optimizer != EmbOptimType.EXACT_SGD:
                    squares = gradient**2
                    if table.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD:
                        squares = squares.mean(1, keepdim=True)
                    state = self.state.setdefault((name, column), torch.zeros_like(squares))
                    state += squares
                    gradient = gradient / (state.sqrt() + self._eps)
                table.weight[:, part] -= self._learning_rate * gradient
