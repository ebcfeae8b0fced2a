// x86-64 with AVX-512 VBMI: 64 elements of any width are cut out of a row by one byte permutation and one multishift.
#include "simd_targets.h"
#ifdef TORCHREC_MPE_X86

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "packed_embedding_bag.h"

TORCHREC_MPE_BEGIN_AVX512

namespace torchrec_mpe {
namespace avx512 {

// A code becomes a float without a conversion. Or-ed into the mantissa of 2^23 it is 2^23 + code, and one subtraction
// takes away 2^23 and the code's signed offset. Shifted to the mantissa's top under the exponent of 2^7 it is
// 128 + code * 2^(7 - bits), precise enough to be summed as it is; what is too much is taken away once for many rows.
constexpr uint32_t kMagic = 0x4b000000;   // 2^23 as float
constexpr uint32_t kBiased = 0x43000000;  // 2^7 as float
constexpr float kBias = 192.0f;           // 128 and the signed offset, 2^(bits - 1) * 2^(7 - bits)
constexpr float kByteBias = 128.0f;       // the signed offset of 8 bits

// Up to 64 elements: permute spreads 8 blocks of `bits` bytes over 8 lanes of 8 bytes, shift moves code j of a lane to
// its byte j, or to the upper of its 7 lower bits (biased). Up to 16: shift_16 moves the codes of elements 2 i and
// 2 i + 1 to the mantissas of lane i's two words, if lanes 0 to 3 hold the first block and lanes 4 to 7 the second.
struct WidthConstants {
  alignas(64) uint8_t permute[64];
  alignas(64) uint8_t shift_16[64];
  alignas(64) uint8_t shift[8];
  uint8_t shift_biased[8];
  uint32_t mask;         // of a code, in every byte
  uint32_t mask_biased;  // the same where shift_biased puts it
  uint32_t mask_16;
  float offset;          // 2^23 + 2^(bits - 1)
};

// permute_16[bits * 16 + position] fills the lanes as shift_16 wants them, from 16 bytes in which a row of one or two
// blocks starts at `position`.
struct Constants {
  WidthConstants width[kMaxBits + 1];
  alignas(64) uint8_t permute_16[(kMaxBits + 1) * 16][64];
};

inline const Constants& constants() {
  static const Constants all = [] {
    Constants filled{};
    for (int bits = 0; bits <= kMaxBits; ++bits) {
      WidthConstants& width = filled.width[bits];
      for (int byte = 0; byte < 64; ++byte) {
        width.permute[byte] = static_cast<uint8_t>(byte / 8 * bits + byte % 8);
        // Bit 23 - bits of a word is its code's lowest; shifts are taken modulo 64.
        width.shift_16[byte] = static_cast<uint8_t>((byte / 4 % 8 * bits + byte % 4 * 8 - (23 - bits)) & 63);
        for (int position = 0; position < 16; ++position) {
          filled.permute_16[bits * 16 + position][byte] = static_cast<uint8_t>(position + byte / 32 * bits + byte % 8);
        }
      }
      for (int byte = 0; byte < 8; ++byte) {
        width.shift[byte] = static_cast<uint8_t>(byte * bits);
        width.shift_biased[byte] = static_cast<uint8_t>((byte * bits - (7 - bits)) & 63);
      }
      const uint32_t code = (1u << bits) - 1;
      width.mask = code * 0x01010101u;
      width.mask_biased = bits < 8 ? (code << (7 - bits)) * 0x01010101u : 0;
      width.mask_16 = code << (23 - bits);
      width.offset = 8388608.0f + static_cast<float>((1 << bits) >> 1);
    }
    return filled;
  }();
  return all;
}

// What a loop over rows keeps in registers.
struct LoopConstants {
  __m512i magic;
  __m512i spread[4];  // byte 4 j, or with a biased exponent byte 4 j + 2, of permutation k is byte 16 k + j

