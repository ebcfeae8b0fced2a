// x86-64 with AVX-512.
#include "simd_targets.h"
#ifdef TORCHREC_MPE_X86

#include <immintrin.h>

#include <vector>

#include "cache_slots.h"

TORCHREC_MPE_BEGIN_AVX512

namespace torchrec_mpe {
namespace avx512 {

inline uint32_t equal_ways(const int32_t* set, int32_t value) {
  const __m512i all = _mm512_set1_epi32(value);
  const uint32_t low = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(set), all);
  const uint32_t high = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(set + 16), all);
  return low | high << 16;
}

#include "cache_slots.inc.h"

}  // namespace avx512
}  // namespace torchrec_mpe

TORCHREC_MPE_END
#endif
