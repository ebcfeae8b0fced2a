// Lookup and pooling of packed tables: what the three instruction sets implement.
//
// A bag of row ids is turned into its pooled embedding in four steps, each a block of rows ahead of the next so that
// memory has time to answer: fetch the directory's lines, resolve ids to ranks, locate rows (byte, bit-width, scale)
// and fetch them, accumulate.
#pragma once

#include <cstdint>

#include "packed_tables.h"
#include "simd_targets.h"

namespace torchrec_mpe {

enum class OutputType { Float, Half, BFloat16 };

// F features of B bags each; feature f's bag b is bag f * B + b of offsets.
struct Feature {
  const PackedTable* table;
  int64_t column;   // where its output starts in a row of the output
  bool mean;
};

struct Lookup {
  const Feature* features;
  int64_t num_features;
  int64_t batch;
  const void* indices;       // int64_t or int32_t [num_indices]
  bool indices_64;
  int64_t num_indices;
  const void* offsets;       // int64_t or int32_t [num_features * batch + 1]
  bool offsets_64;
  const float* weights;      // [num_indices], or null
  void* output;              // [batch, output_stride]
  OutputType output_type;
  int64_t output_stride;
};

// What a lookup met that it did not read.
struct Faults {
  int64_t bad_ids = 0;              // ids outside their table, read as row 0
  int64_t first_bad_id = -1;        // position in indices of one of them, the first of its thread
  int64_t bad_id_feature = -1;
  int64_t bad_offset = -1;          // a bag whose offsets decrease or leave indices; its feature's rest is not written
  int64_t damaged_feature = -1;     // whose directory or runs point outside the weights; read as 0-bit rows
};

// Pools bags [first, last) of all features' bags.
using LookupBags = void (*)(const Lookup& lookup, int64_t first, int64_t last, Faults& faults);

TORCHREC_MPE_OF_EACH_CPU(void lookup_bags(const Lookup& lookup, int64_t first, int64_t last, Faults& faults);)

}  // namespace torchrec_mpe
