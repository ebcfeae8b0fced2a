// torch.ops.torchrec_mpe.packed_embedding_bag: torchrec_mpe/ops/packed_embedding_bag.py says what it computes.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "packed_embedding_bag.h"
#include "row_lock.h"
#include "wavelet_splits.h"

namespace torchrec_mpe {
namespace {

using at::Tensor;

enum BoundsCheckMode : int64_t { kFatal = 0, kWarning = 1, kIgnore = 2, kNone = 3 };
constexpr int64_t kMean = 1;
// Ids and bags of a piece at most, but for a bag of more: a write to the weights does not wait for longer.
constexpr int64_t kWorkOfAPiece = 1 << 16;

// As Python writes it.
std::string name_of(at::ScalarType dtype) {
  return "torch." + std::string(c10::getDtypeNames(dtype).first);
}

void check_tensor(const Tensor& tensor, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", name_of(dtype), ", got ",
                   name_of(tensor.scalar_type()));
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU like weights, it is on ", tensor.device());
}

void check_length(const Tensor& tensor, const char* name, int64_t length) {
  TORCH_CHECK_VALUE(tensor.numel() == length, name, " must have ", length, " elements, got ", tensor.numel());
}

// The tables' tensors and the views of them that the kernels read. Everything of a table but its directory's content
// and its run records is checked here; the kernels check those as they read them.
class PackedTables {
 public:
  PackedTables(const Tensor& weights, const Tensor& weights_offsets, const Tensor& rows_per_table,
               const Tensor& run_records, const Tensor& run_starts, const Tensor& run_offsets,
               const Tensor& directory_kinds, const Tensor& directory, const Tensor& directory_offsets,
               const Tensor& alpha, const Tensor& beta, const Tensor& beta_offsets, const Tensor& scale_index,
               const Tensor& zero_rows, const Tensor& zero_row_offsets, const Tensor& levels,
               const Tensor& levels_offsets, const Tensor& bases, const Tensor& bases_offsets,
               const Tensor& components) {
    check_tensor(weights, "weights", at::kByte);
    check_tensor(weights_offsets, "weights_offsets", at::kLong);
    check_tensor(rows_per_table, "rows_per_table", at::kInt);
    check_tensor(run_records, "run_records", at::kLong);
    check_tensor(run_starts, "run_starts", at::kInt);
    check_tensor(run_offsets, "run_offsets", at::kInt);
    check_tensor(directory_kinds, "directory_kinds", at::kInt);
    check_tensor(directory, "directory", at::kByte);
    check_tensor(directory_offsets, "directory_offsets", at::kLong);
    check_tensor(alpha, "alpha", at::kFloat);
    check_tensor(beta, "beta", at::kFloat);
    check_tensor(beta_offsets, "beta_offsets", at::kInt);
    check_tensor(scale_index, "scale_index", at::kInt);
    check_tensor(zero_rows, "zero_rows", at::kFloat);
    check_tensor(zero_row_offsets, "zero_row_offsets", at::kInt);
    check_tensor(levels, "levels", at::kBFloat16);
    check_tensor(levels_offsets, "levels_offsets", at::kInt);
    check_tensor(bases, "bases", at::kHalf);
    check_tensor(bases_offsets, "bases_offsets", at::kInt);
    check_tensor(components, "components", at::kInt);
    const int64_t tables = rows_per_table.numel();
    const int64_t scales = beta_offsets.numel();
    check_length(weights_offsets, "weights_offsets", tables);
    check_length(run_records, "run_records", 2 * run_starts.numel());
    check_length(run_offsets, "run_offsets", tables + 1);
    check_length(directory_kinds, "directory_kinds", tables);
    check_length(directory_offsets, "directory_offsets", tables);
    check_length(scale_index, "scale_index", tables);
    check_length(zero_row_offsets, "zero_row_offsets", tables);
    check_length(levels_offsets, "levels_offsets", tables);
    check_length(bases_offsets, "bases_offsets", tables);
    check_length(components, "components", tables);
    check_length(alpha, "alpha", scales * (kMaxBits + 1));
    bases_ = bases.to(at::kFloat);
    tables_.resize(tables);
    for (int64_t t = 0; t < tables; ++t) {
      PackedTable& table = tables_[t];
      const int64_t basis = bases_offsets.const_data_ptr<int32_t>()[t];
      const int64_t level = levels_offsets.const_data_ptr<int32_t>()[t];
      TORCH_CHECK_VALUE(-1 <= level && level <= levels.numel() && -1 <= basis && (level < 0) == (basis < 0), "table ",
                        t, ": levels offset ", level, " of ", levels.numel(), " levels and bases offset ", basis,
                        " must both be -1 or in their buffers");
      const bool coded = basis >= 0;
      // The lines that rows lie in are counted from the weights' first byte, where tables start.
      const int64_t start = weights_offsets.const_data_ptr<int64_t>()[t];
      const int64_t alignment = coded ? 8 : kLineBytes;
      TORCH_CHECK_VALUE(start >= 0 && start % alignment == 0 && start <= weights.numel() - kEndPadding, "table ", t,
                        ": weights offset ", start, " must be a multiple of ", alignment, " within the ",
                        weights.numel(), " bytes of weights");
      table.first_byte = start % kLineBytes;
      table.weights = weights.const_data_ptr<uint8_t>() + (start - table.first_byte);
      table.weights_bytes = weights.numel() - (start - table.first_byte);
      table.num_rows = rows_per_table.const_data_ptr<int32_t>()[t];
      TORCH_CHECK_VALUE(table.num_rows > 0, "table ", t, ": it has ", table.num_rows, " rows");
      const int32_t* runs = run_offsets.const_data_ptr<int32_t>() + t;
      TORCH_CHECK_VALUE(0 <= runs[0] && runs[0] <= runs[1] && runs[1] <= run_starts.numel(), "table ", t,
                        ": run_offsets ", runs[0], " and ", runs[1], " leave the ", run_starts.numel(), " runs");
      table.runs = reinterpret_cast<const RunRecord*>(run_records.const_data_ptr<int64_t>()) + runs[0];
      table.run_starts = run_starts.const_data_ptr<int32_t>() + runs[0];
      table.num_runs = runs[1] - runs[0];
      set_directory(t, directory_kinds, directory, directory_offsets);
      table.components = components.const_data_ptr<int32_t>()[t];
      TORCH_CHECK_VALUE(0 <= table.components && table.components <= (coded ? kMaxComponents : 0), "table ", t,
                        ": it cannot have ", table.components, " components");
      TORCH_CHECK_VALUE(coded || table.kind != Directory::Wavelet, "table ", t,
                        ": only a coded table has a wavelet directory");
      if (coded) {
        TORCH_CHECK_VALUE(table.nibble_lines == 0 && table.kind != Directory::BitmapNibble, "table ", t,
                          ": a directory of widths cannot say how rows are coded");
        // The kernels count what they know of a run in 32 bits.
        TORCH_CHECK_VALUE(table.num_runs <= 1 << 20, "table ", t, ": ", table.num_runs, " runs are too many");
        table.levels = reinterpret_cast<const uint16_t*>(levels.const_data_ptr<at::BFloat16>()) + level;
        table.num_levels = levels.numel() - level;
        beta_start_.push_back(basis);
      } else {
        const int32_t scale = scale_index.const_data_ptr<int32_t>()[t];
        TORCH_CHECK_VALUE(0 <= scale && scale < scales, "table ", t, ": scale_index ", scale, " is not below ", scales);
        table.alpha = alpha.const_data_ptr<float>() + scale * (kMaxBits + 1);
        beta_start_.push_back(beta_offsets.const_data_ptr<int32_t>()[scale]);
      }
      zero_start_.push_back(zero_row_offsets.const_data_ptr<int32_t>()[t]);
    }
    beta_tensor_ = beta;
    zero_rows_ = zero_rows;
  }

