// Any machine. It defines what the vector paths compute.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "quantize_and_pack.h"

namespace torchrec_mpe {
namespace scalar {

inline uint64_t pack_block(uint64_t codes, int bits) {
  uint64_t word = 0;
  for (int j = 0; j < 8; ++j) {
    word |= (codes >> (8 * j) & 0xff) << (j * bits);
  }
  return word;
}

#include "quantize_and_pack.inc.h"

}  // namespace scalar
}  // namespace torchrec_mpe