  // `vectors` of the permutations are used. As plain constants the compiler would load them again for every row, and
  // loads are what limits the loop.
  __attribute__((always_inline)) LoopConstants(int vectors, bool biased)
      : magic(kept(_mm512_set1_epi32(biased ? kBiased : kMagic))) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      if (k < vectors) {
        alignas(64) static constexpr uint32_t kSixteen[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const __m512i element = _mm512_add_epi32(_mm512_load_si512(kSixteen), _mm512_set1_epi32(16 * k));
        spread[k] = kept(biased ? _mm512_slli_epi32(element, 16) : element);
      }
    }
  }

 private:
  __attribute__((always_inline)) static __m512i kept(__m512i vector) {
    asm("" : "+v"(vector));
    return vector;
  }
};

// The codes of up to 64 elements whose bytes lie in one or two lines of 64 bytes, a byte each; `within` is the first
// one's place in its line, in every byte. Only those lines are read: a line more could be a cache miss more.
template <bool kTwoLines, bool kIsBiased>
__attribute__((always_inline)) inline __m512i codes_of_64(const uint8_t* first_line, const uint8_t* last_line,
                                                          __m512i within, const WidthConstants& width) {
  const __m512i index = _mm512_add_epi8(_mm512_load_si512(width.permute), within);
  __m512i lanes = _mm512_loadu_si512(first_line);
  lanes = kTwoLines ? _mm512_permutex2var_epi8(lanes, index, _mm512_loadu_si512(last_line))
                    : _mm512_permutexvar_epi8(index, lanes);
  int64_t shift;
  std::memcpy(&shift, kIsBiased ? width.shift_biased : width.shift, 8);
  const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(shift), lanes);
  return _mm512_and_si512(codes, _mm512_set1_epi32(static_cast<int>(kIsBiased ? width.mask_biased : width.mask)));
}

// Elements 16 k to 16 k + 15 of 64 codes: signed, or with the bias.
template <int K, bool kIsBiased>
__attribute__((always_inline)) inline __m512 floats_of(__m512i codes, const WidthConstants& width,
                                                       const LoopConstants& registers) {
  if (kIsBiased) {
    return _mm512_castsi512_ps(
        _mm512_mask_permutexvar_epi8(registers.magic, 0x4444444444444444ull, registers.spread[K], codes));
  }
  const __m512i words =
      _mm512_mask_permutexvar_epi8(registers.magic, 0x1111111111111111ull, registers.spread[K], codes);
  return _mm512_sub_ps(_mm512_castsi512_ps(words), _mm512_set1_ps(width.offset));
}

// Up to 16 codes with the bias, from 16 bytes.
__attribute__((always_inline)) inline __m512 floats_of_16(const uint8_t* bytes, const uint8_t* permute,
                                                          const WidthConstants& width, const LoopConstants& registers) {
  const __m512i row = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(permute), row);
  words = _mm512_multishift_epi64_epi8(_mm512_load_si512(width.shift_16), words);
  // (words & mask) | magic
  words = _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(static_cast<int>(width.mask_16)), registers.magic, 0xea);
  return _mm512_castsi512_ps(words);
}

#include "packed_embedding_bag_ring.inc.h"

inline uint64_t low_bits(uint64_t word, int count) {
  return _bzhi_u64(word, static_cast<unsigned>(std::min(std::max(count, 0), 64)));
}

#include "directory_lines.inc.h"
#include "packed_embedding_bag_coding.inc.h"
#include "packed_embedding_bag_avx512_decoder.inc.h"

// One bag's sum. G > 0: ceil(D / 16) = G vectors in registers; G = 0: any number, in memory.
template <int G>
class Accumulator {
 public:
  static constexpr int kLines = G == 0 || G > 8 ? 0 : G > 4 ? 3 : 2;  // that a row spans; 0: any number
  static constexpr bool kHasVariants = true;

  template <Rows kRows>
  struct Registers : LoopConstants {
    __attribute__((always_inline)) Registers()
        : LoopConstants(G == 1 || kRows == Rows::Bytes ? 0 : G == 0 ? 4 : G, kRows != Rows::Any) {}
  };

