// Ops on the ids of a batch, before their rows are looked up.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "quantization_integers.h"

namespace torchrec_mpe {
namespace quantization {

namespace {

void check_shapes(const Tensor& ids, const Tensor& offsets) {
  TORCH_CHECK_VALUE(ids.dim() == 1, "ids must be [N], not ", ids.sizes());
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) > 0, "offsets must be [bags + 1], not ", offsets.sizes());
}

// Per feature the distinct ids in the order of their first appearance, where each feature's begin, and where each id is
// among them. An id outside counts as 0.
std::tuple<Tensor, Tensor, Tensor> unique_ids(const Tensor& ids, const Tensor& offsets,
                                              at::IntArrayRef bags_per_feature, at::IntArrayRef num_rows) {
  const auto features = static_cast<int64_t>(bags_per_feature.size());
  TORCH_CHECK_VALUE(static_cast<int64_t>(num_rows.size()) == features,
                    "bags_per_feature and num_rows must be of equal length");
  check_shapes(ids, offsets);
  const Integers bag_start(offsets);
  std::vector<int64_t> start(features + 1);  // in ids
  int64_t bag = 0;
  for (int64_t f = 0; f <= features; ++f) {
    TORCH_CHECK_VALUE(bag < offsets.size(0), "offsets are ", offsets.size(0), ", fewer than bags + 1");
    start[f] = bag_start[bag] - bag_start[0];
    TORCH_CHECK_VALUE(start[f] >= (f == 0 ? 0 : start[f - 1]) && start[f] <= ids.size(0),
                      "offsets do not increase within the ids at feature ", f);
    bag = f < features ? bag_after(f, bag, bags_per_feature[f]) : bag;
  }
  TORCH_CHECK_VALUE(start[features] == ids.size(0), "offsets span ", start[features], " of ", ids.size(0), " ids");
  TORCH_CHECK_VALUE(ids.size(0) <= INT32_MAX, "more than 2**31 - 1 ids");
  const Tensor contiguous = ids.contiguous();
  const Tensor distinct = at::empty_like(contiguous);  // feature f's from start[f]
  const Tensor index = at::empty({ids.size(0)}, ids.options().dtype(at::kInt));
  const Tensor row_offsets = at::zeros({features + 1}, ids.options().dtype(at::kLong));
  int64_t* row_offset = row_offsets.mutable_data_ptr<int64_t>();
  int32_t* position = index.mutable_data_ptr<int32_t>();
  Tensor packed;
  AT_DISPATCH_INDEX_TYPES(ids.scalar_type(), "unique_ids", [&] {
    const index_t* from = contiguous.const_data_ptr<index_t>();
    index_t* found = distinct.mutable_data_ptr<index_t>();
    at::parallel_for(0, features, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> slots;  // 1 + position among the feature's distinct ids, 0 if free
      for (int64_t f = begin; f < end; ++f) {
        const int64_t count = start[f + 1] - start[f];
        int log = 4;
        while ((int64_t{1} << log) < 2 * count) {
          ++log;
        }
        slots.assign(size_t{1} << log, 0);
        const uint64_t mask = (uint64_t{1} << log) - 1;
        index_t* mine = found + start[f];
        int32_t number = 0;
        for (int64_t i = start[f]; i < start[f + 1]; ++i) {
          const index_t id = from[i] >= 0 && from[i] < num_rows[f] ? from[i] : 0;
          uint64_t slot = (static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> (64 - log);
          while (slots[slot] != 0 && mine[slots[slot] - 1] != id) {
            slot = (slot + 1) & mask;
          }
          if (slots[slot] == 0) {
            mine[number] = id;
            slots[slot] = ++number;
          }
          position[i] = slots[slot] - 1;
        }
        row_offset[f + 1] = number;
      }
    });
    for (int64_t f = 0; f < features; ++f) {
      row_offset[f + 1] += row_offset[f];
    }
    packed = at::empty({row_offset[features]}, ids.options());
    index_t* to = packed.mutable_data_ptr<index_t>();
    at::parallel_for(0, features, 1, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f) {
        std::copy_n(found + start[f], row_offset[f + 1] - row_offset[f], to + row_offset[f]);
        for (int64_t i = start[f]; i < start[f + 1]; ++i) {
          position[i] += static_cast<int32_t>(row_offset[f]);
        }
      }
    });
  });
  return {packed, index, row_offsets};
}

// Each id's row, counted through the tables; an id outside counts as 0.
Tensor row_numbers(const Tensor& ids, const Tensor& offsets, at::IntArrayRef bags_per_feature,
                   at::IntArrayRef first_row, at::IntArrayRef num_rows) {
  TORCH_CHECK_VALUE(first_row.size() == bags_per_feature.size() && num_rows.size() == bags_per_feature.size(),
                    "bags_per_feature, first_row and num_rows must be of equal length");
  check_shapes(ids, offsets);
  const Integers bag_start(offsets);
  const int64_t base = bag_start[0];
  const Tensor contiguous = ids.contiguous();
  Tensor rows = at::empty_like(contiguous);
  AT_DISPATCH_INDEX_TYPES(ids.scalar_type(), "row_numbers", [&] {
    const index_t* from = contiguous.const_data_ptr<index_t>();
    index_t* to = rows.mutable_data_ptr<index_t>();
    int64_t bag = 0, i = 0;
    for (size_t f = 0; f < bags_per_feature.size(); ++f) {
      bag = bag_after(f, bag, bags_per_feature[f]);
      TORCH_CHECK_VALUE(bag < offsets.size(0), "offsets are ", offsets.size(0), ", fewer than bags + 1");
      const int64_t end = bag_start[bag] - base;
      TORCH_CHECK_VALUE(end >= i && end <= ids.size(0), "offsets do not increase within the ids at feature ", f);
      constexpr int64_t kLargest = std::numeric_limits<index_t>::max();
      TORCH_CHECK_VALUE(first_row[f] >= 0 && num_rows[f] >= 0 && first_row[f] <= kLargest - num_rows[f], "feature ", f,
                        " has ", num_rows[f], " rows from ", first_row[f], ", which do not fit ", ids.scalar_type(),
                        " ids");
      const auto first = static_cast<index_t>(first_row[f]), limit = static_cast<index_t>(num_rows[f]);
      for (; i < end; ++i) {
        to[i] = first + (from[i] >= 0 && from[i] < limit ? from[i] : 0);
      }
    }
    TORCH_CHECK_VALUE(i == ids.size(0), "offsets span ", i, " of ", ids.size(0), " ids");
  });
  return rows;
}

}  // namespace
}  // namespace quantization
}  // namespace torchrec_mpe

TORCH_LIBRARY_FRAGMENT(torchrec_mpe, m) {
  m.def("unique_ids(Tensor ids, Tensor offsets, int[] bags_per_feature, int[] num_rows) -> (Tensor, Tensor, Tensor)");
  m.def("row_numbers(Tensor ids, Tensor offsets, int[] bags_per_feature, int[] first_row, int[] num_rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchrec_mpe, CPU, m) {
  m.impl("unique_ids", torchrec_mpe::quantization::unique_ids);
  m.impl("row_numbers", torchrec_mpe::quantization::row_numbers);
}