  // The table as a feature of a given dimension reads it.
  const PackedTable* of_dim(int64_t t, int64_t dim) {
    PackedTable& table = tables_[t];
    if (table.embedding_dim != 0) {
      TORCH_CHECK_VALUE(table.embedding_dim == dim, "table ", t, ": features give it dimensions ",
                        table.embedding_dim, " and ", dim);
      return &table;
    }
    TORCH_CHECK_VALUE(dim > 0 && dim <= (1 << 20), "table ", t, ": ", dim, " is no embedding dimension");
    table.embedding_dim = static_cast<int32_t>(dim);
    table.blocks = static_cast<int32_t>((dim + 7) / 8);
    const int64_t beta = beta_start_[t];
    if (table.alpha == nullptr) {
      const int64_t basis = int64_t{table.components} * dim;
      TORCH_CHECK_VALUE(beta <= bases_.numel() - basis - dim, "table ", t, ": the basis of its ", table.components,
                        " components from ", beta, " on leaves the ", bases_.numel(), " elements of bases");
      table.basis = bases_.const_data_ptr<float>() + beta;
      table.beta = table.basis + basis;
    } else {
      TORCH_CHECK_VALUE(0 <= beta && beta <= beta_tensor_.numel() - dim, "table ", t, ": beta offset ", beta,
                        " leaves its buffer of ", beta_tensor_.numel());
      table.beta = beta_tensor_.const_data_ptr<float>() + beta;
    }
    const int64_t zero = zero_start_[t];
    TORCH_CHECK_VALUE(-1 <= zero && zero <= zero_rows_.numel() - (zero < 0 ? 0 : dim), "table ", t,
                      ": zero row offset ", zero, " leaves its buffer of ", zero_rows_.numel());
    table.zero_row = zero < 0 ? nullptr : zero_rows_.const_data_ptr<float>() + zero;
    return &table;
  }

