#include "quantize_and_pack.h"

#include "cpu_capability.h"
#include "simd_targets.h"

namespace torchrec_mpe {

PackRows pack_rows_kernel() {
#ifdef TORCHREC_MPE_X86
  switch (cpu_capability()) {
    case CpuCapability::Avx512:
      return avx512::pack_rows;
    case CpuCapability::Avx2:
      return avx2::pack_rows;
    case CpuCapability::Scalar:
      break;
  }
#endif
  return scalar::pack_rows;
}

}  // namespace torchrec_mpe
