// Ops that quantize embedding rows in training, alone or pooled into bags, and their backwards.
// Work is cut into chunks that depend on the input only, each with sums of its own that are added up in order: results
// are the same for any number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu_capability.h"
#include "quantization.h"
#include "quantization_bags.h"
#include "quantization_gradients.h"
#include "quantization_parameters.h"
#include "simd_targets.h"

namespace torchrec_mpe {
namespace quantization {

template <typename T>
Kernels<T> kernels() {
#ifdef TORCHREC_MPE_X86
  switch (cpu_capability()) {
    case CpuCapability::Avx512:
      return avx512::kernels<T>();
    case CpuCapability::Avx2:
      return avx2::kernels<T>();
    default:
      break;
  }
#endif
  return scalar::kernels<T>();
}

namespace {

constexpr int64_t kRowsPerChunk = 8192;
constexpr int64_t kMaxChunks = 64;

int64_t chunks_of(int64_t rows) {
  return std::clamp<int64_t>(rows / kRowsPerChunk, 1, kMaxChunks);
}

template <typename T>
auto forward_kernel(const Quantizer& q) {
  return q.is_search() ? kernels<T>().expected_forward : kernels<T>().fixed_forward;
}

template <typename T>
auto backward_kernel(const Quantizer& q) {
  return q.is_search() ? kernels<T>().expected_backward : kernels<T>().fixed_backward;
}

void check_grad(const Tensor& grad, at::IntArrayRef shape, const Tensor& rows) {
  TORCH_CHECK_VALUE(grad.sizes() == shape, "grad must be ", shape, " like the output, not ", grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == rows.scalar_type(), "grad is ", grad.scalar_type(), ", rows ",
                   rows.scalar_type());
}

// Source is EachRow, with an output row of its own for each row, or EachBag without an index.
template <typename Source>
Tensor forward(const Quantizer& q, const Source& source, Tensor out, bool pooled) {
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "quantization", [&] {
    const Prepared<scalar_t> prepared(q);
    const auto kernel = forward_kernel<scalar_t>(q);
    scalar_t* to = out.template mutable_data_ptr<scalar_t>();
    const int64_t chunks = chunks_of(source.num_ids());
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      source.template each_block<scalar_t>(
          source.bound(begin, chunks), source.bound(end, chunks),
          [&](const Block<scalar_t>& block, const int64_t*) { kernel(block, prepared.parameters(), pooled, to); });
    });
  });
  return out;
}

template <typename Source>
Gradients backward(const Quantizer& q, const Source& source, const Tensor& grad_out, double factor,
                   bool weights_require_grad) {
  const Tensor grad = grad_out.contiguous();
  const Tensor grad_rows = at::empty_like(source.rows());
  const Tensor grad_weights = at::empty({weights_require_grad ? source.num_ids() : 0}, grad_rows.options());
  Gradients gradients;
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "quantization_backward", [&] {
    const Prepared<scalar_t> prepared(q);
    const auto kernel = backward_kernel<scalar_t>(q);
    ChunkSums<scalar_t> sums(q, prepared);
    const int64_t chunks = sums.allocate(chunks_of(source.num_ids()));
    const int64_t dim = prepared.parameters().dim;
    const scalar_t* from = grad.template const_data_ptr<scalar_t>();
    scalar_t* to = grad_rows.template mutable_data_ptr<scalar_t>();
    scalar_t* to_weights = weights_require_grad ? grad_weights.template mutable_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch(2 * prepared.parameters().padded_dim);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        source.template each_block<scalar_t>(
            source.bound(chunk, chunks), source.bound(chunk + 1, chunks),
            [&](const Block<scalar_t>& block, const int64_t*) {
              kernel(block, prepared.parameters(), from, to + block.first * dim,
                     to_weights == nullptr ? nullptr : to_weights + block.first, scratch.data(), sums.of(chunk));
            });
      }
    });
    gradients = sums.finish(grad_rows, grad_weights, factor);
  });
  return gradients;
}

// With an index. Features share no rows: each quantizes its own into a buffer that stays in the cache and pools them.
Tensor indexed_forward(const Quantizer& q, const EachBag& bags) {
  Tensor out = at::zeros(bags.pooled_shape(), bags.rows().options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "quantization", [&] {
    const Prepared<scalar_t> prepared(q);
    const auto kernel = forward_kernel<scalar_t>(q);
    const auto add_rows = kernels<scalar_t>().add_rows;
    const int64_t dim = prepared.parameters().dim;
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, bags.num_features(), 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> quantized;
      for (int64_t f = begin; f < end; ++f) {
        quantized.resize(std::max<size_t>(quantized.size(), bags.num_rows(f) * dim));
        bags.each_block_of_rows<scalar_t>(
            f, [&](const Block<scalar_t>& block) { kernel(block, prepared.parameters(), false, quantized.data()); });
        bags.each_block<scalar_t>(bags.first_bag(f), bags.first_bag(f + 1),
                                  [&](const Block<scalar_t>& block, const int64_t* row) {
                                    add_rows(block.size, dim, quantized.data(), row, block.weight, to, block.offset);
                                  });
      }
    });
  });
  return out;
}