  int64_t size() const {
    return static_cast<int64_t>(tables_.size());
  }

 private:
  void set_directory(int64_t t, const Tensor& kinds, const Tensor& directory, const Tensor& offsets) {
    PackedTable& table = tables_[t];
    const int32_t kind = kinds.const_data_ptr<int32_t>()[t];
    TORCH_CHECK_VALUE(0 <= kind && kind <= static_cast<int32_t>(Directory::Wavelet), "table ", t,
                      ": there is no directory of kind ", kind);
    table.kind = static_cast<Directory>(kind);
    const auto lines = [](int64_t rows, int64_t rows_a_line) { return (rows + rows_a_line - 1) / rows_a_line; };
    const int64_t bitmap_bytes = lines(table.num_rows, kBitmapRows) * kLineBytes;
    int64_t bytes = 0;
    switch (table.kind) {
      case Directory::Ranked: break;
      case Directory::Remap: bytes = table.num_rows * 4; break;
      case Directory::Nibble: bytes = lines(table.num_rows, kNibbleRows) * kLineBytes; break;
      case Directory::Bitmap: bytes = bitmap_bytes; break;
      case Directory::BitmapNibble: bytes = bitmap_bytes; break;
      case Directory::Wavelet: bytes = kLineBytes; break;
    }
    const bool has_runs = table.kind != Directory::Nibble && table.kind != Directory::BitmapNibble;
    TORCH_CHECK_VALUE(!has_runs || table.num_runs > 0, "table ", t, ": it has no runs");
    if (bytes == 0) {
      return;
    }
    const int64_t start = offsets.const_data_ptr<int64_t>()[t];
    // The next table's part begins where this one's ends.
    int64_t end = directory.numel();
    for (int64_t next = t + 1; next < offsets.numel(); ++next) {
      const int64_t other = offsets.const_data_ptr<int64_t>()[next];
      if (other >= 0) {
        end = std::min(end, other);
        break;
      }
    }
    TORCH_CHECK_VALUE(start >= 0 && start % kLineBytes == 0 && start <= end - bytes, "table ", t,
                      ": its directory of ", bytes, " bytes at ", start, " does not end before ", end);
    TORCH_CHECK_VALUE((table.kind != Directory::Remap && table.kind != Directory::Wavelet) ||
                          reinterpret_cast<uintptr_t>(directory.const_data_ptr<uint8_t>()) % 4 == 0,
                      "directory must start at a multiple of 4 bytes for table ", t, "'s ranks");
    table.directory = directory.const_data_ptr<uint8_t>() + start;
    if (table.kind == Directory::Wavelet) {
      TORCH_CHECK_VALUE(take_splits(table, (end - start) / kLineBytes), "table ", t,
                        ": the splits of its directory lead outside of it");
    }
    table.nibbles = table.directory + (table.kind == Directory::BitmapNibble ? bitmap_bytes : 0);
    table.nibble_lines = table.kind == Directory::Nibble ? bytes / kLineBytes
                         : table.kind == Directory::BitmapNibble ? (end - start - bitmap_bytes) / kLineBytes : 0;
  }

