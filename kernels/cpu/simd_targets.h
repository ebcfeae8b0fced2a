// Compiling parts of one generic binary for an instruction set. Include every other header before BEGIN, so that no
// inline function of theirs is compiled for it.
#pragma once

#include "cpu_capability.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TORCHREC_MPE_X86 1
#if defined(__clang__)
#define TORCHREC_MPE_BEGIN_AVX512                                                                               \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,bmi,bmi2,popcnt\"))), apply_to = function)")
#define TORCHREC_MPE_BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,bmi,bmi2\"))), apply_to = function)")
#define TORCHREC_MPE_END _Pragma("clang attribute pop")
#else
#define TORCHREC_MPE_BEGIN_AVX512 \
  _Pragma("GCC push_options")     \
  _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,bmi,bmi2,popcnt,prefer-vector-width=512\")")
#define TORCHREC_MPE_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,bmi,bmi2\")")
#define TORCHREC_MPE_END _Pragma("GCC pop_options")
#endif
#endif

// Declares what every instruction set has, in a namespace each.
#define TORCHREC_MPE_OF_EACH_CPU(...) \
  namespace scalar {                  \
  __VA_ARGS__                         \
  }                                   \
  namespace avx2 {                    \
  __VA_ARGS__                         \
  }                                   \
  namespace avx512 {                  \
  __VA_ARGS__                         \
  }

// The function of cpu_capability()'s instruction set.
#ifdef TORCHREC_MPE_X86
#define TORCHREC_MPE_OF_THIS_CPU(function)                                                          \
  (::torchrec_mpe::cpu_capability() == ::torchrec_mpe::CpuCapability::Avx512 ? &avx512::function    \
   : ::torchrec_mpe::cpu_capability() == ::torchrec_mpe::CpuCapability::Avx2 ? &avx2::function      \
                                                                             : &scalar::function)
#else
#define TORCHREC_MPE_OF_THIS_CPU(function) (&scalar::function)
#endif