Gradients indexed_backward(const Quantizer& q, const EachBag& bags, const Tensor& grad_out, double factor,
                           bool weights_require_grad) {
  const Tensor grad = grad_out.contiguous();
  const Tensor grad_rows = at::empty_like(bags.rows());
  const Tensor grad_weights = at::empty({weights_require_grad ? bags.num_ids() : 0}, grad_rows.options());
  Gradients gradients;
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "quantization_backward", [&] {
    const Prepared<scalar_t> prepared(q);
    const Parameters<scalar_t>& p = prepared.parameters();
    const auto kernel = backward_kernel<scalar_t>(q);
    ChunkSums<scalar_t> sums(q, prepared);
    const int64_t features = bags.num_features();
    const int64_t chunks = sums.allocate(std::min(features, kMaxChunks));
    const scalar_t* from = grad.const_data_ptr<scalar_t>();
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch(2 * p.padded_dim), quantized;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        for (int64_t f = features * chunk / chunks; f < features * (chunk + 1) / chunks; ++f) {
          // First the gradient of the quantized rows, then in its place that of the rows: a kernel reads the gradient of
          // an element before it writes there.
          scalar_t* to = grad_rows.mutable_data_ptr<scalar_t>() + bags.first_row_of(f) * p.dim;
          std::fill_n(to, bags.num_rows(f) * p.dim, scalar_t(0));
          bags.each_block<scalar_t>(
              bags.first_bag(f), bags.first_bag(f + 1), [&](const Block<scalar_t>& block, const int64_t* row) {
                kernels<scalar_t>().add_rows(block.size, p.dim, from, block.offset, block.weight, to, row);
              });
          bags.each_block_of_rows<scalar_t>(f, [&](const Block<scalar_t>& block) {
            kernel(block, p, to, to + block.first * p.dim, nullptr, scratch.data(), sums.of(chunk));
          });
          if (weights_require_grad) {
            scalar_t* to_weights = grad_weights.mutable_data_ptr<scalar_t>();
            quantized.resize(std::max<size_t>(quantized.size(), bags.num_rows(f) * p.dim));
            bags.each_block_of_rows<scalar_t>(f, [&](const Block<scalar_t>& block) {
              forward_kernel<scalar_t>(q)(block, p, false, quantized.data());
            });
            bags.each_block<scalar_t>(
                bags.first_bag(f), bags.first_bag(f + 1), [&](const Block<scalar_t>& block, const int64_t* row) {
                  kernels<scalar_t>().dot_rows(block.size, p.dim, from, block.offset, quantized.data(), row,
                                               block.inverse_length, to_weights + block.first);
                });
          }
        }
      }
    });
    gradients = sums.finish(grad_rows, grad_weights, factor);
  });
  return gradients;
}

Tensor pooled_forward(const Quantizer& q, const EachBag& bags) {
  return bags.is_indexed() ? indexed_forward(q, bags)
                           : forward(q, bags, at::zeros(bags.pooled_shape(), bags.rows().options()), true);
}

Gradients pooled_backward(const Quantizer& q, const EachBag& bags, const Tensor& grad, double factor,
                          bool weights_require_grad) {
  check_grad(grad, bags.pooled_shape(), bags.rows());
  return bags.is_indexed() ? indexed_backward(q, bags, grad, factor, weights_require_grad)
                           : backward(q, bags, grad, factor, weights_require_grad);
}

Tensor expected_quantization(const Tensor& rows, const Tensor& probabilities, const Tensor& group, const Tensor& alpha,
                             const Tensor& beta, const OptionalTensor& zero_rows, const OptionalTensor& table,
                             at::IntArrayRef bits, const Tensor& scale) {
  const Quantizer q{probabilities, alpha, beta, zero_rows, bits, scale};
  check(q, rows);
  return forward(q, EachRow(rows, group, table, q), at::empty(rows.sizes(), rows.options()), false);
}

Tensor fixed_quantization(const Tensor& rows, const Tensor& candidate, const Tensor& alpha, const Tensor& beta,
                          const OptionalTensor& zero_rows, const OptionalTensor& table, at::IntArrayRef bits,
                          const Tensor& scale) {
  const Quantizer q{std::nullopt, alpha, beta, zero_rows, bits, scale};
  check(q, rows);
  return forward(q, EachRow(rows, candidate, table, q), at::empty(rows.sizes(), rows.options()), false);
}