  // A bag's vectors. A local of the loop over its rows, so that they stay in registers.
  struct Sum {
    __m512 vectors[G == 0 ? 1 : G];
  };

  Accumulator(int dim, int blocks) : dim_(dim), blocks_(blocks), memory_(G == 0 ? (blocks + 7) / 8 * 64 : 0) {}

  __attribute__((always_inline)) void clear(Sum& sum) {
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k) {
      sum.vectors[k] = _mm512_setzero_ps();
    }
    if (G == 0) {
      std::fill(memory_.begin(), memory_.end(), 0.0f);
    }
  }

  // Adds scale * code for every element of a row; other than with Rows::Any the bias with it.
  template <Rows kRows>
  __attribute__((always_inline)) void add(Sum& sum, const Registers<kRows>& registers, const uint8_t* weights,
                                          const Ring& ring, int slot) {
    const int bits = ring.bits[slot];
    const WidthConstants& width = constants_.width[bits];
    const __m512 scales = _mm512_set1_ps(ring.scale[slot]);
    const uint8_t* start = weights + ring.start[slot];
    constexpr bool kTwoLines = kRows != Rows::NarrowInLine;
    constexpr bool kIsBiased = kRows != Rows::Any;
    if constexpr (G == 1) {
      const uint8_t* permute = constants_.permute_16[ring.position[slot]];
      sum.vectors[0] = _mm512_fmadd_ps(floats_of_16(start, permute, width, registers), scales, sum.vectors[0]);
    } else if constexpr (kRows == Rows::Bytes) {
      const uint8_t* row = start + (ring.position[slot] & 63);
      for_each(sum, [&](int k, __m512 before) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 16 * k));
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)), scales, before);
      });
    } else if constexpr (G > 0 && G <= 4) {
      const uint8_t* last_line = weights + (ring.last[slot] & -kLineBytes);
      const __m512i within = _mm512_set1_epi32(ring.position[slot]);
      add_64<0, kIsBiased>(sum, registers, codes_of_64<kTwoLines, kIsBiased>(start, last_line, within, width), scales,
                           width);
    } else {
      add_long<kTwoLines, kIsBiased>(sum, registers, start, ring.position[slot] & 63, bits, scales, width);
    }
  }

  // Takes away the bias of rows whose scales sum up to `scales`.
  template <Rows kRows>
  __attribute__((always_inline)) void unbias(Sum& sum, float scales) {
    const __m512 bias = _mm512_set1_ps(scales * (G != 1 && kRows == Rows::Bytes ? kByteBias : kBias));
    for_each(sum, [&](int, __m512 before) { return _mm512_sub_ps(before, bias); });
  }

  // Adds [components] @ basis.
  __attribute__((always_inline)) void add_components(Sum& sum, const float* components, const PackedTable& table) {
    const auto add = [&](int c, int k, __m512 before) __attribute__((always_inline)) {
      const float* basis = table.basis + static_cast<int64_t>(c) * dim_ + 16 * k;
      // All elements are there but in the last vector.
      const __m512 values = G > 0 && k + 1 < kVectors ? _mm512_loadu_ps(basis)
                                                      : _mm512_maskz_loadu_ps(elements_of(k), basis);
      return _mm512_fmadd_ps(_mm512_set1_ps(components[c]), values, before);
    };
    int c = 0;
    if constexpr (G == 1) {
      // Four sums, as each waits for its last addition.
      __m512 others[3] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
      for (; c + 4 <= table.components; c += 4) {
        sum.vectors[0] = add(c, 0, sum.vectors[0]);
        others[0] = add(c + 1, 0, others[0]);
        others[1] = add(c + 2, 0, others[1]);
        others[2] = add(c + 3, 0, others[2]);
      }
      sum.vectors[0] = _mm512_add_ps(_mm512_add_ps(sum.vectors[0], others[0]), _mm512_add_ps(others[1], others[2]));
    }
    for (; c < table.components; ++c) {
      for_each(sum, [&](int k, __m512 before) __attribute__((always_inline)) { return add(c, k, before); });
    }
  }

  __attribute__((always_inline)) void finish(const Sum& sum, const PackedTable& table, float kept, float zero,
                                             float factor, void* output, OutputType type, int64_t position) {
    if constexpr (G == 0) {
      for (int k = 0; k < (dim_ + 15) / 16; ++k) {
        store_16(table, k, _mm512_loadu_ps(memory_.data() + 16 * k), kept, zero, factor, output, type, position);
      }
    } else {
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; ++k) {
        if (k + 1 < kVectors && type == OutputType::Float) {  // all 16 elements are there
          store_full_16(table, k, sum.vectors[k], kept, zero, factor, static_cast<float*>(output) + position + 16 * k);
        } else {
          store_16(table, k, sum.vectors[k], kept, zero, factor, output, type, position);
        }
      }
    }
  }

 private:
  static constexpr int kVectors = G > 0 ? G : 1;

  // The elements of vector k that a row has.
  __attribute__((always_inline)) __mmask16 elements_of(int k) const {
    const int left = dim_ - 16 * k;
    return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
  }

  // Every vector k of a sum becomes function(k, vector).
  template <class Function>
  __attribute__((always_inline)) void for_each(Sum& sum, const Function& function) {
    if constexpr (G == 0) {
      for (int k = 0; k < (dim_ + 15) / 16; ++k) {
        float* vector = memory_.data() + 16 * k;
        _mm512_storeu_ps(vector, function(k, _mm512_loadu_ps(vector)));
      }
    } else {
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; ++k) {
        sum.vectors[k] = function(k, sum.vectors[k]);
      }
    }
  }

  __attribute__((always_inline)) static void store_full_16(const PackedTable& table, int k, __m512 sum, float kept,
                                                           float zero, float factor, float* output) {
    sum = _mm512_fmadd_ps(_mm512_set1_ps(kept), _mm512_loadu_ps(table.beta + 16 * k), sum);
    if (table.zero_row != nullptr) {
      sum = _mm512_fmadd_ps(_mm512_set1_ps(zero), _mm512_loadu_ps(table.zero_row + 16 * k), sum);
    }
    _mm512_storeu_ps(output, _mm512_mul_ps(sum, _mm512_set1_ps(factor)));
  }

  __attribute__((always_inline)) void store_16(const PackedTable& table, int k, __m512 sum, float kept, float zero,
                                               float factor, void* output, OutputType type, int64_t position) const {
    const __mmask16 mask = elements_of(k);
    sum = _mm512_fmadd_ps(_mm512_set1_ps(kept), _mm512_maskz_loadu_ps(mask, table.beta + 16 * k), sum);
    if (table.zero_row != nullptr) {
      sum = _mm512_fmadd_ps(_mm512_set1_ps(zero), _mm512_maskz_loadu_ps(mask, table.zero_row + 16 * k), sum);
    }
    sum = _mm512_mul_ps(sum, _mm512_set1_ps(factor));
    const int64_t first = position + 16 * k;
    if (type == OutputType::Float) {
      _mm512_mask_storeu_ps(static_cast<float*>(output) + first, mask, sum);
    } else {
      store_16_narrow(sum, mask, output, type, first);
    }
  }

  __attribute__((noinline)) static void store_16_narrow(__m512 sum, __mmask16 mask, void* output, OutputType type,
                                                        int64_t first) {
    __m256i values;
    if (type == OutputType::Half) {
      values = _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m512i word = _mm512_castps_si512(sum);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __mmask16 nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
      values = _mm512_cvtepi32_epi16(
          _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(output) + first, mask, values);
  }

  // Vectors [K, K + 4) of the bag's sum, as far as there are any.
  template <int K, bool kIsBiased>
  __attribute__((always_inline)) void add_64(Sum& sum, const LoopConstants& registers, __m512i codes, __m512 scales,
                                             const WidthConstants& width) {
    const auto add_16 = [&](__m512 values, __m512& vector) { vector = _mm512_fmadd_ps(values, scales, vector); };
    add_16(floats_of<0, kIsBiased>(codes, width, registers), sum.vectors[K]);
    if constexpr (K + 1 < kVectors) {
      add_16(floats_of<1, kIsBiased>(codes, width, registers), sum.vectors[K + 1]);
    }
    if constexpr (K + 2 < kVectors) {
      add_16(floats_of<2, kIsBiased>(codes, width, registers), sum.vectors[K + 2]);
    }
    if constexpr (K + 3 < kVectors) {
      add_16(floats_of<3, kIsBiased>(codes, width, registers), sum.vectors[K + 3]);
    }
  }

  // The codes of 64 elements from block `first` on, of a row that starts `within` a line at `line`.
  template <bool kTwoLines, bool kIsBiased>
  __attribute__((always_inline)) __m512i codes_from(const uint8_t* line, int within, int first, int bits,
                                                    const WidthConstants& width) const {
    const int start = within + first * bits;
    // A 0-bit row has no last byte.
    const int last = start + std::min(8, blocks_ - first) * bits - (bits != 0);
    return codes_of_64<kTwoLines, kIsBiased>(line + (start & -64), line + (last & -64),
                                             _mm512_set1_epi8(static_cast<char>(start & 63)), width);
  }

  template <bool kTwoLines, bool kIsBiased>
  __attribute__((always_inline)) void add_long(Sum& sum, const LoopConstants& registers, const uint8_t* line,
                                               int within, int bits, __m512 scales, const WidthConstants& width) {
    const auto codes = [&](int first) {
      return codes_from<kTwoLines, kIsBiased>(line, within, first, bits, width);
    };
    if constexpr (G == 0) {
      for (int first = 0; first < blocks_; first += 8) {
        const __m512i part = codes(first);
        const auto add_16 = [&](__m512 values, float* sums) {
          _mm512_storeu_ps(sums, _mm512_fmadd_ps(values, scales, _mm512_loadu_ps(sums)));
        };
        float* sums = memory_.data() + 8 * first;
        add_16(floats_of<0, kIsBiased>(part, width, registers), sums);
        add_16(floats_of<1, kIsBiased>(part, width, registers), sums + 16);
        add_16(floats_of<2, kIsBiased>(part, width, registers), sums + 32);
        add_16(floats_of<3, kIsBiased>(part, width, registers), sums + 48);
      }
    } else {
      add_64<0, kIsBiased>(sum, registers, codes(0), scales, width);
      if constexpr (kVectors > 4) {
        add_64<4, kIsBiased>(sum, registers, codes(8), scales, width);
      }
      if constexpr (kVectors > 8) {
        add_64<8, kIsBiased>(sum, registers, codes(16), scales, width);
      }
      if constexpr (kVectors > 12) {
        add_64<12, kIsBiased>(sum, registers, codes(24), scales, width);
      }
    }
  }

  int dim_;
  int blocks_;
  const Constants& constants_ = constants();
  std::vector<float> memory_;
};

#include "packed_embedding_bag_steps.inc.h"
#include "packed_embedding_bag_avx512_steps.inc.h"
#include "packed_embedding_bag_driver.inc.h"

void lookup_feature_by_dim(const Lookup& lookup, int64_t f, int64_t first, int64_t last, Faults& faults) {
  switch ((lookup.features[f].table->embedding_dim + 15) / 16) {
    case 1: return lookup_feature_of<1>(lookup, f, first, last, faults);
    case 2: return lookup_feature_of<2>(lookup, f, first, last, faults);
    case 3: return lookup_feature_of<3>(lookup, f, first, last, faults);
    case 4: return lookup_feature_of<4>(lookup, f, first, last, faults);
    case 6: return lookup_feature_of<6>(lookup, f, first, last, faults);
    case 8: return lookup_feature_of<8>(lookup, f, first, last, faults);
    case 16: return lookup_feature_of<16>(lookup, f, first, last, faults);
    default: return lookup_feature_of<0>(lookup, f, first, last, faults);
  }
}

}  // namespace avx512
}  // namespace torchrec_mpe

TORCHREC_MPE_END
#endif
