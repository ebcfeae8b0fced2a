// Packed tables as the CPU kernels see them. torchrec_mpe/packing/packed_tables.py and ops/directory.py draw the bytes.
#pragma once

#include <cstdint>

namespace torchrec_mpe {

constexpr int kMaxBits = 8;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kNibbleRows = 120;   // rows of a line of a nibble directory
constexpr int64_t kBitmapRows = 448;   // rows of a line of a bitmap directory
constexpr int64_t kEndPadding = 64;    // bytes of the weights after the last row

constexpr int32_t kMaxSplits = 64;     // of a wavelet directory

enum class Directory : int32_t { Ranked = 0, Remap = 1, Nibble = 2, Bitmap = 3, BitmapNibble = 4, Wavelet = 5 };

// Neighbouring ranks of a wavelet directory in two halves. Rows of either half go on to another split; 0: to ranks in
// the order of their ids, from `first` or `first + kept` on; -n: to int32 ranks from line n on.
struct Split {
  int32_t first;
  int32_t rows;
  int32_t kept;  // rows of the lower half, whose bits are set
  int32_t line;  // the first one of its bitmap
  int32_t set;
  int32_t rest;
  int32_t splits;  // of the table, and how many a row meets at most; both in the root alone
  int32_t levels;
};
static_assert(sizeof(Split) == 32, "the stored split");

constexpr uint32_t kTransformed = 0x80000000;  // of RunRecord::coding
constexpr int kMaxComponents = 16;             // of a transformed row
constexpr int kComponentBlocks = 5;            // of components of one width: {0}, {1}, {2, 3}, {4..7}, {8..15}

// Neighbouring ranks of one coding: the row of rank r starts at bit `bit` + r * row_bits of its table.
struct RunRecord {
  int64_t bit;
  uint32_t row_bits;
  uint32_t coding;  // plain: the bit-width; or kTransformed and the width of each block of components, 4 bits each
};
static_assert(sizeof(RunRecord) == 16, "the stored record");

struct PackedTable {
  const uint8_t* weights;      // the table's first byte, or up to a line before
  int64_t weights_bytes;       // readable bytes from there, kEndPadding included
  int64_t first_byte;          // of the table from `weights` on
  int64_t num_rows;
  int32_t embedding_dim;
  int32_t blocks;              // ceil(embedding_dim / 8); a row of b bits has blocks * b bytes
  Directory kind;
  const uint8_t* directory;
  const Split* splits;         // of Wavelet, each before those that it leads to, and all lines in the directory
  int64_t nibble_lines;        // of Nibble and BitmapNibble
  const uint8_t* nibbles;      // first nibble line
  const RunRecord* runs;       // of Ranked, Remap and Bitmap
  const int32_t* run_starts;
  int32_t num_runs;
  const float* alpha;          // [kMaxBits + 1]; null: a coded table, whose plain runs have a step size each
  const float* beta;           // [embedding_dim]; a coded table's mean
  const float* zero_row;       // [embedding_dim], or null: zeros
  const uint16_t* levels;      // bfloat16, of a coded table's runs one after another
  int64_t num_levels;          // readable from there
  const float* basis;          // [components, embedding_dim], of a coded table
  int32_t components;          // of its transformed rows
};

}  // namespace torchrec_mpe