  std::vector<PackedTable> tables_;
  std::vector<int64_t> beta_start_;  // a coded table's: where its basis starts
  std::vector<int64_t> zero_start_;
  Tensor beta_tensor_;
  Tensor bases_;  // in float32
  Tensor zero_rows_;
};

void check_ids_tensor(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kInt, name,
                   " must be int32 or int64, got ", name_of(tensor.scalar_type()));
  TORCH_CHECK_VALUE(tensor.dim() == 1, name, " must have one dimension, got ", tensor.sizes());
}

OutputType output_type_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return OutputType::Float;
    case at::kHalf: return OutputType::Half;
    case at::kBFloat16: return OutputType::BFloat16;
    default: TORCH_CHECK_TYPE(false, "output_dtype must be float32, float16 or bfloat16, got ", name_of(dtype));
  }
}

int64_t offset_at(const Tensor& offsets, int64_t k) {
  return offsets.scalar_type() == at::kLong ? offsets.const_data_ptr<int64_t>()[k]
                                            : offsets.const_data_ptr<int32_t>()[k];
}

// Bags [bounds[k], bounds[k + 1]) have about the same work: a bag and an id count alike.
std::vector<int64_t> split_bags(const Tensor& offsets, int64_t bags, int64_t parts) {
  std::vector<int64_t> bounds(parts + 1, bags);
  bounds[0] = 0;
  const int64_t work = offset_at(offsets, bags) + bags;
  for (int64_t part = 1; part < parts; ++part) {
    int64_t low = bounds[part - 1];
    int64_t high = bags;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (offset_at(offsets, middle) + middle < work / parts * part) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    bounds[part] = low;
  }
  return bounds;
}

void raise(const Faults& faults, const Lookup& lookup, at::IntArrayRef feature_table_map, const Tensor& indices,
           int64_t bounds_check_mode) {
  if (faults.bad_offset >= 0) {
    const int64_t f = faults.bad_offset / lookup.batch;
    TORCH_CHECK_VALUE(false, "table ", feature_table_map[f], ", feature ", f, ": offsets must go from 0 to the ",
                      lookup.num_indices, " ids and not decrease, they do not at bag ",
                      faults.bad_offset % lookup.batch);
  }
  if (bounds_check_mode == kFatal && faults.bad_ids > 0) {
    const int64_t f = faults.bad_id_feature;
    const int64_t id = lookup.indices_64 ? indices.const_data_ptr<int64_t>()[faults.first_bad_id]
                                         : indices.const_data_ptr<int32_t>()[faults.first_bad_id];
    TORCH_CHECK_INDEX(false, "table ", feature_table_map[f], ", feature ", f, ": id ", id, " is not in [0, ",
                      lookup.features[f].table->num_rows, ")");
  }
  if (faults.damaged_feature >= 0) {
    TORCH_CHECK_VALUE(false, "table ", feature_table_map[faults.damaged_feature], ", feature ",
                      faults.damaged_feature, ": the table's directory or runs lead outside its rows");
  }
}

