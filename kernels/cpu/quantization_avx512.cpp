#include "quantization.h"

#ifdef TORCHREC_MPE_X86
TORCHREC_MPE_BEGIN_AVX512
namespace torchrec_mpe {
namespace quantization {
namespace avx512 {
#include "quantization.inc.h"
}  // namespace avx512
}  // namespace quantization
}  // namespace torchrec_mpe
TORCHREC_MPE_END
#endif
