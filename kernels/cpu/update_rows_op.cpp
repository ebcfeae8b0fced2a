// torch.ops.torchrec_mpe.update_rows_: torchrec_mpe/ops/update_rows.py says what it does.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "row_lock.h"

namespace torchrec_mpe {
namespace {

using at::Tensor;

void update_rows_(const Tensor& weights, const Tensor& starts, const Tensor& rows) {
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kByte && rows.scalar_type() == at::kByte,
                   "weights and rows must be uint8, got ", weights.scalar_type(), " and ", rows.scalar_type());
  TORCH_CHECK_TYPE(starts.scalar_type() == at::kLong, "starts must be int64, got ", starts.scalar_type());
  TORCH_CHECK_VALUE(weights.device().is_cpu() && starts.device().is_cpu() && rows.device().is_cpu(),
                    "weights, starts and rows must be on one device");
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.is_contiguous() && starts.dim() == 1 && rows.dim() == 2 &&
                        rows.size(0) == starts.size(0) && rows.size(1) >= 1,
                    "weights must be [P], contiguous, starts [n] and rows [n, row_bytes], got ", weights.sizes(), ", ",
                    starts.sizes(), " and ", rows.sizes());
  const Tensor from = starts.contiguous();
  const Tensor packed = rows.contiguous();
  const int64_t* const start = from.const_data_ptr<int64_t>();
  const int64_t last = weights.numel() - rows.size(1);
  // All are checked before the first is written: an error leaves the weights as they were.
  for (int64_t i = 0; i < starts.size(0); ++i) {
    TORCH_CHECK_VALUE(start[i] >= 0 && start[i] <= last, "row ", i, ": its ", rows.size(1), " bytes from byte ",
                      start[i], " on leave the ", weights.numel(), " of weights");
  }
  if (starts.size(0) > 0) {
    write_rows(weights.storage().data(), weights.mutable_data_ptr<uint8_t>(),
               {start, packed.const_data_ptr<uint8_t>(), starts.size(0), rows.size(1)});
  }
}

}  // namespace
}  // namespace torchrec_mpe

TORCH_LIBRARY_FRAGMENT(torchrec_mpe, m) {
  m.def("update_rows_(Tensor(a!) weights, Tensor starts, Tensor rows) -> ()");
}

TORCH_LIBRARY_IMPL(torchrec_mpe, CPU, m) {
  m.impl("update_rows_", torchrec_mpe::update_rows_);
}