void packed_embedding_bag_out(
    const Tensor& weights, const Tensor& weights_offsets, const Tensor& rows_per_table, const Tensor& run_records,
    const Tensor& run_starts, const Tensor& run_offsets, const Tensor& directory_kinds, const Tensor& directory,
    const Tensor& directory_offsets, const Tensor& alpha, const Tensor& beta, const Tensor& beta_offsets,
    const Tensor& scale_index, const Tensor& zero_rows, const Tensor& zero_row_offsets, const Tensor& levels,
    const Tensor& levels_offsets, const Tensor& bases, const Tensor& bases_offsets, const Tensor& components,
    at::IntArrayRef D_offsets, at::IntArrayRef feature_table_map, at::IntArrayRef pooling_mode, const Tensor& indices,
    const Tensor& offsets, const std::optional<Tensor>& per_sample_weights, at::ScalarType output_dtype,
    int64_t bounds_check_mode, const std::optional<Tensor>& bounds_check_warning, Tensor& out) {
  PackedTables tables(weights, weights_offsets, rows_per_table, run_records, run_starts, run_offsets, directory_kinds,
                      directory, directory_offsets, alpha, beta, beta_offsets, scale_index, zero_rows,
                      zero_row_offsets, levels, levels_offsets, bases, bases_offsets, components);
  const int64_t num_features = static_cast<int64_t>(feature_table_map.size());
  TORCH_CHECK_VALUE(static_cast<int64_t>(D_offsets.size()) == num_features + 1 &&
                        static_cast<int64_t>(pooling_mode.size()) == num_features,
                    num_features, " features need ", num_features + 1, " D_offsets and ", num_features,
                    " pooling modes, got ", D_offsets.size(), " and ", pooling_mode.size());
  check_ids_tensor(indices, "indices");
  check_ids_tensor(offsets, "offsets");
  const int64_t bags = offsets.numel() - 1;
  TORCH_CHECK_VALUE(bags >= 0 && (num_features == 0 ? bags == 0 : bags % num_features == 0), "offsets must have ",
                    num_features, " * batch + 1 entries, got ", offsets.numel());
  const int64_t batch = num_features == 0 ? 0 : bags / num_features;
  TORCH_CHECK_VALUE(bounds_check_mode >= kFatal && bounds_check_mode <= kNone, "bounds_check_mode must be 0 to 3, got ",
                    bounds_check_mode);

  const Tensor ids = indices.contiguous();
  const Tensor bag_offsets = offsets.contiguous();
  Tensor weights_of_ids;
  if (per_sample_weights.has_value()) {
    TORCH_CHECK_TYPE(at::isFloatingType(per_sample_weights->scalar_type()),
                     "per_sample_weights must be floating point, got ", name_of(per_sample_weights->scalar_type()));
    TORCH_CHECK_VALUE(per_sample_weights->sizes() == indices.sizes(), indices.numel(),
                      " ids come with per_sample_weights ", per_sample_weights->sizes());
    weights_of_ids = per_sample_weights->to(at::kFloat).contiguous();
  }
  std::vector<Feature> features(num_features);
  for (int64_t f = 0; f < num_features; ++f) {
    TORCH_CHECK_VALUE(feature_table_map[f] >= 0 && feature_table_map[f] < tables.size(),
                      "feature_table_map must lie in [0, ", tables.size(), "), got ", feature_table_map);
    TORCH_CHECK_VALUE(pooling_mode[f] == 0 || pooling_mode[f] == kMean,
                      "pooling modes must be 0 (SUM) or 1 (MEAN), got ", pooling_mode);
    TORCH_CHECK_VALUE(pooling_mode[f] != kMean || !per_sample_weights.has_value(),
                      "MEAN pooling takes no per-sample weights: its divisor would be ambiguous");
    features[f].table = tables.of_dim(feature_table_map[f], D_offsets[f + 1] - D_offsets[f]);
    features[f].column = D_offsets[f];
    features[f].mean = pooling_mode[f] == kMean;
  }
  const OutputType output_type = output_type_of(output_dtype);
  TORCH_CHECK_TYPE(out.scalar_type() == output_dtype, "out must be ", name_of(output_dtype), ", got ",
                   name_of(out.scalar_type()));
  TORCH_CHECK_VALUE(D_offsets[0] == 0, "D_offsets must start with 0, got ", D_offsets);
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == batch && out.size(1) == D_offsets.back() && out.is_contiguous() &&
                        out.device().is_cpu(),
                    "out must be [", batch, ", ", D_offsets.back(), "], contiguous and on the CPU, got ", out.sizes(),
                    " on ", out.device());

  Lookup lookup{};
  lookup.features = features.data();
  lookup.num_features = num_features;
  lookup.batch = batch;
  lookup.indices = ids.const_data_ptr();
  lookup.indices_64 = ids.scalar_type() == at::kLong;
  lookup.num_indices = ids.numel();
  lookup.offsets = bag_offsets.const_data_ptr();
  lookup.offsets_64 = bag_offsets.scalar_type() == at::kLong;
  lookup.weights = per_sample_weights.has_value() ? weights_of_ids.const_data_ptr<float>() : nullptr;
  lookup.output = out.data_ptr();
  lookup.output_type = output_type;
  lookup.output_stride = D_offsets.back();

  TORCH_CHECK_VALUE(offset_at(bag_offsets, 0) == 0 && offset_at(bag_offsets, bags) == ids.numel(),
                    "offsets must go from 0 to the ", ids.numel(), " ids, got ", offset_at(bag_offsets, 0), " to ",
                    offset_at(bag_offsets, bags));
  // A part is worth a thread from about 2000 ids on. A thread looks up its part in pieces, each under the lock.
  const int64_t work = ids.numel() + bags;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), work / 2000));
  const int64_t pieces_a_part = work / parts / kWorkOfAPiece + 1;
  const int64_t pieces = parts * pieces_a_part;
  const std::vector<int64_t> bounds = split_bags(bag_offsets, bags, pieces);
  std::vector<Faults> faults(pieces);
  const LookupBags lookup_bags = TORCHREC_MPE_OF_THIS_CPU(lookup_bags);
  const void* const storage = weights.storage().data();
  at::parallel_for(0, pieces, pieces_a_part, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const SharedRowLock lock(storage);
      lookup_bags(lookup, bounds[piece], bounds[piece + 1], faults[piece]);
    }
  });
  int64_t bad_ids = 0;
  for (const Faults& piece : faults) {
    raise(piece, lookup, feature_table_map, ids, bounds_check_mode);
    bad_ids += piece.bad_ids;
  }
  if (bounds_check_mode == kWarning && bounds_check_warning.has_value() && bad_ids > 0) {
    check_tensor(*bounds_check_warning, "bounds_check_warning", at::kLong);
    check_length(*bounds_check_warning, "bounds_check_warning", 1);
    // Threads that look up at once share the counter.
    __atomic_fetch_add(bounds_check_warning->data_ptr<int64_t>(), bad_ids, __ATOMIC_RELAXED);
  }
}

