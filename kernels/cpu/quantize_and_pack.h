// Float rows to packed rows. torchrec_mpe/ops/quantize_and_pack.py says what is computed.
#pragma once

#include <cstdint>

#include "simd_targets.h"

namespace torchrec_mpe {

struct RowsToPack {
  const float* rows;  // [n, dim]
  int64_t dim;
  int bits;           // 1 to 8
  float alpha;
  const float* beta;  // [dim]
  uint8_t* packed;    // [n, ceil(dim / 8) * bits]
};

// Packs rows [first, last).
using PackRows = void (*)(const RowsToPack& rows, int64_t first, int64_t last);

TORCHREC_MPE_OF_EACH_CPU(void pack_rows(const RowsToPack& rows, int64_t first, int64_t last);)

}  // namespace torchrec_mpe
