// x86-64 with AVX2 and BMI2.
#include "simd_targets.h"
#ifdef TORCHREC_MPE_X86

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "quantize_and_pack.h"

TORCHREC_MPE_BEGIN_AVX2

namespace torchrec_mpe {
namespace avx2 {

inline uint64_t pack_block(uint64_t codes, int bits) {
  return _pext_u64(codes, 0x0101010101010101ull * ((1u << bits) - 1));
}

#include "quantize_and_pack.inc.h"

}  // namespace avx2
}  // namespace torchrec_mpe

TORCHREC_MPE_END
#endif
