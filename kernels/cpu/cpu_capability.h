// Which instruction set the kernels of this process use.
#pragma once

namespace torchrec_mpe {

enum class CpuCapability { Scalar = 0, Avx2 = 1, Avx512 = 2 };

// The best that this machine has, or what set_cpu_capability chose. Avx512 means F, BW, DQ, VL and VBMI; Avx2 means
// AVX2, FMA and BMI2.
CpuCapability cpu_capability();

CpuCapability best_cpu_capability();

// For tests and measurements; `capability` must not be above best_cpu_capability().
void set_cpu_capability(CpuCapability capability);

}  // namespace torchrec_mpe
