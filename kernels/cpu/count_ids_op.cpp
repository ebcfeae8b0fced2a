// Counts how often each row is looked up.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace torchrec_mpe {
namespace {

using at::Tensor;

// A count is a cache miss: it is asked for this many ids ahead.
constexpr int64_t kAhead = 24;

template <typename index_t>
void count(int64_t* counts, const index_t* ids, int64_t n, int64_t rows) {
  const auto inside = [&](index_t id) { return id >= 0 && static_cast<int64_t>(id) < rows; };
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n && inside(ids[i + kAhead])) {
      __builtin_prefetch(counts + ids[i + kAhead], 1, 1);
    }
    if (inside(ids[i])) {
      ++counts[ids[i]];
    }
  }
}

// Adds to counts[first_row[f] + id] how often feature f holds id; ids outside [0, num_rows[f]) count nowhere.
void count_ids_(const Tensor& counts, const Tensor& ids, at::IntArrayRef ids_per_feature, at::IntArrayRef first_row,
                at::IntArrayRef num_rows) {
  const size_t features = ids_per_feature.size();
  TORCH_CHECK_TYPE(counts.scalar_type() == at::kLong, "counts must be int64, not ", counts.scalar_type());
  TORCH_CHECK_VALUE(counts.dim() == 1 && counts.is_contiguous(), "counts must be [rows], contiguous");
  TORCH_CHECK_VALUE(ids.dim() == 1, "ids must be [N], not ", ids.sizes());
  TORCH_CHECK_VALUE(first_row.size() == features && num_rows.size() == features,
                    "ids_per_feature, first_row and num_rows must be of equal length");
  std::vector<int64_t> start(features + 1, 0);
  for (size_t f = 0; f < features; ++f) {
    TORCH_CHECK_VALUE(ids_per_feature[f] >= 0 && ids_per_feature[f] <= ids.size(0) - start[f], "feature ", f, " has ",
                      ids_per_feature[f], " ids, more than are left");
    TORCH_CHECK_VALUE(first_row[f] >= 0 && num_rows[f] >= 0 && first_row[f] <= counts.size(0) - num_rows[f],
                      "feature ", f, " has ", num_rows[f], " rows from ", first_row[f], ", counts are of ",
                      counts.size(0));
    start[f + 1] = start[f] + ids_per_feature[f];
  }
  TORCH_CHECK_VALUE(start[features] == ids.size(0), "the features have ", start[features], " of ", ids.size(0), " ids");

  // Features whose rows overlap go to one thread.
  std::vector<size_t> order(features);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return first_row[a] < first_row[b]; });
  std::vector<size_t> groups;  // where each begins in order
  int64_t last = -1;
  for (size_t k = 0; k < features; ++k) {
    if (k == 0 || first_row[order[k]] >= last) {
      groups.push_back(k);
    }
    last = std::max(last, first_row[order[k]] + num_rows[order[k]]);
  }
  groups.push_back(features);

  const Tensor contiguous = ids.contiguous();
  int64_t* to = counts.mutable_data_ptr<int64_t>();
  AT_DISPATCH_INDEX_TYPES(ids.scalar_type(), "count_ids_", [&] {
    const index_t* from = contiguous.const_data_ptr<index_t>();
    at::parallel_for(0, static_cast<int64_t>(groups.size()) - 1, 1, [&](int64_t begin, int64_t end) {
      for (size_t k = groups[begin]; k < groups[end]; ++k) {
        const size_t f = order[k];
        count(to + first_row[f], from + start[f], ids_per_feature[f], num_rows[f]);
      }
    });
  });
}

}  // namespace
}  // namespace torchrec_mpe

TORCH_LIBRARY_FRAGMENT(torchrec_mpe, m) {
  m.def("count_ids_(Tensor(a!) counts, Tensor ids, int[] ids_per_feature, int[] first_row, int[] num_rows) -> ()");
}

TORCH_LIBRARY_IMPL(torchrec_mpe, CPU, m) {
  m.impl("count_ids_", torchrec_mpe::count_ids_);
}
