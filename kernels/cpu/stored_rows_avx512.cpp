// x86-64 with AVX-512.
#include "simd_targets.h"
#ifdef TORCHREC_MPE_X86

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "stored_rows.h"
#include "stored_rows_lanes.h"

TORCHREC_MPE_BEGIN_AVX512

namespace torchrec_mpe {
namespace avx512 {

inline void product(const Words& a, uint32_t b, Words& result) {
  result = reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
}

#include "stored_rows.inc.h"

}  // namespace avx512
}  // namespace torchrec_mpe

TORCHREC_MPE_END
#endif
