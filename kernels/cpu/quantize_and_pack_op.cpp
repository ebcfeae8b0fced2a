// torch.ops.torchrec_mpe.quantize_and_pack: torchrec_mpe/ops/quantize_and_pack.py says what it computes.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "quantize_and_pack.h"

namespace torchrec_mpe {
namespace {

using at::Tensor;

Tensor quantize_and_pack(const Tensor& rows, int64_t bits, const Tensor& alpha, const Tensor& beta) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kFloat && alpha.scalar_type() == at::kFloat &&
                       beta.scalar_type() == at::kFloat,
                   "rows, alpha and beta must be float32");
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8, "bits must lie between 1 and 8, got ", bits);
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(1) >= 1 && alpha.numel() == 1 && beta.dim() == 1 &&
                        beta.size(0) == rows.size(1),
                    "rows must be [n, D], alpha a scalar and beta [D]");
  const Tensor values = rows.contiguous();
  const Tensor offset = beta.contiguous();
  const int64_t n = rows.size(0);
  const int64_t row_bytes = (rows.size(1) + 7) / 8 * bits;
  Tensor packed = at::empty({n, row_bytes}, rows.options().dtype(at::kByte));
  const RowsToPack all{values.const_data_ptr<float>(), rows.size(1), static_cast<int>(bits),
                       *alpha.const_data_ptr<float>(), offset.const_data_ptr<float>(), packed.data_ptr<uint8_t>()};
  const PackRows pack_rows = TORCHREC_MPE_OF_THIS_CPU(pack_rows);
  const int64_t grain = std::max<int64_t>(1, 65536 / rows.size(1));
  at::parallel_for(0, n, grain, [&](int64_t first, int64_t last) { pack_rows(all, first, last); });
  return packed;
}

}  // namespace
}  // namespace torchrec_mpe

TORCH_LIBRARY_FRAGMENT(torchrec_mpe, m) {
  m.def("quantize_and_pack(Tensor rows, int bits, Tensor alpha, Tensor beta) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchrec_mpe, CPU, m) {
  m.impl("quantize_and_pack", torchrec_mpe::quantize_and_pack);
}
