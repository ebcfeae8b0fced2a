// Any machine.
#include <vector>

#include "cache_slots.h"

namespace torchrec_mpe {
namespace scalar {

inline uint32_t equal_ways(const int32_t* set, int32_t value) {
  uint32_t ways = 0;
  for (int64_t w = 0; w < kWays; ++w) {
    ways |= static_cast<uint32_t>(set[w] == value) << w;
  }
  return ways;
}

#include "cache_slots.inc.h"

}  // namespace scalar
}  // namespace torchrec_mpe
