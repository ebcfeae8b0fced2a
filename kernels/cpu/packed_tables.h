// Packed tables as the CPU kernels see them. torchrec_mpe/packing/packed_tables.py and ops/directory.py draw the bytes.
#pragma once

#include <cstdint>

namespace torchrec_mpe {

constexpr int kMaxBits = 8;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kNibbleRows = 120;   // rows of a line of a nibble directory
constexpr int64_t kBitmapRows = 448;   // rows of a line of a bitmap directory
constexpr int64_t kEndPadding = 64;    // bytes of the weights after the last row

enum class Directory : int32_t { Ranked = 0, Remap = 1, Nibble = 2, Bitmap = 3, BitmapNibble = 4 };

// Neighbouring ranks of one bit-width: the row of rank r starts at byte offset + r * row_bytes of its table.
struct RunRecord {
  int64_t offset;
  uint32_t row_bytes;
  uint32_t bits;
};
static_assert(sizeof(RunRecord) == 16, "the stored record");

struct PackedTable {
  const uint8_t* weights;      // the table's first byte
  int64_t weights_bytes;       // readable bytes from there, kEndPadding included
  int64_t num_rows;
  int32_t embedding_dim;
  int32_t blocks;              // ceil(embedding_dim / 8); a row of b bits has blocks * b bytes
  Directory kind;
  const uint8_t* directory;
  int64_t nibble_lines;        // of Nibble and BitmapNibble
  const uint8_t* nibbles;      // first nibble line
  const RunRecord* runs;       // of Ranked, Remap and Bitmap
  const int32_t* run_starts;
  int32_t num_runs;
  const float* alpha;          // [kMaxBits + 1]
  const float* beta;           // [embedding_dim]
  const float* zero_row;       // [embedding_dim], or null: zeros
};

}  // namespace torchrec_mpe
