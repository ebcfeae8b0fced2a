// Any machine.
#include <algorithm>
#include <cstring>
#include <vector>

#include "stored_rows.h"
#include "stored_rows_lanes.h"

namespace torchrec_mpe {
namespace scalar {

inline void product(const Words& a, uint32_t b, Words& result) {
  for (int k = 0; k < 8; ++k) {
    result[k] = (a[k] & 0xffffffffu) * b;
  }
}

#include "stored_rows.inc.h"

}  // namespace scalar
}  // namespace torchrec_mpe
