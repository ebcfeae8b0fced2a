// torch.ops.torchrec_mpe.quantized_embedding_bag: torchrec_mpe/ops/quantized_embedding_bag.py says what it does.
// Work is cut into chunks that depend on the input only, each with sums of its own that are added up in order: results
// are the same for any number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "quantization.h"
#include "quantization_bags.h"
#include "quantization_gradients.h"
#include "quantization_parameters.h"

namespace torchrec_mpe {
namespace quantization {

namespace {

constexpr int64_t kRowsPerChunk = 8192;
constexpr int64_t kMaxChunks = 64;

int64_t chunks_of(int64_t rows) {
  return std::clamp<int64_t>(rows / kRowsPerChunk, 1, kMaxChunks);
}

template <typename T>
Kernels<T> kernels_for(const Quantizer& q) {
  return TORCHREC_MPE_OF_THIS_CPU(kernels<T>)(q.is_search());
}

Tensor forward(const Quantizer& q, const Bags& bags) {
  Tensor out = at::zeros(bags.pooled_shape(), bags.rows().options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "quantized_embedding_bag", [&] {
    const Prepared<scalar_t> prepared(q);
    const Kernels<scalar_t> kernels = kernels_for<scalar_t>(q);
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    const int64_t chunks = chunks_of(bags.num_ids());
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      bags.each_block<scalar_t>(bags.bound(begin, chunks), bags.bound(end, chunks),
                                [&](const Block<scalar_t>& block, const int64_t*) {
                                  kernels.forward(block, prepared.parameters(), true, to);
                                });
    });
  });
  return out;
}

Gradients backward(const Quantizer& q, const Bags& bags, const Tensor& grad, double factor,
                   bool weights_require_grad) {
  const Tensor grad_rows = at::empty_like(bags.rows());
  const Tensor grad_weights = at::empty({weights_require_grad ? bags.num_ids() : 0}, grad_rows.options());
  Gradients gradients;
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "quantized_embedding_bag_backward", [&] {
    const Prepared<scalar_t> prepared(q);
    const Kernels<scalar_t> kernels = kernels_for<scalar_t>(q);
    ChunkSums<scalar_t> sums(q, prepared);
    const int64_t chunks = sums.allocate(chunks_of(bags.num_ids()));
    const int64_t dim = prepared.parameters().dim;
    const scalar_t* from = grad.const_data_ptr<scalar_t>();
    scalar_t* to = grad_rows.mutable_data_ptr<scalar_t>();
    scalar_t* to_weights = weights_require_grad ? grad_weights.mutable_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> scratch(2 * prepared.parameters().padded_dim);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        bags.each_block<scalar_t>(
            bags.bound(chunk, chunks), bags.bound(chunk + 1, chunks),
            [&](const Block<scalar_t>& block, const int64_t*) {
              kernels.backward(block, prepared.parameters(), from, to + block.first * dim,
                               to_weights == nullptr ? nullptr : to_weights + block.first, scratch.data(),
                               sums.of(chunk));
            });
      }
    });
    gradients = sums.finish(grad_rows, grad_weights, factor);
  });
  return gradients;
}

// With an index. Features share no rows: each quantizes its own into a buffer that stays in the cache and pools them.
Tensor indexed_forward(const Quantizer& q, const Bags& bags) {
  Tensor out = at::zeros(bags.pooled_shape(), bags.rows().options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "quantized_embedding_bag", [&] {
    const Prepared<scalar_t> prepared(q);
    const Kernels<scalar_t> kernels = kernels_for<scalar_t>(q);
    const int64_t dim = prepared.parameters().dim;
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, bags.num_features(), 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> quantized;
      for (int64_t f = begin; f < end; ++f) {
        quantized.resize(std::max<size_t>(quantized.size(), bags.num_rows(f) * dim));
        bags.each_block_of_rows<scalar_t>(f, [&](const Block<scalar_t>& block) {
          kernels.forward(block, prepared.parameters(), false, quantized.data());
        });
        bags.each_block<scalar_t>(bags.first_bag(f), bags.first_bag(f + 1),
                                  [&](const Block<scalar_t>& block, const int64_t* row) {
                                    kernels.add_rows(block.size, dim, quantized.data(), row, block.weight, to,
                                                     block.offset);
                                  });
      }
    });
  });
  return out;
}