Tensor packed_embedding_bag_counting(
    const Tensor& weights, const Tensor& weights_offsets, const Tensor& rows_per_table, const Tensor& run_records,
    const Tensor& run_starts, const Tensor& run_offsets, const Tensor& directory_kinds, const Tensor& directory,
    const Tensor& directory_offsets, const Tensor& alpha, const Tensor& beta, const Tensor& beta_offsets,
    const Tensor& scale_index, const Tensor& zero_rows, const Tensor& zero_row_offsets, const Tensor& levels,
    const Tensor& levels_offsets, const Tensor& bases, const Tensor& bases_offsets, const Tensor& components,
    at::IntArrayRef D_offsets, at::IntArrayRef feature_table_map, at::IntArrayRef pooling_mode, const Tensor& indices,
    const Tensor& offsets, const std::optional<Tensor>& per_sample_weights, at::ScalarType output_dtype,
    int64_t bounds_check_mode, const std::optional<Tensor>& bounds_check_warning) {
  output_type_of(output_dtype);
  TORCH_CHECK_VALUE(!D_offsets.empty() && D_offsets.back() >= 0, "D_offsets must end with the output's columns");
  const int64_t features = static_cast<int64_t>(feature_table_map.size());
  const int64_t batch = features == 0 ? 0 : std::max<int64_t>(offsets.numel() - 1, 0) / features;
  Tensor out = at::empty({batch, D_offsets.back()}, weights.options().dtype(output_dtype));
  packed_embedding_bag_out(weights, weights_offsets, rows_per_table, run_records, run_starts, run_offsets,
                           directory_kinds, directory, directory_offsets, alpha, beta, beta_offsets, scale_index,
                           zero_rows, zero_row_offsets, levels, levels_offsets, bases, bases_offsets, components,
                           D_offsets, feature_table_map, pooling_mode, indices, offsets,
                           per_sample_weights, output_dtype, bounds_check_mode, bounds_check_warning, out);
  return out;
}

