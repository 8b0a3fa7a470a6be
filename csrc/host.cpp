// The host module: what this build is and what this CPU can run. It touches no tensor and links no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::vector<std::pair<std::string, std::string>> info() {
  using namespace deepmsi;
  return {
      {"built with", compiler() + ", torch " DEEPMSI_BUILD_TORCH ", CUDA " DEEPMSI_BUILD_CUDA},
      {"CPU capability", isa_name(cpu_isa())},
      {"instruction set in use", isa_name(active_isa())},
  };
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What this build of deepmsi is, and which instruction set its CPU kernels run.";
  m.def("info", &info, "Pairs of a name and its value, for deepmsi.explain().");
  m.def(
      "cpu_capability", [] { return std::string(deepmsi::isa_name(deepmsi::cpu_isa())); },
      "The highest of baseline, avx2, avx512, avx512_bf16 that this CPU runs.");
  m.def(
      "instruction_set", [] { return std::string(deepmsi::isa_name(deepmsi::active_isa())); },
      "The one that runs: the CPU's own, or a lower one named by the environment variable DEEPMSI_ISA.");
}