Gradients expected_quantization_backward(const Tensor& grad, const Tensor& rows, const Tensor& probabilities,
                                         const Tensor& group, const Tensor& alpha, const Tensor& beta,
                                         const OptionalTensor& zero_rows, const OptionalTensor& table,
                                         at::IntArrayRef bits, const Tensor& scale) {
  const Quantizer q{probabilities, alpha, beta, zero_rows, bits, scale};
  check(q, rows);
  check_grad(grad, rows.sizes(), rows);
  return backward(q, EachRow(rows, group, table, q), grad, 1, false);
}

Gradients fixed_quantization_backward(const Tensor& grad, const Tensor& rows, const Tensor& candidate,
                                      const Tensor& alpha, const Tensor& beta, const OptionalTensor& zero_rows,
                                      const OptionalTensor& table, at::IntArrayRef bits, const Tensor& scale) {
  const Quantizer q{std::nullopt, alpha, beta, zero_rows, bits, scale};
  check(q, rows);
  check_grad(grad, rows.sizes(), rows);
  return backward(q, EachRow(rows, candidate, table, q), grad, 1, false);
}

Tensor expected_embedding_bag(const Tensor& rows, const Tensor& ids, const Tensor& offsets,
                              at::IntArrayRef bags_per_feature, at::IntArrayRef first_row, at::IntArrayRef num_rows,
                              at::IntArrayRef table, at::IntArrayRef pooling_mode, bool side_by_side,
                              const Tensor& row_group, const Tensor& probabilities, const Tensor& alpha,
                              const Tensor& beta, const OptionalTensor& zero_rows, at::IntArrayRef bits,
                              const Tensor& scale, const OptionalTensor& weights, double /*gradient_factor*/,
                              const OptionalTensor& index, const OptionalTensor& row_offsets) {
  const Quantizer q{probabilities, alpha, beta, zero_rows, bits, scale};
  check(q, rows);
  const EachBag bags(rows, ids, offsets, bags_per_feature, first_row, num_rows, table, pooling_mode, side_by_side, row_group,
                     weights, index, row_offsets, q);
  return pooled_forward(q, bags);
}

Tensor fixed_embedding_bag(const Tensor& rows, const Tensor& ids, const Tensor& offsets,
                           at::IntArrayRef bags_per_feature, at::IntArrayRef first_row, at::IntArrayRef num_rows,
                           at::IntArrayRef table, at::IntArrayRef pooling_mode, bool side_by_side,
                           const Tensor& row_candidate, const Tensor& alpha, const Tensor& beta,
                           const OptionalTensor& zero_rows, at::IntArrayRef bits, const Tensor& scale,
                           const OptionalTensor& weights, double /*gradient_factor*/,
                              const OptionalTensor& index, const OptionalTensor& row_offsets) {
  const Quantizer q{std::nullopt, alpha, beta, zero_rows, bits, scale};
  check(q, rows);
  const EachBag bags(rows, ids, offsets, bags_per_feature, first_row, num_rows, table, pooling_mode, side_by_side,
                     row_candidate, weights, index, row_offsets, q);
  return pooled_forward(q, bags);
}

Gradients expected_embedding_bag_backward(const Tensor& grad, const Tensor& rows, const Tensor& ids,
                                          const Tensor& offsets, at::IntArrayRef bags_per_feature,
                                          at::IntArrayRef first_row, at::IntArrayRef num_rows, at::IntArrayRef table,
                                          at::IntArrayRef pooling_mode, bool side_by_side, const Tensor& row_group,
                                          const Tensor& probabilities, const Tensor& alpha, const Tensor& beta,
                                          const OptionalTensor& zero_rows, at::IntArrayRef bits, const Tensor& scale,
                                          const OptionalTensor& weights, double gradient_factor,
                                          const OptionalTensor& index, const OptionalTensor& row_offsets,
                                          bool weights_require_grad) {
  const Quantizer q{probabilities, alpha, beta, zero_rows, bits, scale};
  check(q, rows);
  const EachBag bags(rows, ids, offsets, bags_per_feature, first_row, num_rows, table, pooling_mode, side_by_side, row_group,
                     weights, index, row_offsets, q);
  return pooled_backward(q, bags, grad, gradient_factor, weights_require_grad);
}

