// Fake quantization of embedding rows, for search (expectation over bit-widths) and retraining (one width a row).
// Nothing here or in quantization.inc.h knows torch. A kernel works on a block of at most kBlock rows.
#pragma once

#include <cstdint>

#include "simd_targets.h"

// GCC has __builtin_shufflevector from 12 on; before it has __builtin_shuffle, which Clang lacks.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#define TORCHREC_MPE_NO_SHUFFLEVECTOR
#endif
#ifdef TORCHREC_MPE_NO_SHUFFLEVECTOR
#define TORCHREC_MPE_SHUFFLE(Mask, a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#else
#define TORCHREC_MPE_SHUFFLE(Mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

namespace torchrec_mpe {
namespace quantization {

constexpr int kBlock = 256;
constexpr int kMaxBits = 8;
constexpr int kMaxCandidates = 9;
constexpr int kVectorBytes = 64;  // arrays over columns are zero-padded to whole vectors
constexpr int kSums = 16;         // of one group: 8 candidates, the zero row, beta

// What a group's line holds, in a first cache line for the forward and a second one for the backward.
enum GroupField {
  kStepTimesP = 0,
  kZeroP = 8,
  kNonzeroP = 9,
  kAllScaledP = 10,
  kP = 16,
  kScaledP = 24,
  kGroupFields = 32
};

// The rows of a block: row i is read at rows + i * dim, its output or gradient at its offset.
template <typename T>
struct Block {
  int64_t size = 0;
  const T* rows = nullptr;
  int64_t first = 0;           // the block's first row among all
  int32_t line[kBlock];        // feature group, or candidate
  int32_t table[kBlock];       // line of the zero rows
  int64_t offset[kBlock];      // of the output row, in elements
  T weight[kBlock];            // in the bag's sum
  T inverse_length[kBlock];    // part of weight that is no per-sample weight
};

template <typename T>
struct Parameters {
  int64_t dim;
  int64_t padded_dim;
  const T* beta;       // [padded_dim]
  const T* zero_rows;  // [tables, padded_dim], one line of zeros if there are none

  // Search: the candidates of more than 0 bits.
  int num_candidates;
  const T* groups;  // [G, kGroupFields]
  T inverse_step[kMaxBits];

  // Both; in retraining by candidate, whatever its bits.
  T low[kMaxCandidates];
  T high[kMaxCandidates];

  // Retraining: by candidate. A candidate of 0 bits has step 1, code 0.
  T step[kMaxCandidates];
  T scale[kMaxCandidates];
  T is_zero[kMaxCandidates];
};

// Sums of gradients over the rows of one chunk.
struct Sums {
  double* alpha;      // [kMaxCandidates]; in search without the part that the groups' sums give
  double* beta;       // [padded_dim]
  double* zero_rows;  // [tables, padded_dim]
  double* groups;     // [G, kSums], search only
};

// Of search or of retraining.
template <typename T>
struct Kernels {
  // With pooled, rows are added to `out` with their weights; else written.
  void (*forward)(const Block<T>&, const Parameters<T>&, bool pooled, T* out);
  // `scratch` is [2, padded_dim]; grad_weights [size] or null.
  void (*backward)(const Block<T>&, const Parameters<T>&, const T* grad, T* grad_rows, T* grad_weights, T* scratch,
                   const Sums&);
  // to[to_offset[i] ..] += weight[i] * from[from_offset[i] ..], `dim` elements each.
  void (*add_rows)(int64_t size, int64_t dim, const T* from, const int64_t* from_offset, const T* weight, T* to,
                   const int64_t* to_offset);
  // dots[i] = weight[i] * dot of a's and b's `dim` elements.
  void (*dot_rows)(int64_t size, int64_t dim, const T* a, const int64_t* a_offset, const T* b, const int64_t* b_offset,
                   const T* weight, T* dots);
};

TORCHREC_MPE_OF_EACH_CPU(
    template <typename T>
    Kernels<T> kernels(bool search);)

}  // namespace quantization
}  // namespace torchrec_mpe
