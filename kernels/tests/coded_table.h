// Coded tables of known codes, stored bit by bit as torchrec_mpe/packing/packed_tables.py says.
#pragma once

#include <cstddef>

#include "stored_table.h"

namespace torchrec_mpe {

// Neighbouring ranks of one coding: plain rows of `bits`, or transformed ones.
struct CodedRun {
  int64_t rows;
  bool transformed;
  int bits;
  int block_bits[kComponentBlocks];
};

constexpr Directory kCodedDirectories[] = {Directory::Ranked, Directory::Remap, Directory::Wavelet};

// What a coded table means: rank r has the unsigned codes [r * stride, ...) of its elements or its components.
struct CodedRows {
  int32_t dim;
  int32_t components;
  std::vector<CodedRun> runs;
  std::vector<int> run_of;       // of each rank
  std::vector<int64_t> rank_of;  // of each row
  std::vector<uint8_t> codes;
  std::vector<std::vector<float>> scales;   // of each run: its step size, or of each component
  std::vector<std::vector<float>> offsets;

  CodedRows(int32_t dim_, int32_t components_, std::vector<CodedRun> runs_, Directory kind, Random& random)
      : dim(dim_), components(components_), runs(std::move(runs_)) {
    for (size_t k = 0; k < runs.size(); ++k) {
      scales.emplace_back();
      offsets.emplace_back();
      for (int32_t c = 0; c < kMaxComponents; ++c) {
        // Whole bfloat16 numbers.
        scales[k].push_back(std::ldexp(static_cast<float>(1 + random.below(15)), -10));
        offsets[k].push_back(std::ldexp(static_cast<float>(random.below(255) - 127), -7));
      }
      run_of.insert(run_of.end(), runs[k].rows, static_cast<int>(k));
    }
    rank_of.resize(run_of.size());
    std::iota(rank_of.begin(), rank_of.end(), 0);
    for (int64_t row = size() - 1; kind != Directory::Ranked && row > 0; --row) {
      std::swap(rank_of[row], rank_of[random.below(row + 1)]);
    }
    if (kind == Directory::Wavelet) {
      // The ranks of a run in the order of the rows.
      std::vector<int64_t> following;
      int64_t first = 0;
      for (const CodedRun& run : runs) {
        following.push_back(first);
        first += run.rows;
      }
      for (int64_t& rank : rank_of) {
        rank = following[run_of[rank]]++;
      }
    }
    codes.resize(run_of.size() * stride());
    for (size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<uint8_t>(random.next() & ((1u << width(run_of[i / stride()], i % stride())) - 1));
    }
  }

  int64_t stride() const {
    return std::max<int64_t>((dim + 7) / 8 * 8, kMaxComponents);
  }

  int64_t size() const {
    return static_cast<int64_t>(run_of.size());
  }

  // Bits of an element or of a component of a row.
  int width(int k, int64_t place) const {
    const CodedRun& run = runs[k];
    if (!run.transformed) {
      return place < (dim + 7) / 8 * 8 ? run.bits : 0;
    }
    int block = 0;
    while (place >= (1 << block)) {
      ++block;
    }
    return place < components ? run.block_bits[block] : 0;
  }

