#include "packed_embedding_bag.h"

#include "cpu_capability.h"
#include "simd_targets.h"

namespace torchrec_mpe {

LookupBags lookup_bags_kernel() {
#ifdef TORCHREC_MPE_X86
  switch (cpu_capability()) {
    case CpuCapability::Avx512:
      return avx512::lookup_bags;
    case CpuCapability::Avx2:
      return avx2::lookup_bags;
    case CpuCapability::Scalar:
      break;
  }
#endif
  return scalar::lookup_bags;
}

}  // namespace torchrec_mpe
