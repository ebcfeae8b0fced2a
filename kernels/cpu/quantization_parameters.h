// What the ops are told about a quantizer, checked and as the kernels take it.
#pragma once

#include <ATen/Functions.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "quantization.h"

namespace torchrec_mpe {
namespace quantization {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What search and retraining are told about the quantizer.
struct Quantizer {
  OptionalTensor probabilities;  // search only
  Tensor alpha;
  Tensor beta;
  OptionalTensor zero_rows;
  at::IntArrayRef bits;
  Tensor scale;

  bool is_search() const { return probabilities.has_value(); }
  int64_t num_lines() const { return is_search() ? probabilities->size(0) : static_cast<int64_t>(bits.size()); }
  int64_t num_tables() const { return zero_rows ? zero_rows->size(0) : 1; }
};

inline void check(const Quantizer& q, const Tensor& rows) {
  const auto m = static_cast<int64_t>(q.bits.size());
  TORCH_CHECK_VALUE(rows.dim() == 2, "rows must be [N, D], not ", rows.sizes());
  TORCH_CHECK_VALUE(m >= 1 && m <= kMaxCandidates, m, " candidate bit-widths, expected 1 to ", kMaxCandidates);
  for (const int64_t b : q.bits) {
    TORCH_CHECK_VALUE(b >= 0 && b <= kMaxBits, "candidate bit-width ", b, " is not in 0 to ", kMaxBits);
    // So there are kMaxBits of more than 0 bits at most, which the kernels have room for.
    TORCH_CHECK_VALUE(std::count(q.bits.begin(), q.bits.end(), b) == 1, "candidate bit-widths ", q.bits, " repeat ", b);
  }
  const auto same = [&](const Tensor& t, const char* name, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(t.sizes() == shape, name, " must be ", shape, ", not ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == rows.scalar_type(), name, " is ", t.scalar_type(), ", rows ", rows.scalar_type());
  };
  same(q.alpha, "alpha", {m});
  same(q.scale, "gradient_scale", {m});
  same(q.beta, "beta", {rows.size(1)});
  if (q.zero_rows) {
    same(*q.zero_rows, "zero_rows", {q.zero_rows->size(0), rows.size(1)});
  }
  if (q.is_search()) {
    same(*q.probabilities, "probabilities", {q.probabilities->size(0), m});
  }
}

// The quantizer as the kernels take it.
template <typename T>
class Prepared {
 public:
  explicit Prepared(const Quantizer& q) {
    const int64_t lanes = kVectorBytes / sizeof(T);
    const int64_t dim = q.beta.size(0);
    p_.dim = dim;
    p_.padded_dim = (dim + lanes - 1) / lanes * lanes;
    const auto padded = [&](const Tensor& t) {
      Tensor whole = at::zeros({t.size(0), p_.padded_dim}, t.options());
      whole.narrow(1, 0, dim).copy_(t);
      return whole;
    };
    beta_ = padded(q.beta.detach().unsqueeze(0));
    zero_rows_ = q.zero_rows ? padded(q.zero_rows->detach()) : at::zeros({1, p_.padded_dim}, q.beta.options());
    p_.beta = beta_.template const_data_ptr<T>();
    p_.zero_rows = zero_rows_.template const_data_ptr<T>();
    const Tensor alpha = q.alpha.contiguous(), scale = q.scale.contiguous();
    const T* a = alpha.template const_data_ptr<T>();
    const T* s = scale.template const_data_ptr<T>();
    // Codes stay shifted by what rounds them: see quantization.inc.h.
    const T shift = std::is_same_v<T, float> ? T(12582912.0) : T(6755399441055744.0);
    p_.num_candidates = 0;
    for (size_t c = 0; c < q.bits.size(); ++c) {
      const int64_t bits = q.bits[c];
      const T half = bits == 0 ? 0 : static_cast<T>(int64_t{1} << (bits - 1));
      const int k = q.is_search() ? p_.num_candidates : static_cast<int>(c);
      if (bits != 0) {
        ++p_.num_candidates;
        candidate_.push_back(static_cast<int>(c));
      } else if (q.is_search()) {
        continue;
      }
      p_.low[k] = shift - half;
      p_.high[k] = bits == 0 ? shift : shift + half - 1;
      p_.step[k] = bits == 0 ? 1 : a[c];
      p_.scale[k] = bits == 0 ? 0 : s[c];
      p_.is_zero[k] = bits == 0;
      if (bits != 0 && q.is_search()) {
        p_.inverse_step[k] = 1 / a[c];
      }
    }
    if (q.is_search()) {
      fill_groups(*q.probabilities, q.bits, a, s);
    }
  }

  const Parameters<T>& parameters() const { return p_; }
  // The candidates of more than 0 bits.
  const std::vector<int>& candidates() const { return candidate_; }

 private:
  void fill_groups(const Tensor& probabilities, at::IntArrayRef bits, const T* alpha, const T* scale) {
    const int64_t num_groups = probabilities.size(0), m = probabilities.size(1);
    groups_ = at::zeros({num_groups, kGroupFields}, probabilities.options().requires_grad(false));
    const Tensor contiguous = probabilities.contiguous();
    const T* p = contiguous.template const_data_ptr<T>();
    T* line = groups_.template mutable_data_ptr<T>();
    p_.groups = line;
    for (int64_t g = 0; g < num_groups; ++g, p += m, line += kGroupFields) {
      int k = 0;
      for (int64_t c = 0; c < m; ++c) {
        if (bits[c] == 0) {
          line[kZeroP] = p[c];
          continue;
        }
        line[kStepTimesP + k] = p[c] * alpha[c];
        line[kP + k] = p[c];
        line[kScaledP + k] = p[c] * scale[c];
        line[kNonzeroP] += p[c];
        line[kAllScaledP] += line[kScaledP + k];
        ++k;
      }
    }
  }

  Parameters<T> p_{};
  Tensor beta_, zero_rows_, groups_;
  std::vector<int> candidate_;
};

}  // namespace quantization
}  // namespace torchrec_mpe
