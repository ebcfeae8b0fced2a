// x86-64 with AVX2 and FMA: a block of 8 elements a vector.
#include "simd_targets.h"
#ifdef TORCHREC_MPE_X86

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "packed_embedding_bag.h"

TORCHREC_MPE_BEGIN_AVX2

namespace torchrec_mpe {
namespace avx2 {

#include "output.inc.h"

#include "packed_embedding_bag_ring.inc.h"

inline uint64_t low_bits(uint64_t word, int count) {
  return _bzhi_u64(word, static_cast<unsigned>(std::min(std::max(count, 0), 64)));
}

#include "directory_lines.inc.h"
#include "packed_embedding_bag_coding.inc.h"

// How the 8 codes of a block are cut out of its 64-bit word: two vectors of shifts, whose low halves interleave to
// elements 0 1 2 3 4 5 6 7.
struct WidthConstants {
  alignas(32) int64_t shift_0145[4];
  alignas(32) int64_t shift_2367[4];
  alignas(32) int32_t mask[8];
  alignas(32) int32_t half[8];
};

inline const WidthConstants* width_constants() {
  static const auto table = [] {
    std::vector<WidthConstants> widths(kMaxBits + 1);
    for (int bits = 0; bits <= kMaxBits; ++bits) {
      const int first[4] = {0, 1, 4, 5};
      for (int k = 0; k < 4; ++k) {
        widths[bits].shift_0145[k] = first[k] * bits;
        widths[bits].shift_2367[k] = (first[k] + 2) * bits;
      }
      std::fill_n(widths[bits].mask, 8, (1 << bits) - 1);
      std::fill_n(widths[bits].half, 8, (1 << bits) >> 1);
    }
    return widths;
  }();
  return table.data();
}

inline __m256 codes_of_block(const uint8_t* block, const WidthConstants& width) {
  int64_t word;
  std::memcpy(&word, block, 8);
  const __m256i words = _mm256_set1_epi64x(word);
  const __m256i a = _mm256_srlv_epi64(words, _mm256_load_si256(reinterpret_cast<const __m256i*>(width.shift_0145)));
  const __m256i b = _mm256_srlv_epi64(words, _mm256_load_si256(reinterpret_cast<const __m256i*>(width.shift_2367)));
  __m256i codes = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
  codes = _mm256_and_si256(codes, _mm256_load_si256(reinterpret_cast<const __m256i*>(width.mask)));
  codes = _mm256_sub_epi32(codes, _mm256_load_si256(reinterpret_cast<const __m256i*>(width.half)));
  return _mm256_cvtepi32_ps(codes);
}

// One bag's sum of G blocks in registers, or of any number of blocks in memory for G = 0.
template <int G>
class Accumulator {
 public:
  static constexpr int kLines = G == 0 ? 0 : 2;  // that a row spans; 0: any number
  static constexpr bool kHasVariants = false;

  Accumulator(int dim, int blocks) : dim_(dim), blocks_(G == 0 ? blocks : G), memory_(G == 0 ? blocks * 8 : 0) {}

  template <Rows kRows>
  struct Registers {};

  struct Sum {
    __m256 vectors[G == 0 ? 1 : G];
  };

  __attribute__((always_inline)) void clear(Sum& sum) {
#pragma GCC unroll 8
    for (int k = 0; k < G; ++k) {
      sum.vectors[k] = _mm256_setzero_ps();
    }
    std::fill(memory_.begin(), memory_.end(), 0.0f);
  }

