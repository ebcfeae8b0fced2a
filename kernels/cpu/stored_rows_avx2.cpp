// x86-64 with AVX2.
#include "simd_targets.h"
#ifdef TORCHREC_MPE_X86

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "stored_rows.h"
#include "stored_rows_lanes.h"

TORCHREC_MPE_BEGIN_AVX2

namespace torchrec_mpe {
namespace avx2 {

inline void product(const Words& a, uint32_t b, Words& result) {
  __m256i half[2];
  __builtin_memcpy(half, &a, sizeof(half));
  const __m256i all = _mm256_set1_epi64x(b);
  half[0] = _mm256_mul_epu32(half[0], all);
  half[1] = _mm256_mul_epu32(half[1], all);
  __builtin_memcpy(&result, half, sizeof(half));
}

#include "stored_rows.inc.h"

}  // namespace avx2
}  // namespace torchrec_mpe

TORCHREC_MPE_END
#endif