Gradients fixed_embedding_bag_backward(const Tensor& grad, const Tensor& rows, const Tensor& ids, const Tensor& offsets,
                                       at::IntArrayRef bags_per_feature, at::IntArrayRef first_row,
                                       at::IntArrayRef num_rows, at::IntArrayRef table, at::IntArrayRef pooling_mode,
                                       bool side_by_side, const Tensor& row_candidate, const Tensor& alpha,
                                       const Tensor& beta, const OptionalTensor& zero_rows, at::IntArrayRef bits,
                                       const Tensor& scale, const OptionalTensor& weights, double gradient_factor,
                                       const OptionalTensor& index, const OptionalTensor& row_offsets,
                                       bool weights_require_grad) {
  const Quantizer q{std::nullopt, alpha, beta, zero_rows, bits, scale};
  check(q, rows);
  const EachBag bags(rows, ids, offsets, bags_per_feature, first_row, num_rows, table, pooling_mode, side_by_side,
                     row_candidate, weights, index, row_offsets, q);
  return pooled_backward(q, bags, grad, gradient_factor, weights_require_grad);
}

}  // namespace
}  // namespace quantization
}  // namespace torchrec_mpe

#define TORCHREC_MPE_STEPS "Tensor alpha, Tensor beta, Tensor? zero_rows"
#define TORCHREC_MPE_CANDIDATES "int[] candidate_bits, Tensor gradient_scale"
#define TORCHREC_MPE_BAGS                                                                                       \
  "Tensor rows, Tensor ids, Tensor offsets, int[] bags_per_feature, int[] first_row, int[] num_rows, int[] table, " \
  "int[] pooling_mode, bool side_by_side"
#define TORCHREC_MPE_WEIGHTS \
  "Tensor? per_sample_weights, float gradient_factor, Tensor? index, Tensor? row_offsets"
#define TORCHREC_MPE_GRADIENTS "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

TORCH_LIBRARY_FRAGMENT(torchrec_mpe, m) {
  m.def("expected_quantization(Tensor rows, Tensor probabilities, Tensor group, " TORCHREC_MPE_STEPS
        ", Tensor? table, " TORCHREC_MPE_CANDIDATES ") -> Tensor");
  m.def("expected_quantization_backward(Tensor grad, Tensor rows, Tensor probabilities, Tensor group, "
        TORCHREC_MPE_STEPS ", Tensor? table, " TORCHREC_MPE_CANDIDATES ") -> " TORCHREC_MPE_GRADIENTS);
  m.def("fixed_quantization(Tensor rows, Tensor candidate, " TORCHREC_MPE_STEPS
        ", Tensor? table, " TORCHREC_MPE_CANDIDATES ") -> Tensor");
  m.def("fixed_quantization_backward(Tensor grad, Tensor rows, Tensor candidate, " TORCHREC_MPE_STEPS
        ", Tensor? table, " TORCHREC_MPE_CANDIDATES ") -> " TORCHREC_MPE_GRADIENTS);
  m.def("expected_embedding_bag(" TORCHREC_MPE_BAGS ", Tensor row_group, Tensor probabilities, " TORCHREC_MPE_STEPS
        ", " TORCHREC_MPE_CANDIDATES ", " TORCHREC_MPE_WEIGHTS ") -> Tensor");
  m.def("expected_embedding_bag_backward(Tensor grad, " TORCHREC_MPE_BAGS ", Tensor row_group, Tensor probabilities, "
        TORCHREC_MPE_STEPS ", " TORCHREC_MPE_CANDIDATES ", " TORCHREC_MPE_WEIGHTS
        ", bool weights_require_grad) -> " TORCHREC_MPE_GRADIENTS);
  m.def("fixed_embedding_bag(" TORCHREC_MPE_BAGS ", Tensor row_candidate, " TORCHREC_MPE_STEPS
        ", " TORCHREC_MPE_CANDIDATES ", " TORCHREC_MPE_WEIGHTS ") -> Tensor");
  m.def("fixed_embedding_bag_backward(Tensor grad, " TORCHREC_MPE_BAGS ", Tensor row_candidate, " TORCHREC_MPE_STEPS
        ", " TORCHREC_MPE_CANDIDATES ", " TORCHREC_MPE_WEIGHTS
        ", bool weights_require_grad) -> " TORCHREC_MPE_GRADIENTS);
}

TORCH_LIBRARY_IMPL(torchrec_mpe, CPU, m) {
  using namespace torchrec_mpe::quantization;
  m.impl("expected_quantization", expected_quantization);
  m.impl("expected_quantization_backward", expected_quantization_backward);
  m.impl("fixed_quantization", fixed_quantization);
  m.impl("fixed_quantization_backward", fixed_quantization_backward);
  m.impl("expected_embedding_bag", expected_embedding_bag);
  m.impl("expected_embedding_bag_backward", expected_embedding_bag_backward);
  m.impl("fixed_embedding_bag", fixed_embedding_bag);
  m.impl("fixed_embedding_bag_backward", fixed_embedding_bag_backward);
}