  // Adds scale * code for every element of a row; reads up to 7 bytes beyond it.
  template <Rows kRows>
  __attribute__((always_inline)) void add(Sum& sum, const Registers<kRows>&, const uint8_t* weights, const Ring& ring,
                                          int slot) {
    const uint8_t* row = weights + ring.start[slot];
    const int bits = ring.bits[slot];
    const float scale = ring.scale[slot];
    const WidthConstants& width = width_[bits];
    const __m256 scales = _mm256_set1_ps(scale);
    if (G == 0) {
      for (int k = 0; k < blocks_; ++k) {
        const __m256 before = _mm256_loadu_ps(memory_.data() + 8 * k);
        const __m256 codes = codes_of_block(row + k * bits, width);
        _mm256_storeu_ps(memory_.data() + 8 * k, _mm256_fmadd_ps(codes, scales, before));
      }
      return;
    }
#pragma GCC unroll 8
    for (int k = 0; k < G; ++k) {
      sum.vectors[k] = _mm256_fmadd_ps(codes_of_block(row + k * bits, width), scales, sum.vectors[k]);
    }
  }

  template <Rows kRows>
  void unbias(Sum&, float) {}

  // Adds [components] @ basis.
  __attribute__((always_inline)) void add_components(Sum& sum, const float* components, const PackedTable& table) {
    for (int c = 0; c < table.components; ++c) {
      const float* basis = table.basis + static_cast<int64_t>(c) * dim_;
      const __m256 component = _mm256_set1_ps(components[c]);
#pragma GCC unroll 8
      for (int k = 0; k < (G == 0 ? blocks_ : G); ++k) {
        const int left = dim_ - 8 * k;
        const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        const __m256 values = _mm256_maskload_ps(basis + 8 * k, mask);
        if (G == 0) {
          float* vector = memory_.data() + 8 * k;
          _mm256_storeu_ps(vector, _mm256_fmadd_ps(component, values, _mm256_loadu_ps(vector)));
        } else {
          sum.vectors[k] = _mm256_fmadd_ps(component, values, sum.vectors[k]);
        }
      }
    }
  }

  __attribute__((always_inline)) void finish(const Sum& sum, const PackedTable& table, float kept, float zero,
                                             float factor, void* output, OutputType type, int64_t position) {
#pragma GCC unroll 8
    for (int k = 0; k < (G == 0 ? blocks_ : G); ++k) {
      __m256 total = G == 0 ? _mm256_loadu_ps(memory_.data() + 8 * k) : sum.vectors[k];
      const int left = dim_ - 8 * k;
      if (left >= 8 && type == OutputType::Float) {
        total = _mm256_fmadd_ps(_mm256_set1_ps(kept), _mm256_loadu_ps(table.beta + 8 * k), total);
        if (table.zero_row != nullptr) {
          total = _mm256_fmadd_ps(_mm256_set1_ps(zero), _mm256_loadu_ps(table.zero_row + 8 * k), total);
        }
        _mm256_storeu_ps(static_cast<float*>(output) + position + 8 * k, _mm256_mul_ps(total, _mm256_set1_ps(factor)));
        continue;
      }
      alignas(32) float values[8];
      _mm256_store_ps(values, total);
      for (int j = 0; j < std::min(left, 8); ++j) {
        float value = values[j] + kept * table.beta[8 * k + j];
        value += table.zero_row == nullptr ? 0.0f : zero * table.zero_row[8 * k + j];
        store_element(output, type, position + 8 * k + j, value * factor);
      }
    }
  }

 private:
  int dim_;
  int blocks_;
  const WidthConstants* width_ = width_constants();
  std::vector<float> memory_;
};

constexpr int kDecodedBytes = 24;  // from a transformed row's first byte to the last that is read, at most

// Adds up the components of transformed rows, in two halves of 8.
class Decoder {
 public:
  static constexpr bool kHasSpans = false;
  static constexpr bool kIsCheap = false;

  struct Sum {
    __m256 halves[2];
  };

