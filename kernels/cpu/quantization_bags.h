// The bags of a batch: where rows to quantize come from and go to, in blocks.
#pragma once

#include <ATen/Functions.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "quantization.h"
#include "quantization_integers.h"
#include "quantization_parameters.h"

namespace torchrec_mpe {
namespace quantization {

constexpr int64_t kMean = 1;  // FBGEMM's PoolingMode

// Rows looked up for the bags of several features.
class Bags {
 public:
  Bags(const Tensor& rows, const Tensor& ids, const Tensor& offsets, at::IntArrayRef bags_per_feature,
       at::IntArrayRef first_row, at::IntArrayRef num_rows, at::IntArrayRef table, at::IntArrayRef pooling_mode,
       const OptionalTensor& weights, const OptionalTensor& index, const OptionalTensor& row_offsets,
       bool side_by_side, const Tensor& lines, const Quantizer& q)
      : rows_(rows.contiguous()),
        ids_(ids),
        offsets_(offsets),
        lines_(lines),
        num_lines_(q.num_lines()),
        first_row_(first_row),
        num_rows_(num_rows),
        table_(table),
        pooling_mode_(pooling_mode),
        side_by_side_(side_by_side) {
    const size_t features = bags_per_feature.size();
    TORCH_CHECK_VALUE(lines.dim() == 1, "one group or candidate a row of the tables, not ", lines.sizes());
    TORCH_CHECK_VALUE(ids.dim() == 1 && ids.size(0) == rows.size(0), rows.size(0), " rows for ids ", ids.sizes());
    TORCH_CHECK_VALUE(offsets.dim() == 1, "offsets must be [bags + 1], not ", offsets.sizes());
    TORCH_CHECK_VALUE(first_row.size() == features && num_rows.size() == features && table.size() == features &&
                          pooling_mode.size() == features,
                      "bags_per_feature, first_row, num_rows, table and pooling_mode must be of equal length");
    first_bag_.push_back(0);
    for (size_t f = 0; f < features; ++f) {
      TORCH_CHECK_VALUE(!side_by_side || bags_per_feature[f] == bags_per_feature[0],
                        "side by side, every feature must have the same number of bags");
      TORCH_CHECK_INDEX(first_row[f] >= 0 && num_rows[f] >= 0 && first_row[f] <= lines.size(0) - num_rows[f],
                        "feature ", f, " has ", num_rows[f], " rows from ", first_row[f], ", of ", lines.size(0));
      TORCH_CHECK_INDEX(!q.zero_rows || (table[f] >= 0 && table[f] < q.num_tables()), "feature ", f, " is of table ",
                        table[f], ", of ", q.num_tables());
      first_bag_.push_back(bag_after(f, first_bag_.back(), bags_per_feature[f]));
    }
    has_zero_rows_ = q.zero_rows.has_value();
    TORCH_CHECK_VALUE(offsets.size(0) == num_bags() + 1, "offsets must be [", num_bags() + 1, "], not ",
                      offsets.sizes());
    TORCH_CHECK_VALUE(!index || index->dim() == 1, "one index an id, not ", index->sizes());
    num_ids_ = index ? index->size(0) : ids.size(0);
    base_ = offsets_[0];
    for (int64_t b = 0; b < num_bags(); ++b) {
      TORCH_CHECK_VALUE(offsets_[b] <= offsets_[b + 1], "offsets decrease at bag ", b);
    }
    TORCH_CHECK_VALUE(offsets_[num_bags()] - base_ == num_ids_, "offsets span ", offsets_[num_bags()] - base_, " of ",
                      num_ids_, " ids");
    if (index) {
      index_.emplace(*index);
      TORCH_CHECK_VALUE(row_offsets && row_offsets->dim() == 1 && row_offsets->size(0) == num_features() + 1,
                        "an index needs row_offsets, ", num_features() + 1, " of them");
      const Integers row_offset(*row_offsets);
      for (int64_t f = 0; f <= num_features(); ++f) {
        row_offsets_.push_back(row_offset[f] - row_offset[0]);
        TORCH_CHECK_VALUE(f == 0 || row_offsets_[f] >= row_offsets_[f - 1], "row_offsets decrease at feature ", f);
        TORCH_CHECK_INDEX(f == 0 || row_offsets_[f] == row_offsets_[f - 1] || num_rows[f - 1] > 0, "feature ", f - 1,
                          " looks up ids in a table of no rows");
      }
      row_base_ = row_offset[0];
      TORCH_CHECK_VALUE(row_offsets_.back() == rows.size(0), "row_offsets span ", row_offsets_.back(), " of ",
                        rows.size(0), " rows");
    }
    if (weights) {
      TORCH_CHECK_VALUE(weights->dim() == 1 && weights->size(0) == num_ids_, "one weight an id: ", num_ids_,
                        ", not ", weights->sizes());
      weights_ = weights->to(rows.scalar_type()).contiguous();
    }
  }

