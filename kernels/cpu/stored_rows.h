// Rows of backing stores: quantized and written, read and dequantized. torchrec_mpe/ops/reference/stored_rows.py says
// what is computed; all instruction sets compute its bits.
#pragma once

#include <cstdint>

#include "simd_targets.h"

namespace torchrec_mpe {

enum class StateType { Float, BFloat16, Ue6m2 };

// An optimizer state of the rows in a cache.
struct CachedState {
  float* values;  // [slots, elements]
  int64_t elements;
  StateType type;  // in the store
};

// The rows of a table that change place, where they are stored and where they are cached.
struct StoredRows {
  uint8_t* rows4;  // [n4, row_bytes4]
  uint8_t* rows8;  // [n8, row_bytes8]
  int64_t n4, n8;
  int64_t row_bytes4, row_bytes8;
  const int64_t* is_wide;      // of each row, 64 a word; null if all rows have one width
  const int32_t* wide_before;  // 8-bit rows before each word's
  float* values;               // [slots, dim]
  int64_t dim;
  const CachedState* states;
  int64_t num_states;
  const int32_t* slots;  // [n]
  const int32_t* rows;   // [n]
};

// Of one table's write.
struct Rounding {
  bool stochastic;
  uint32_t batch;
  uint64_t seed;
  int64_t first_row;
  int64_t first_column;
};

// A row's place, `index` among those of its width.
struct StoredPlace {
  bool wide;
  int64_t index;
};

inline StoredPlace place_of(const StoredRows& table, int64_t row) {
  if (table.is_wide == nullptr) {
    return {table.n8 > 0, row};
  }
  const uint64_t word = static_cast<uint64_t>(table.is_wide[row >> 6]);
  const uint64_t below = word & ((uint64_t{1} << (row & 63)) - 1);
  const int64_t before = table.wide_before[row >> 6] + __builtin_popcountll(below);
  return word >> (row & 63) & 1 ? StoredPlace{true, before} : StoredPlace{false, row - before};
}

// Moves [first, last) of a table. Slots, rows and places must have been checked.
using WriteRows = void (*)(const StoredRows& table, const Rounding& rounding, int64_t first, int64_t last);
using ReadRows = void (*)(const StoredRows& table, int64_t first, int64_t last);

TORCHREC_MPE_OF_EACH_CPU(
    void write_stored_rows(const StoredRows& table, const Rounding& rounding, int64_t first, int64_t last);
    void read_stored_rows(const StoredRows& table, int64_t first, int64_t last);)

}  // namespace torchrec_mpe