  // Without runs there is no transformed row.
  Decoder(const CheckedRuns* runs, Span)
      : none_(runs == nullptr ? 0 : runs->none()), runs_(runs == nullptr ? 0 : none_ + 1) {
    for (int32_t k = 0; k < static_cast<int32_t>(runs_.size()); ++k) {
      Run& run = runs_[k];
      const CheckedRun& checked = (*runs)[k];
      int bit = 0;
      int level = 0;
      for (int c = 0; c < kMaxComponents; ++c) {
        run.second_half = c == 8 ? bit / 8 : run.second_half;
        const int in_half = bit - 8 * (c < 8 ? 0 : run.second_half);
        for (int byte = 0; byte < 4; ++byte) {
          run.permute[4 * c + byte] = static_cast<uint8_t>(in_half / 8 + byte);
        }
        run.shift[c] = in_half % 8;
        bit += checked.widths[c];
        run.mask[c] = (1 << checked.widths[c]) - 1;
        if (checked.widths[c] > 0) {
          run.scale[c] = from_bfloat16(checked.levels[level++]);
          run.offset[c] = from_bfloat16(checked.levels[level++]);
        }
      }
    }
  }

  // What Ring::run is of rows that are not transformed.
  int32_t none() const {
    return none_;
  }

  template <Span>
  __attribute__((always_inline)) void add(Sum& sum, const uint8_t* weights, const Ring& ring, int slot) const {
    const Run& run = runs_[ring.run[slot]];
    const uint8_t* row = weights + ring.start[slot];
    const __m256i first_bit = _mm256_set1_epi32(ring.shift[slot]);
    const __m256 weight = _mm256_set1_ps(ring.weight[slot]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto load = [&](const auto* values) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 8 * half));
      };
      const __m128i* from = reinterpret_cast<const __m128i*>(row + (half == 0 ? 0 : run.second_half));
      const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(from));
      const __m256i permute = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run.permute + 32 * half));
      __m256i codes = _mm256_shuffle_epi8(bytes, permute);
      codes = _mm256_and_si256(_mm256_srlv_epi32(codes, _mm256_add_epi32(load(run.shift), first_bit)), load(run.mask));
      const __m256 values = _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), _mm256_castsi256_ps(load(run.scale)),
                                            _mm256_castsi256_ps(load(run.offset)));
      sum.halves[half] = _mm256_fmadd_ps(weight, values, sum.halves[half]);
    }
  }

  __attribute__((always_inline)) static void join(Sum& sum, const Sum& other) {
    sum.halves[0] = _mm256_add_ps(sum.halves[0], other.halves[0]);
    sum.halves[1] = _mm256_add_ps(sum.halves[1], other.halves[1]);
  }

  __attribute__((always_inline)) static void store(const Sum& sum, float* components) {
    _mm256_storeu_ps(components, sum.halves[0]);
    _mm256_storeu_ps(components + 8, sum.halves[1]);
  }

 private:
  // Byte 4 c + i of permute is byte i of the word in which component c lies, from its half's first byte on.
  struct Run {
    uint8_t permute[4 * kMaxComponents];
    int32_t shift[kMaxComponents];
    int32_t mask[kMaxComponents];
    float scale[kMaxComponents] = {};
    float offset[kMaxComponents] = {};
    int32_t second_half = 0;  // the byte of component 8
  };

  int32_t none_;
  std::vector<Run> runs_;
};

#include "packed_embedding_bag_steps.inc.h"
#include "packed_embedding_bag_plain_steps.inc.h"
#include "packed_embedding_bag_driver.inc.h"

void lookup_feature_by_dim(const Lookup& lookup, int64_t f, int64_t first, int64_t last, Faults& faults) {
  switch (lookup.features[f].table->blocks) {
    case 1: return lookup_feature_of<1>(lookup, f, first, last, faults);
    case 2: return lookup_feature_of<2>(lookup, f, first, last, faults);
    case 4: return lookup_feature_of<4>(lookup, f, first, last, faults);
    case 8: return lookup_feature_of<8>(lookup, f, first, last, faults);
    default: return lookup_feature_of<0>(lookup, f, first, last, faults);
  }
}

}  // namespace avx2
}  // namespace torchrec_mpe

TORCHREC_MPE_END
#endif
