// Ops that are about the library itself. Every op file adds its own to the namespace torchrec_mpe.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "cpu_capability.h"

// The release whose headers this was compiled with; library.py reads it from the file, before it loads the library.
extern "C" __attribute__((used, visibility("default"))) const char torchrec_mpe_torch_version[] =
    "torchrec_mpe was built for torch " TORCH_VERSION;

namespace torchrec_mpe {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};

std::string cpu_capability_name() {
  return kNames[static_cast<int>(cpu_capability())];
}

void set_cpu_capability_by_name(const std::string& name) {
  for (int k = 0; k <= static_cast<int>(best_cpu_capability()); ++k) {
    if (name == kNames[k]) {
      set_cpu_capability(static_cast<CpuCapability>(k));
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "CPU capability ", name, " is unknown or this machine lacks it; it has up to ",
                    kNames[static_cast<int>(best_cpu_capability())]);
}

}  // namespace
}  // namespace torchrec_mpe

TORCH_LIBRARY_FRAGMENT(torchrec_mpe, m) {
  m.def("cpu_capability() -> str", torchrec_mpe::cpu_capability_name);
  m.def("set_cpu_capability(str name) -> ()", torchrec_mpe::set_cpu_capability_by_name);
}
