// x86-64 with AVX2.
#include "simd_targets.h"
#ifdef TORCHREC_MPE_X86

#include <immintrin.h>

#include <vector>

#include "cache_slots.h"

TORCHREC_MPE_BEGIN_AVX2

namespace torchrec_mpe {
namespace avx2 {

inline uint32_t equal_ways(const int32_t* set, int32_t value) {
  const __m256i all = _mm256_set1_epi32(value);
  uint32_t ways = 0;
  for (int k = 0; k < 4; ++k) {
    const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(set + 8 * k));
    const __m256 equal = _mm256_castsi256_ps(_mm256_cmpeq_epi32(eight, all));
    ways |= static_cast<uint32_t>(_mm256_movemask_ps(equal)) << (8 * k);
  }
  return ways;
}

#include "cache_slots.inc.h"

}  // namespace avx2
}  // namespace torchrec_mpe

TORCHREC_MPE_END
#endif