Gradients indexed_backward(const Quantizer& q, const Bags& bags, const Tensor& grad, double factor,
                           bool weights_require_grad) {
  const Tensor grad_rows = at::empty_like(bags.rows());
  const Tensor grad_weights = at::empty({weights_require_grad ? bags.num_ids() : 0}, grad_rows.options());
  Gradients gradients;
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "quantized_embedding_bag_backward", [&] {
    const Prepared<scalar_t> prepared(q);
    const Parameters<scalar_t>& p = prepared.parameters();
    const Kernels<scalar_t> kernels = kernels_for<scalar_t>(q);
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
                kernels.add_rows(block.size, p.dim, from, block.offset, block.weight, to, row);
              });
          bags.each_block_of_rows<scalar_t>(f, [&](const Block<scalar_t>& block) {
            kernels.backward(block, p, to, to + block.first * p.dim, nullptr, scratch.data(), sums.of(chunk));
          });
          if (weights_require_grad) {
            scalar_t* to_weights = grad_weights.mutable_data_ptr<scalar_t>();
            quantized.resize(std::max<size_t>(quantized.size(), bags.num_rows(f) * p.dim));
            bags.each_block_of_rows<scalar_t>(f, [&](const Block<scalar_t>& block) {
              kernels.forward(block, p, false, quantized.data());
            });
            bags.each_block<scalar_t>(
                bags.first_bag(f), bags.first_bag(f + 1), [&](const Block<scalar_t>& block, const int64_t* row) {
                  kernels.dot_rows(block.size, p.dim, from, block.offset, quantized.data(), row, block.inverse_length,
                                   to_weights + block.first);
                });
          }
        }
      }
    });
    gradients = sums.finish(grad_rows, grad_weights, factor);
  });
  return gradients;
}

Tensor quantized_embedding_bag(const Tensor& rows, const Tensor& ids, const Tensor& offsets,
                               at::IntArrayRef bags_per_feature, at::IntArrayRef first_row, at::IntArrayRef num_rows,
                               at::IntArrayRef table, at::IntArrayRef pooling_mode, const OptionalTensor& weights,
                               const OptionalTensor& index, const OptionalTensor& row_offsets, bool side_by_side,
                               const Tensor& row_map, const OptionalTensor& probabilities, const Tensor& alpha,
                               const Tensor& beta, const OptionalTensor& zero_rows, at::IntArrayRef bits,
                               const Tensor& scale, double /*gradient_factor*/) {
  const Quantizer q{probabilities, alpha, beta, zero_rows, bits, scale};
  check(q, rows);
  const Bags bags(rows, ids, offsets, bags_per_feature, first_row, num_rows, table, pooling_mode, weights, index,
                  row_offsets, side_by_side, row_map, q);
  return bags.is_indexed() ? indexed_forward(q, bags) : forward(q, bags);
}

Gradients quantized_embedding_bag_backward(const Tensor& grad, const Tensor& rows, const Tensor& ids,
                                           const Tensor& offsets, at::IntArrayRef bags_per_feature,
                                           at::IntArrayRef first_row, at::IntArrayRef num_rows, at::IntArrayRef table,
                                           at::IntArrayRef pooling_mode, const OptionalTensor& weights,
                                           const OptionalTensor& index, const OptionalTensor& row_offsets,
                                           bool side_by_side, const Tensor& row_map,
                                           const OptionalTensor& probabilities, const Tensor& alpha,
                                           const Tensor& beta, const OptionalTensor& zero_rows, at::IntArrayRef bits,
                                           const Tensor& scale, double gradient_factor, bool weights_require_grad) {
  const Quantizer q{probabilities, alpha, beta, zero_rows, bits, scale};
  check(q, rows);
  const Bags bags(rows, ids, offsets, bags_per_feature, first_row, num_rows, table, pooling_mode, weights, index,
                  row_offsets, side_by_side, row_map, q);
  const std::vector<int64_t> shape = bags.pooled_shape();
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(shape), "grad must be ", shape, " like the output, not ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == rows.scalar_type(), "grad is ", grad.scalar_type(), ", rows ",
                   rows.scalar_type());
  const auto run = bags.is_indexed() ? indexed_backward : backward;
  return run(q, bags, grad.contiguous(), gradient_factor, weights_require_grad);
}

}  // namespace
}  // namespace quantization
}  // namespace torchrec_mpe

// Bags' fields stand in the order of torchrec_mpe/ops/bags.py.
#define TORCHREC_MPE_ARGUMENTS                                                                                        \
  "Tensor rows, Tensor ids, Tensor offsets, int[] bags_per_feature, int[] first_row, int[] num_rows, int[] table, "   \
  "int[] pooling_mode, Tensor? per_sample_weights, Tensor? index, Tensor? row_offsets, bool side_by_side, "           \
  "Tensor row_map, Tensor? probabilities, Tensor alpha, Tensor beta, Tensor? zero_rows, int[] candidate_bits, "       \
  "Tensor gradient_scale, float gradient_factor"

TORCH_LIBRARY_FRAGMENT(torchrec_mpe, m) {
  m.def("quantized_embedding_bag(" TORCHREC_MPE_ARGUMENTS ") -> Tensor");
  m.def("quantized_embedding_bag_backward(Tensor grad, " TORCHREC_MPE_ARGUMENTS
        ", bool weights_require_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(torchrec_mpe, CPU, m) {
  m.impl("quantized_embedding_bag", torchrec_mpe::quantization::quantized_embedding_bag);
  m.impl("quantized_embedding_bag_backward", torchrec_mpe::quantization::quantized_embedding_bag_backward);
}
