"""What the library has to know of each optimizer that FBGEMM fuses into its TBEs: the only table of such facts."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode


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
        decays (bool): it has a weight decay; of the others, FBGEMM ignores one that is given.
        option (Optional[str]): its name on the command line.
    """

    elementwise: int = 0
    rowwise: int = 0
    never_negative: bool = False
    only_rows_of_the_batch: bool = False
    one_table: bool = False
    decays: bool = False
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
            0,
            1,
            never_negative=True,
            only_rows_of_the_batch=True,
            one_table=True,
            decays=True,
            option="rowwise_adagrad",
        ),
        EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD: OptimizerTraits(0, 1, decays=True),
        EmbOptimType.LARS_SGD: OptimizerTraits(1, only_rows_of_the_batch=True, decays=True),
        EmbOptimType.ADAM: OptimizerTraits(2, only_rows_of_the_batch=True, decays=True, option="adam"),
        EmbOptimType.LAMB: OptimizerTraits(2, only_rows_of_the_batch=True, decays=True),
        EmbOptimType.PARTIAL_ROWWISE_ADAM: OptimizerTraits(
            1, 1, only_rows_of_the_batch=True, decays=True, option="partial_rowwise_adam"
        ),
        EmbOptimType.PARTIAL_ROWWISE_LAMB: OptimizerTraits(1, 1, only_rows_of_the_batch=True, decays=True),
        EmbOptimType.ENSEMBLE_ROWWISE_ADAGRAD: OptimizerTraits(1, 1, decays=True),
    }
)

DEFAULT_OPTIMIZER = EmbOptimType.EXACT_SGD
"""FBGEMM's, where ``fused_params`` name none."""


def traits_of(optimizer: EmbOptimType) -> OptimizerTraits:
    """The facts of an optimizer; of one that is not in the table, none that would let it be used."""
    return FUSED_OPTIMIZERS.get(optimizer, OptimizerTraits())


_ROWWISE_ADAGRAD = (
    EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD,
    EmbOptimType.ENSEMBLE_ROWWISE_ADAGRAD,
)
_MODES = (WeightDecayMode.L2, WeightDecayMode.DECOUPLE)


def refusal_of_weight_decay(fused_params: Mapping[str, Any], *, pooled_on_cpu: bool) -> str | None:
    """Why FBGEMM would train otherwise than by the weight decay that ``fused_params`` ask for; None if it does not.

    Args:
        fused_params (Mapping[str, Any]): of a TBE.
        pooled_on_cpu (bool): it pools, on CPU, one feature a table: FBGEMM 1.8 then passes row-wise Adagrad's kernel a
            weight decay of 0 (``embedding_backward_split_cpu_template.cpp``, "fbgemm handles common case").
    """
    optimizer = fused_params.get("optimizer", DEFAULT_OPTIMIZER)
    mode = fused_params.get("weight_decay_mode", WeightDecayMode.NONE)
    if optimizer in _ROWWISE_ADAGRAD and mode not in (WeightDecayMode.NONE, *_MODES):
        return f"weight_decay_mode={mode.name} of {optimizer.value} is not supported: use L2 or DECOUPLE"
    decay = fused_params.get("weight_decay", 0)
    if not decay:
        return None
    if not traits_of(optimizer).decays:
        return f"{optimizer.value} has no weight decay, FBGEMM ignores weight_decay={decay}: leave it out"
    if optimizer not in _ROWWISE_ADAGRAD:
        return None
    if mode not in _MODES:
        return f"{optimizer.value} ignores weight_decay={decay} without a weight_decay_mode: give L2 or DECOUPLE"
    if pooled_on_cpu:
        return (
            f"FBGEMM's CPU kernel for pooled tables of one feature leaves weight_decay={decay} of {optimizer.value} "
            "out: train on a GPU, or without weight decay"
        )
    return None
