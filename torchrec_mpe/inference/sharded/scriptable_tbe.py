"""Packed tables behind the interface of FBGEMM's inference TBE, for TorchScript."""

import torch
from torch import Tensor

from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags


class ScriptablePackedTableBatchedEmbeddingBags(PackedTableBatchedEmbeddingBags):
    """A :class:`PackedTableBatchedEmbeddingBags` that ``torch.jit.script`` compiles.

    A host without Python runs the scripted module with ``libtorchrec_mpe.so`` loaded, on the CPU; the CUDA kernels are
    Triton's and need a process that has imported torchrec_mpe. Scripted, float64 is not supported and errors name
    tables and features by number.
    """

    __jit_unused_properties__ = ("nbytes", "device")

    weights: Tensor
    weights_offsets: Tensor
    rows_per_table: Tensor
    run_records: Tensor
    run_starts: Tensor
    run_offsets: Tensor
    directory_kinds: Tensor
    directory: Tensor
    directory_offsets: Tensor
    alpha: Tensor
    beta: Tensor
    beta_offsets: Tensor
    scale_index: Tensor
    zero_rows: Tensor
    zero_row_offsets: Tensor
    levels: Tensor
    levels_offsets: Tensor
    bases: Tensor
    bases_offsets: Tensor
    components: Tensor

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`PackedTableBatchedEmbeddingBags.forward`; ``out`` is not supported when scripted."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            assert out is None
            result: Tensor = torch.ops.torchrec_mpe.packed_embedding_bag_counting(
                self.weights,
                self.weights_offsets,
                self.rows_per_table,
                self.run_records,
                self.run_starts,
                self.run_offsets,
                self.directory_kinds,
                self.directory,
                self.directory_offsets,
                self.alpha,
                self.beta,
                self.beta_offsets,
                self.scale_index,
                self.zero_rows,
                self.zero_row_offsets,
                self.levels,
                self.levels_offsets,
                self.bases,
                self.bases_offsets,
                self.components,
                self.D_offsets,
                self.feature_table_map,
                self.pooling_mode,
                indices,
                offsets,
                per_sample_weights,
                self.output_dtype,
                self.bounds_check_mode,
                self.bounds_check_warning,
            )
            return result
        else:  # TorchScript leaves no more than this branch uncompiled
            return super().forward(indices, offsets, per_sample_weights, out)
