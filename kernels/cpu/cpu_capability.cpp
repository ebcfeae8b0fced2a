#include "cpu_capability.h"

#include <atomic>

namespace torchrec_mpe {

CpuCapability best_cpu_capability() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const CpuCapability best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi")) {
      return CpuCapability::Avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
      return CpuCapability::Avx2;
    }
    return CpuCapability::Scalar;
  }();
  return best;
#else
  return CpuCapability::Scalar;
#endif
}

namespace {
std::atomic<CpuCapability>& current() {
  static std::atomic<CpuCapability> capability{best_cpu_capability()};
  return capability;
}
}  // namespace

CpuCapability cpu_capability() {
  return current().load(std::memory_order_relaxed);
}

void set_cpu_capability(CpuCapability capability) {
  current().store(capability, std::memory_order_relaxed);
}

}  // namespace torchrec_mpe