  int row_bits(int k) const {
    int bits = 0;
    for (int64_t place = 0; place < stride(); ++place) {
      bits += width(k, place);
    }
    return bits;
  }
};

inline Element element_of(const CodedRows& rows, const StoredTable& table, int64_t row, int32_t d) {
  const int64_t rank = rows.rank_of[row];
  const int k = rows.run_of[rank];
  const uint8_t* codes = rows.codes.data() + rank * rows.stride();
  const CodedRun& run = rows.runs[k];
  if (!run.transformed && run.bits == 0) {
    const double value = table.zero_row.empty() ? 0.0 : table.zero_row[d];
    return {value, std::fabs(value)};
  }
  Element element{table.beta[d], std::fabs(table.beta[d])};
  if (!run.transformed) {
    const double step = rows.scales[k][0];
    element.value += (codes[d] - (1 << (run.bits - 1))) * step;
    element.magnitude += (1 << run.bits) * step;
    return element;
  }
  for (int32_t c = 0; c < rows.components; ++c) {
    if (rows.width(k, c) > 0) {
      const double basis = table.basis[c * rows.dim + d];
      const double scale = rows.scales[k][c];
      const double offset = rows.offsets[k][c];
      element.value += (scale * codes[c] + offset) * basis;
      element.magnitude += (512.0 * scale + std::fabs(offset)) * std::fabs(basis);
    }
  }
  return element;
}

inline uint16_t to_level(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return static_cast<uint16_t>(word >> 16);
}

// Appends lines of zeros to a directory; returns the first one's number.
inline int32_t append_lines(StoredTable& table, int64_t count) {
  const int64_t first = static_cast<int64_t>(table.directory.size()) / kLineBytes;
  table.directory.resize((first + count) * kLineBytes);
  return static_cast<int32_t>(first);
}

// Stores the tree over runs [low, high), whose rows by id have these ranks: a random one, with ranks in full at times.
// Returns where such rows go on; `next` is the number of the next split.
inline int32_t store_splits(StoredTable& table, const std::vector<int64_t>& starts, size_t low, size_t high,
                            const std::vector<int64_t>& ranks, int32_t& next, Random& random) {
  const bool is_root = next == 0;
  if (!is_root && (random.below(6) == 0 || (high - low > 1 && next == kMaxSplits))) {
    const int32_t line = append_lines(table, lines(static_cast<int64_t>(ranks.size()), kLineBytes / 4));
    for (size_t i = 0; i < ranks.size(); ++i) {
      put(table.directory, line * kLineBytes + 4 * i, static_cast<int32_t>(ranks[i]));
    }
    return -line;
  }
  if (!is_root && high - low == 1) {
    return 0;
  }
  const int32_t own = next++;
  const size_t middle = low + (high - low == 1 ? 1 : 1 + random.below(static_cast<int64_t>(high - low) - 1));
  Split split{};
  split.first = static_cast<int32_t>(starts[low]);
  split.rows = static_cast<int32_t>(ranks.size());
  split.line = append_lines(table, lines(static_cast<int64_t>(ranks.size()), kBitmapRows));
  std::vector<int64_t> halves[2];
  for (size_t i = 0; i < ranks.size(); ++i) {
    const size_t line = (split.line + i / kBitmapRows) * kLineBytes;
    const size_t bit = i % kBitmapRows;
    if (bit == 0) {
      put(table.directory, line, static_cast<uint64_t>(halves[0].size()));
    }
    const bool is_set = ranks[i] < starts[middle];
    table.directory[line + 8 + bit / 8] |= static_cast<uint8_t>(is_set << (bit % 8));
    halves[is_set ? 0 : 1].push_back(ranks[i]);
  }
  split.kept = static_cast<int32_t>(halves[0].size());
  split.set = store_splits(table, starts, low, middle, halves[0], next, random);
  split.rest = middle == high ? 0 : store_splits(table, starts, middle, high, halves[1], next, random);
  put(table.directory, own * sizeof(Split), split);
  return own;
}

inline void store_wavelet(StoredTable& table, const CodedRows& rows, Random& random) {
  std::vector<int64_t> starts{0};
  for (const CodedRun& run : rows.runs) {
    starts.push_back(starts.back() + run.rows);
  }
  append_lines(table, kMaxSplits * static_cast<int64_t>(sizeof(Split)) / kLineBytes);
  int32_t splits = 0;
  store_splits(table, starts, 0, rows.runs.size(), rows.rank_of, splits, random);
  put(table.directory, offsetof(Split, splits), splits);
}

inline StoredTable store(const CodedRows& rows, Directory kind, Random& random) {
  StoredTable table;
  table.dim = rows.dim;
  table.kind = kind;
  table.num_rows = rows.size();
  table.components = rows.components;
  table.first_byte = 8 * random.below(8);
  int64_t bit = 0;
  int64_t rank = 0;
  for (size_t k = 0; k < rows.runs.size(); ++k) {
    const CodedRun& run = rows.runs[k];
    const int64_t row_bits = rows.row_bits(static_cast<int>(k));
    uint32_t coding = static_cast<uint32_t>(run.bits);
    if (run.transformed) {
      coding = kTransformed;
      for (int block = 0; block < kComponentBlocks; ++block) {
        coding |= static_cast<uint32_t>(run.block_bits[block]) << (4 * block);
      }
      for (int32_t c = 0; c < rows.components; ++c) {
        if (rows.width(static_cast<int>(k), c) > 0) {
          table.levels.push_back(to_level(rows.scales[k][c]));
          table.levels.push_back(to_level(rows.offsets[k][c]));
        }
      }
    } else if (run.bits > 0) {
      table.levels.push_back(to_level(rows.scales[k][0]));
      // To a line at times, to a byte at least.
      const int64_t alignment = random.below(2) == 0 ? 512 : 8;
      bit = (bit + alignment - 1) / alignment * alignment;
    }
    table.runs.push_back({row_bits == 0 ? 0 : bit - rank * row_bits, static_cast<uint32_t>(row_bits), coding});
    table.run_starts.push_back(static_cast<int32_t>(rank));
    table.weights.resize(table.first_byte + (bit + run.rows * row_bits + 7) / 8);
    for (int64_t i = 0; i < run.rows; ++i, ++rank) {
      for (int64_t place = 0; place < rows.stride(); ++place) {
        const int width = rows.width(static_cast<int>(k), place);
        for (int b = 0; b < width; ++b, ++bit) {
          const int value = rows.codes[rank * rows.stride() + place] >> b & 1;
          table.weights[table.first_byte + bit / 8] |= static_cast<uint8_t>(value << (bit % 8));
        }
      }
    }
  }
  table.weights.resize(table.weights.size() + kEndPadding);
  if (kind == Directory::Remap) {
    table.directory.resize(4 * rows.size());
    for (int64_t row = 0; row < rows.size(); ++row) {
      put(table.directory, 4 * row, static_cast<int32_t>(rows.rank_of[row]));
    }
  }
  if (kind == Directory::Wavelet) {
    store_wavelet(table, rows, random);
  }
  for (int32_t i = 0; i < rows.dim * rows.components; ++i) {
    table.basis.push_back(random.unit());
  }
  const bool has_zero_row = random.below(3) > 0;
  for (int32_t d = 0; d < rows.dim; ++d) {
    table.beta.push_back(random.unit());
    if (has_zero_row) {
      table.zero_row.push_back(random.unit());
    }
  }
  return table;
}

// Runs of both kinds, or of one: of up to `longest` rows each, the last few without bits at times.
inline std::vector<CodedRun> random_runs(int64_t count, int64_t longest, int plain_of_8, Random& random) {
  std::vector<CodedRun> runs;
  for (int64_t k = 0; k < count; ++k) {
    CodedRun run{1 + random.below(longest), random.below(8) >= plain_of_8, 0, {}};
    if (run.transformed) {
      for (int& bits : run.block_bits) {
        bits = static_cast<int>(random.below(3) == 0 ? 0 : random.below(kMaxBits + 1));
      }
    } else {
      run.bits = static_cast<int>(random.below(kMaxBits + 1));
    }
    runs.push_back(run);
  }
  return runs;
}

}  // namespace torchrec_mpe
