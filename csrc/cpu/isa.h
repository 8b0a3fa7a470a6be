// Instruction sets: which ones a build holds, which one runs. Read by the CPU kernels and by the host module.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define DEEPMSI_X86 1
#else
#define DEEPMSI_X86 0
#endif

namespace deepmsi {

// The last one multiplies bfloat16, too.
enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

// The highest instruction set that this CPU (and its operating system) runs and the kernels are built for.
inline Isa cpu_isa() {
#if DEEPMSI_X86
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// The instruction set that runs: the CPU's own, or a lower one that DEEPMSI_ISA names. Read once.
inline Isa active_isa() {
  static const Isa isa = [] {
    const Isa best = cpu_isa();
    const char* asked = std::getenv("DEEPMSI_ISA");
    if (asked == nullptr || *asked == '\0') return best;
    for (const Isa lower : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
      if (std::strcmp(asked, isa_name(lower)) == 0 && lower <= best) return lower;
    }
    throw std::runtime_error(std::string("DEEPMSI_ISA must name an instruction set up to ") + isa_name(best) +
                             " (baseline, avx2, avx512, avx512_bf16), not " + asked);
  }();
  return isa;
}

// A function by its name, of the instruction set that runs; avx512_bf16 has those of the blocks alone.
#if DEEPMSI_X86
#define DEEPMSI_ACTIVE(function)                   \
  (active_isa() >= Isa::kAvx512 ? avx512::function \
   : active_isa() == Isa::kAvx2 ? avx2::function   \
                                : baseline::function)
#else
#define DEEPMSI_ACTIVE(function) baseline::function
#endif

}  // namespace deepmsi
