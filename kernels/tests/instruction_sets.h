// The implementations that the machine can run.
#pragma once

#include <vector>

#include "cache_slots.h"
#include "cpu_capability.h"
#include "packed_embedding_bag.h"
#include "quantize_and_pack.h"
#include "simd_targets.h"
#include "stored_rows.h"

namespace torchrec_mpe {

struct InstructionSet {
  const char* name;
  LookupBags lookup_bags;
  PackRows pack_rows;
  WriteRows write_rows;
  ReadRows read_rows;
  AssignSlots<int64_t> assign_slots;
};

#define TORCHREC_MPE_INSTRUCTION_SET(name)                                                             \
  InstructionSet{#name, name::lookup_bags, name::pack_rows, name::write_stored_rows, name::read_stored_rows, \
                 name::assign_slots<int64_t>}

inline std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets{TORCHREC_MPE_INSTRUCTION_SET(scalar)};
#ifdef TORCHREC_MPE_X86
  if (best_cpu_capability() >= CpuCapability::Avx2) {
    sets.push_back(TORCHREC_MPE_INSTRUCTION_SET(avx2));
  }
  if (best_cpu_capability() >= CpuCapability::Avx512) {
    sets.push_back(TORCHREC_MPE_INSTRUCTION_SET(avx512));
  }
#endif
  return sets;
}
#undef TORCHREC_MPE_INSTRUCTION_SET

}  // namespace torchrec_mpe
