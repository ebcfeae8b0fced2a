// The implementations that the machine can run.
#pragma once

#include <vector>

#include "cpu_capability.h"
#include "packed_embedding_bag.h"
#include "quantize_and_pack.h"
#include "simd_targets.h"

namespace torchrec_mpe {

struct InstructionSet {
  const char* name;
  LookupBags lookup_bags;
  PackRows pack_rows;
};

inline std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets{{"scalar", scalar::lookup_bags, scalar::pack_rows}};
#ifdef TORCHREC_MPE_X86
  if (best_cpu_capability() >= CpuCapability::Avx2) {
    sets.push_back({"avx2", avx2::lookup_bags, avx2::pack_rows});
  }
  if (best_cpu_capability() >= CpuCapability::Avx512) {
    sets.push_back({"avx512", avx512::lookup_bags, avx512::pack_rows});
  }
#endif
  return sets;
}

}  // namespace torchrec_mpe
