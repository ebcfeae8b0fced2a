// Vectors of the kernels of stored_rows.h, the same on every instruction set.
#pragma once

#include <cstdint>

namespace torchrec_mpe {

typedef uint64_t Words __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t Pairs __attribute__((vector_size(16)));
typedef uint8_t Codes16 __attribute__((vector_size(16)));
typedef uint8_t Codes8 __attribute__((vector_size(8)));

}  // namespace torchrec_mpe
