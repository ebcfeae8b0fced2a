#include "quantization.h"

namespace torchrec_mpe {
namespace quantization {
namespace scalar {
#include "quantization.inc.h"
}  // namespace scalar
}  // namespace quantization
}  // namespace torchrec_mpe
