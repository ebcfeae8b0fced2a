// Gradients of what a quantizer's rows share: summed chunk by chunk, added up in order.
#pragma once

#include <ATen/Functions.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "quantization.h"
#include "quantization_parameters.h"

namespace torchrec_mpe {
namespace quantization {

// Of rows, probabilities, alpha, beta, zero rows and weights; empty for what there is not.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
class ChunkSums {
 public:
  ChunkSums(const Quantizer& q, const Prepared<T>& prepared)
      : q_(q),
        prepared_(prepared),
        at_zero_rows_(kMaxCandidates + prepared.parameters().padded_dim),
        at_groups_(at_zero_rows_ + q.num_tables() * prepared.parameters().padded_dim),
        stride_(at_groups_ + (q.is_search() ? q.num_lines() * kSums : 0)) {}

  // With many groups or tables, fewer chunks than wanted.
  int64_t allocate(int64_t wanted_chunks) {
    const int64_t chunks = std::clamp<int64_t>(wanted_chunks, 1, std::max<int64_t>(1, kMaxSums / stride_));
    sums_.assign(chunks * stride_, 0);
    return chunks;
  }

  Sums of(int64_t chunk) {
    double* mine = sums_.data() + chunk * stride_;
    return {mine, mine + kMaxCandidates, mine + at_zero_rows_, mine + at_groups_};
  }

  Gradients finish(const Tensor& grad_rows, const Tensor& grad_weights, double factor) {
    for (size_t i = stride_; i < sums_.size(); ++i) {
      sums_[i % stride_] += sums_[i];
    }
    const auto options = grad_rows.options();
    const Tensor grad_alpha = at::zeros(q_.alpha.sizes(), options);
    const Tensor grad_beta = at::empty(q_.beta.sizes(), options);
    const Tensor grad_probabilities =
        q_.is_search() ? at::empty(q_.probabilities->sizes(), options) : at::empty({0}, options);
    const Tensor grad_zero_rows = q_.zero_rows ? at::empty(q_.zero_rows->sizes(), options) : at::empty({0}, options);
    const Parameters<T>& p = prepared_.parameters();
    const std::vector<int>& candidates = prepared_.candidates();
    const Tensor alpha = q_.alpha.contiguous(), scale = q_.scale.contiguous();
    const T* a = alpha.template const_data_ptr<T>();
    const T* s = scale.template const_data_ptr<T>();
    const auto scaled = [factor](double sum) { return static_cast<T>(factor * sum); };

    if (q_.is_search()) {
      T* line = grad_probabilities.template mutable_data_ptr<T>();
      const double* dots = sums_.data() + at_groups_;
      const T* group = p.groups;
      for (int64_t g = 0; g < q_.num_lines(); ++g, dots += kSums, group += kGroupFields) {
        for (size_t k = 0; k < candidates.size(); ++k) {
          sums_[k] += group[kP + k] * dots[k];
        }
        for (size_t c = 0, k = 0; c < q_.bits.size(); ++c) {
          *line++ = scaled(q_.bits[c] == 0 ? dots[candidates.size()] : a[c] * dots[k++] + dots[candidates.size() + 1]);
        }
      }
    }
    for (size_t k = 0; k < candidates.size(); ++k) {
      const int c = candidates[k];
      grad_alpha.template mutable_data_ptr<T>()[c] = scaled(s[c] * sums_[q_.is_search() ? k : c]);
    }
    for (int64_t d = 0; d < p.dim; ++d) {
      grad_beta.template mutable_data_ptr<T>()[d] = scaled(sums_[kMaxCandidates + d]);
    }
    if (q_.zero_rows) {
      T* zero = grad_zero_rows.template mutable_data_ptr<T>();
      for (int64_t t = 0; t < q_.num_tables(); ++t) {
        for (int64_t d = 0; d < p.dim; ++d) {
          *zero++ = scaled(sums_[at_zero_rows_ + t * p.padded_dim + d]);
        }
      }
    }
    return {grad_rows, grad_probabilities, grad_alpha, grad_beta, grad_zero_rows, grad_weights};
  }

 private:
  static constexpr int64_t kMaxSums = int64_t{1} << 22;

  const Quantizer& q_;
  const Prepared<T>& prepared_;
  int64_t at_zero_rows_, at_groups_, stride_;
  std::vector<double> sums_;
};

}  // namespace quantization
}  // namespace torchrec_mpe