// Writes to no argument: Inductor (torch 2.13) fails on an op that may, and is given None to write to.
Tensor packed_embedding_bag(
    const Tensor& weights, const Tensor& weights_offsets, const Tensor& rows_per_table, const Tensor& run_records,
    const Tensor& run_starts, const Tensor& run_offsets, const Tensor& directory_kinds, const Tensor& directory,
    const Tensor& directory_offsets, const Tensor& alpha, const Tensor& beta, const Tensor& beta_offsets,
    const Tensor& scale_index, const Tensor& zero_rows, const Tensor& zero_row_offsets, const Tensor& levels,
    const Tensor& levels_offsets, const Tensor& bases, const Tensor& bases_offsets, const Tensor& components,
    at::IntArrayRef D_offsets, at::IntArrayRef feature_table_map, at::IntArrayRef pooling_mode, const Tensor& indices,
    const Tensor& offsets, const std::optional<Tensor>& per_sample_weights, at::ScalarType output_dtype,
    int64_t bounds_check_mode) {
  return packed_embedding_bag_counting(weights, weights_offsets, rows_per_table, run_records, run_starts, run_offsets,
                                       directory_kinds, directory, directory_offsets, alpha, beta, beta_offsets,
                                       scale_index, zero_rows, zero_row_offsets, levels, levels_offsets, bases,
                                       bases_offsets, components, D_offsets, feature_table_map,
                                       pooling_mode, indices, offsets, per_sample_weights, output_dtype,
                                       bounds_check_mode, std::nullopt);
}

// No default for output_dtype: AOTInductor writes that of a ScalarType as an int, and then refuses to load it.
constexpr const char* kArguments =
    "Tensor weights, Tensor weights_offsets, Tensor rows_per_table, Tensor run_records, Tensor run_starts, "
    "Tensor run_offsets, Tensor directory_kinds, Tensor directory, Tensor directory_offsets, Tensor alpha, "
    "Tensor beta, Tensor beta_offsets, Tensor scale_index, Tensor zero_rows, Tensor zero_row_offsets, "
    "Tensor levels, Tensor levels_offsets, Tensor bases, Tensor bases_offsets, Tensor components, "
    "int[] D_offsets, int[] feature_table_map, int[] pooling_mode, Tensor indices, Tensor offsets, "
    "Tensor? per_sample_weights, ScalarType output_dtype, int bounds_check_mode=0";
constexpr const char* kCounter = ", Tensor(a!)? bounds_check_warning=None";

}  // namespace
}  // namespace torchrec_mpe

TORCH_LIBRARY_FRAGMENT(torchrec_mpe, m) {
  const std::string arguments = torchrec_mpe::kArguments;
  const std::string counting = arguments + torchrec_mpe::kCounter;
  m.def(("packed_embedding_bag(" + arguments + ") -> Tensor").c_str());
  m.def(("packed_embedding_bag_counting(" + counting + ") -> Tensor").c_str());
  m.def(("packed_embedding_bag_out(" + counting + ", *, Tensor(b!) out) -> ()").c_str());
}

TORCH_LIBRARY_IMPL(torchrec_mpe, CPU, m) {
  m.impl("packed_embedding_bag", torchrec_mpe::packed_embedding_bag);
  m.impl("packed_embedding_bag_counting", torchrec_mpe::packed_embedding_bag_counting);
  m.impl("packed_embedding_bag_out", torchrec_mpe::packed_embedding_bag_out);
}