  int64_t num_bags() const { return first_bag_.back(); }
  int64_t num_features() const { return static_cast<int64_t>(first_bag_.size()) - 1; }
  int64_t num_ids() const { return num_ids_; }
  bool is_indexed() const { return index_.has_value(); }
  int64_t first_bag(int64_t feature) const { return first_bag_[feature]; }
  // With an index: where a feature's rows are.
  int64_t first_row_of(int64_t feature) const { return row_offsets_[feature]; }
  int64_t num_rows(int64_t feature) const { return row_offsets_[feature + 1] - row_offsets_[feature]; }
  const Tensor& rows() const { return rows_; }
  std::vector<int64_t> pooled_shape() const {
    const int64_t features = num_features(), dim = rows_.size(1);
    if (side_by_side_ && features > 0) {
      return {num_bags() / features, features * dim};
    }
    return {num_bags(), dim};
  }

  // Chunks of about equally many rows.
  int64_t bound(int64_t chunk, int64_t chunks) const {
    if (chunk == chunks) {
      return num_bags();
    }
    int64_t low = 0, high = num_bags();
    const int64_t row = base_ + num_ids_ * chunk / chunks;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (offsets_[middle] < row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Blocks of bags `begin` to `end`. With an index, row[i] is where id i's row is among its feature's, in elements, and
  // there are no lines.
  template <typename T, typename Body>
  void each_block(int64_t begin, int64_t end, const Body& body) const {
    Block<T> block;
    int64_t row[kBlock];
    const auto finish = [&] {
      if (!is_indexed()) {
        lines_.read(block.size, [&row](int64_t i) { return row[i]; }, num_lines_, block.line);
      }
      body(block, row);
    };
    const T* rows = rows_.template const_data_ptr<T>();
    const T* weights = weights_.defined() ? weights_.template const_data_ptr<T>() : nullptr;
    const int64_t dim = rows_.size(1);
    const auto start = [&](int64_t id) {
      block.size = 0;
      block.first = id;
      block.rows = rows + id * dim;
    };
    start(offsets_[begin] - base_);
    int64_t f = std::upper_bound(first_bag_.begin(), first_bag_.end(), begin) - first_bag_.begin() - 1;
    for (int64_t bag = begin; bag < end; ++bag) {
      while (bag >= first_bag_[f + 1]) {
        ++f;
      }
      const int64_t first = offsets_[bag] - base_, last = offsets_[bag + 1] - base_;
      TORCH_CHECK_INDEX(first == last || num_rows_[f] > 0, "feature ", f, " looks up ids in a table of no rows");
      const int64_t offset = side_by_side_ ? ((bag - first_bag_[f]) * num_features() + f) * dim : bag * dim;
      const T inverse_length = pooling_mode_[f] == kMean && last > first ? T(1) / static_cast<T>(last - first) : T(1);
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = block.size++;
        if (is_indexed()) {
          const int64_t position = (*index_)[i] - row_base_;
          TORCH_CHECK_INDEX(position >= row_offsets_[f] && position < row_offsets_[f + 1], "index of id ", i, " is ",
                            position, ", feature ", f, " has rows ", row_offsets_[f], " to ", row_offsets_[f + 1]);
          row[at] = (position - row_offsets_[f]) * dim;
        } else {
          row[at] = row_of(f, i);
          block.table[at] = table_of(f);
        }
        block.offset[at] = offset;
        block.inverse_length[at] = inverse_length;
        block.weight[at] = weights == nullptr ? inverse_length : weights[i] * inverse_length;
        if (block.size == kBlock) {
          finish();
          start(i + 1);
        }
      }
    }
    if (block.size > 0) {
      finish();
    }
  }

  // With an index: blocks of a feature's rows, each an output row of its own; counted from the feature's first row.
  template <typename T, typename Body>
  void each_block_of_rows(int64_t feature, const Body& body) const {
    Block<T> block;
    int64_t row[kBlock];
    const int64_t dim = rows_.size(1), begin = row_offsets_[feature], count = num_rows(feature);
    std::fill_n(block.table, kBlock, table_of(feature));
    std::fill_n(block.weight, kBlock, T(1));
    std::fill_n(block.inverse_length, kBlock, T(1));
    for (int64_t first = 0; first < count; first += kBlock) {
      block.first = first;
      block.rows = rows_.template const_data_ptr<T>() + (begin + first) * dim;
      block.size = std::min<int64_t>(kBlock, count - first);
      for (int64_t i = 0; i < block.size; ++i) {
        row[i] = row_of(feature, begin + first + i);
        block.offset[i] = (first + i) * dim;
      }
      lines_.read(block.size, [&row](int64_t i) { return row[i]; }, num_lines_, block.line);
      body(block);
    }
  }

 private:
  int64_t row_of(int64_t feature, int64_t i) const {
    const int64_t id = ids_[i];
    // FBGEMM reads row 0 for an id outside.
    return first_row_[feature] + (id >= 0 && id < num_rows_[feature] ? id : 0);
  }
  int32_t table_of(int64_t feature) const { return has_zero_rows_ ? static_cast<int32_t>(table_[feature]) : 0; }

  Tensor rows_;
  Integers ids_, offsets_, lines_;
  std::optional<Integers> index_;
  std::vector<int64_t> row_offsets_;
  int64_t row_base_ = 0;
  int64_t num_ids_ = 0;
  int64_t num_lines_;
  at::IntArrayRef first_row_, num_rows_, table_;
  at::IntArrayRef pooling_mode_;
  bool side_by_side_;
  bool has_zero_rows_ = false;
  std::vector<int64_t> first_bag_;
  Tensor weights_;
  int64_t base_ = 0;
};

}  // namespace quantization
}  // namespace torchrec_mpe
