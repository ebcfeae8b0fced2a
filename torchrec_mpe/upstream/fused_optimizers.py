"""What the library has to know of each optimizer that FBGEMM fuses into its TBEs: the only table of such facts."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fbgemm_gpu.split_embedding_configs import EmbOptimType


@dataclass(frozen=True)
class OptimizerTraits:
    """Facts of one optimizer.

    Attributes:
        elementwise (int): float32 states with an element for each element of a row.
        rowwise (int): float32 states of one element a row, or a column shard of a row.
        never_negative (bool): no state is ever below 0.
        only_rows_of_the_batch (bool): it changes the rows of a batch and their state, and nothing else, so that cached
            tables can be trained with it. Others update all rows every few steps, or none.
        one_table (bool): on CPU its tables can be looked up as if they were one.
        option (Optional[str]): its name on the command line.
    """

    elementwise: int = 0
    rowwise: int = 0
    never_negative: bool = False
    only_rows_of_the_batch: bool = False
    one_table: bool = False
    option: str | None = None

    def state_elements(self, columns: int) -> list[int]:
        """Elements that a row of ``columns`` elements has in each state."""
        return [columns] * self.elementwise + [1] * self.rowwise


# States: SplitTableBatchedEmbeddingBagsCodegen.__init__ of FBGEMM 1.8.
FUSED_OPTIMIZERS: Mapping[EmbOptimType, OptimizerTraits] = MappingProxyType(
    {
        EmbOptimType.NONE: OptimizerTraits(),
        EmbOptimType.SGD: OptimizerTraits(1, one_table=True),
        EmbOptimType.EXACT_SGD: OptimizerTraits(only_rows_of_the_batch=True, one_table=True, option="sgd"),
        EmbOptimType.EXACT_ADAGRAD: OptimizerTraits(
            1, never_negative=True, only_rows_of_the_batch=True, one_table=True, option="adagrad"
        ),
        EmbOptimType.EXACT_ROWWISE_ADAGRAD: OptimizerTraits(
            0, 1, never_negative=True, only_rows_of_the_batch=True, one_table=True, option="rowwise_adagrad"
        ),
        EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD: OptimizerTraits(0, 1),
        EmbOptimType.LARS_SGD: OptimizerTraits(1, only_rows_of_the_batch=True),
        EmbOptimType.ADAM: OptimizerTraits(2, only_rows_of_the_batch=True, option="adam"),
        EmbOptimType.LAMB: OptimizerTraits(2, only_rows_of_the_batch=True),
        EmbOptimType.PARTIAL_ROWWISE_ADAM: OptimizerTraits(
            1, 1, only_rows_of_the_batch=True, option="partial_rowwise_adam"
        ),
        EmbOptimType.PARTIAL_ROWWISE_LAMB: OptimizerTraits(1, 1, only_rows_of_the_batch=True),
        EmbOptimType.ENSEMBLE_ROWWISE_ADAGRAD: OptimizerTraits(1, 1),
    }
)

DEFAULT_OPTIMIZER = EmbOptimType.EXACT_SGD
"""FBGEMM's, where ``fused_params`` name none."""


def traits_of(optimizer: EmbOptimType) -> OptimizerTraits:
    """The facts of an optimizer; of one that is not in the table, none that would let it be used."""
    return FUSED_OPTIMIZERS.get(optimizer, OptimizerTraits())
