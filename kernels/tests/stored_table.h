// Tables of known codes, stored bit by bit as torchrec_mpe/packing/packed_tables.py and ops/directory.py say, and the
// view of them that the op's binding hands to the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "fenced_buffer.h"
#include "packed_tables.h"
#include "random_source.h"
#include "wavelet_splits.h"

namespace torchrec_mpe {

inline int64_t lines(int64_t rows, int64_t rows_a_line) {
  return (rows + rows_a_line - 1) / rows_a_line;
}

// What a table means: row i has bits[i] bits and the unsigned codes [i * 8 * blocks, i * 8 * blocks + dim).
struct Rows {
  int32_t dim;
  std::vector<int> bits;
  std::vector<uint8_t> codes;

  Rows(int32_t dim_, std::vector<int> bits_, Random& random) : dim(dim_), bits(std::move(bits_)) {
    codes.resize(bits.size() * blocks() * 8);
    for (size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<uint8_t>(random.next() & ((1u << bits[i / (blocks() * 8)]) - 1));
    }
  }

  int64_t blocks() const {
    return (dim + 7) / 8;
  }

  int64_t size() const {
    return static_cast<int64_t>(bits.size());
  }
};

// What an element of a row is, and the sum without signs of what a kernel may add up for it: codes with a bias, so that
// a code counts with its range.
struct Element {
  double value = 0.0;
  double magnitude = 0.0;
};

// The bytes of a table.
struct StoredTable {
  int32_t dim = 0;
  Directory kind = Directory::Ranked;
  int64_t num_rows = 0;
  std::vector<uint8_t> weights;    // kEndPadding included
  int64_t first_byte = 0;          // of the table
  std::vector<uint8_t> directory;  // a bitmap's lines before the nibbles'
  std::vector<RunRecord> runs;
  std::vector<int32_t> run_starts;
  std::vector<float> alpha;        // empty: a coded table
  std::vector<float> beta;
  std::vector<float> zero_row;     // empty: zeros
  std::vector<uint16_t> levels;
  std::vector<float> basis;
  int32_t components = 0;
};

inline Element element_of(const Rows& rows, const StoredTable& table, int64_t row, int32_t d) {
  const int bits = rows.bits[row];
  if (bits == 0) {
    const double value = table.zero_row.empty() ? 0.0 : table.zero_row[d];
    return {value, std::fabs(value)};
  }
  const int code = rows.codes[row * rows.blocks() * 8 + d];
  return {static_cast<double>(code - (1 << (bits - 1))) * table.alpha[bits] + table.beta[d],
          (1 << bits) * std::fabs(static_cast<double>(table.alpha[bits])) + std::fabs(table.beta[d])};
}

inline void append_row(std::vector<uint8_t>& weights, const Rows& rows, int64_t row) {
  const int bits = rows.bits[row];
  const size_t start = weights.size();
  weights.resize(start + rows.blocks() * bits);
  for (int64_t element = 0; element < rows.blocks() * 8; ++element) {
    for (int bit = 0; bit < bits; ++bit) {
      const size_t position = element / 8 * bits * 8 + element % 8 * bits + bit;
      const int value = rows.codes[row * rows.blocks() * 8 + element] >> bit & 1;
      weights[start + position / 8] |= static_cast<uint8_t>(value << (position % 8));
    }
  }
}

template <class Word>
void put(std::vector<uint8_t>& bytes, size_t position, Word word) {
  std::memcpy(bytes.data() + position, &word, sizeof(Word));
}

// Rows in the order of their ranks; neighbours of one width make a run.
inline void store_runs(StoredTable& table, const Rows& rows, const std::vector<int64_t>& ranked) {
  for (size_t rank = 0; rank < ranked.size(); ++rank) {
    const int bits = rows.bits[ranked[rank]];
    if (rank == 0 || bits != rows.bits[ranked[rank - 1]]) {
      const int64_t row_bytes = rows.blocks() * bits;
      RunRecord record{0, 0, 0};
      if (bits > 0) {
        table.weights.resize(lines(table.weights.size(), kLineBytes) * kLineBytes);
        record = {8 * (static_cast<int64_t>(table.weights.size()) - static_cast<int64_t>(rank) * row_bytes),
                  static_cast<uint32_t>(8 * row_bytes), static_cast<uint32_t>(bits)};
      }
      table.runs.push_back(record);
      table.run_starts.push_back(static_cast<int32_t>(rank));
    }
    append_row(table.weights, rows, ranked[rank]);
  }
  if (table.runs.empty()) {
    table.runs.push_back({0, 0, 0});
    table.run_starts.push_back(0);
  }
}

inline void store_nibbles(StoredTable& table, const Rows& rows, const std::vector<int64_t>& ranked) {
  const size_t first_line = table.directory.size();
  table.directory.resize(first_line + lines(ranked.size(), kNibbleRows) * kLineBytes);
  for (size_t rank = 0; rank < ranked.size(); ++rank) {
    const size_t line = first_line + rank / kNibbleRows * kLineBytes;
    const int position = static_cast<int>(rank % kNibbleRows);
    if (position == 0) {
      put(table.directory, line, static_cast<uint32_t>(table.weights.size() / rows.blocks()));
    }
    table.directory[line + 4 + position / 2] |= static_cast<uint8_t>(rows.bits[ranked[rank]] << (position % 2 * 4));
    append_row(table.weights, rows, ranked[rank]);
  }
}

inline std::vector<int64_t> store_bitmap(StoredTable& table, const Rows& rows) {
  table.directory.resize(lines(rows.size(), kBitmapRows) * kLineBytes);
  std::vector<int64_t> kept;
  for (int64_t row = 0; row < rows.size(); ++row) {
    const size_t line = row / kBitmapRows * kLineBytes;
    const int bit = static_cast<int>(row % kBitmapRows);
    if (bit == 0) {
      put(table.directory, line, static_cast<uint64_t>(kept.size()));
    }
    if (rows.bits[row] > 0) {
      table.directory[line + 8 + bit / 8] |= static_cast<uint8_t>(1 << (bit % 8));
      kept.push_back(row);
    }
  }
  return kept;
}

inline StoredTable store(const Rows& rows, Directory kind, Random& random) {
  StoredTable table;
  table.dim = rows.dim;
  table.kind = kind;
  table.num_rows = rows.size();
  std::vector<int64_t> ranked(rows.size());
  std::iota(ranked.begin(), ranked.end(), 0);
  switch (kind) {
    case Directory::Ranked:
      store_runs(table, rows, ranked);
      break;
    case Directory::Remap:
      std::stable_sort(ranked.begin(), ranked.end(), [&](int64_t a, int64_t b) { return rows.bits[a] > rows.bits[b]; });
      table.directory.resize(4 * ranked.size());
      for (size_t rank = 0; rank < ranked.size(); ++rank) {
        put(table.directory, 4 * ranked[rank], static_cast<int32_t>(rank));
      }
      store_runs(table, rows, ranked);
      break;
    case Directory::Nibble:
      store_nibbles(table, rows, ranked);
      break;
    case Directory::Bitmap:
      store_runs(table, rows, store_bitmap(table, rows));
      break;
    case Directory::BitmapNibble:
      store_nibbles(table, rows, store_bitmap(table, rows));
      break;
    case Directory::Wavelet:  // of coded tables
      break;
  }
  table.weights.resize(table.weights.size() + kEndPadding);
  for (int bits = 0; bits <= kMaxBits; ++bits) {
    table.alpha.push_back(bits == 0 ? 0.0f : 1.5f / static_cast<float>(1 << bits) + 0.01f * random.unit());
  }
  for (int32_t d = 0; d < rows.dim; ++d) {
    table.beta.push_back(random.unit());
  }
  if (random.below(3) > 0) {
    for (int32_t d = 0; d < rows.dim; ++d) {
      table.zero_row.push_back(random.unit());
    }
  }
  return table;
}

// A stored table in memory of exactly its size, as class PackedTables of packed_embedding_bag_op.cpp admits it.
class FencedTable {
 public:
  explicit FencedTable(const StoredTable& table)
      : weights_(table.weights), directory_(table.directory), runs_(table.runs), run_starts_(table.run_starts),
        alpha_(table.alpha), beta_(table.beta), zero_row_(table.zero_row), levels_(table.levels), basis_(table.basis) {
    const int64_t bitmap =
        table.kind == Directory::BitmapNibble ? lines(table.num_rows, kBitmapRows) * kLineBytes : 0;
    const bool has_nibbles = table.kind == Directory::Nibble || table.kind == Directory::BitmapNibble;
    view_.weights = weights_.data();
    view_.weights_bytes = static_cast<int64_t>(weights_.size());
    view_.first_byte = table.first_byte;
    view_.num_rows = table.num_rows;
    view_.embedding_dim = table.dim;
    view_.blocks = (table.dim + 7) / 8;
    view_.kind = table.kind;
    view_.directory = directory_.data();
    admitted_ = table.kind != Directory::Wavelet ||
                take_splits(view_, static_cast<int64_t>(table.directory.size()) / kLineBytes);
    view_.nibbles = directory_.data() + bitmap;
    view_.nibble_lines = has_nibbles ? (static_cast<int64_t>(directory_.size()) - bitmap) / kLineBytes : 0;
    view_.runs = runs_.data();
    view_.run_starts = run_starts_.data();
    view_.num_runs = static_cast<int32_t>(runs_.size());
    view_.alpha = alpha_.size() == 0 ? nullptr : alpha_.data();
    view_.beta = beta_.data();
    view_.zero_row = zero_row_.size() == 0 ? nullptr : zero_row_.data();
    view_.levels = levels_.data();
    view_.num_levels = static_cast<int64_t>(levels_.size());
    view_.basis = basis_.data();
    view_.components = table.components;
  }

  const PackedTable& view() const {
    return view_;
  }

  // Whether the binding takes it.
  bool admitted() const {
    return admitted_;
  }

 private:
  FencedBuffer<uint8_t> weights_;
  FencedBuffer<uint8_t> directory_;
  FencedBuffer<RunRecord> runs_;
  FencedBuffer<int32_t> run_starts_;
  FencedBuffer<float> alpha_;
  FencedBuffer<float> beta_;
  FencedBuffer<float> zero_row_;
  FencedBuffer<uint16_t> levels_;
  FencedBuffer<float> basis_;
  PackedTable view_{};
  bool admitted_ = true;
};

}  // namespace torchrec_mpe
