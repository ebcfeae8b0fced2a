#include "stored_rows.h"

#include "cpu_capability.h"
#include "simd_targets.h"

namespace torchrec_mpe {

WriteRows write_rows_kernel() {
#ifdef TORCHREC_MPE_X86
  switch (cpu_capability()) {
    case CpuCapability::Avx512:
      return avx512::write_stored_rows;
    case CpuCapability::Avx2:
      return avx2::write_stored_rows;
    case CpuCapability::Scalar:
      break;
  }
#endif
  return scalar::write_stored_rows;
}

ReadRows read_rows_kernel() {
#ifdef TORCHREC_MPE_X86
  switch (cpu_capability()) {
    case CpuCapability::Avx512:
      return avx512::read_stored_rows;
    case CpuCapability::Avx2:
      return avx2::read_stored_rows;
    case CpuCapability::Scalar:
      break;
  }
#endif
  return scalar::read_stored_rows;
}

}  // namespace torchrec_mpe
