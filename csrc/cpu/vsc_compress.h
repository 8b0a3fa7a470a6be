// What the registration of vsc_compress and its kernels share: arguments, and one table of kernels per ISA.
#pragma once

#include <cstdint>

#include "storage.h"

namespace deepmsi {

// Rows of frame b are [offset[b], offset[b + 1]) of x; `Wide` is float, or double for double storage.
struct VscForward {
  const void* x;          // T [R, C]
  const int64_t* offset;  // [B + 1]
  const void* guide;      // Wide [B, C]
  double guide_weight;    // λ
  int64_t channels;
  double temperature;
  bool standardize;
  double threshold;
  int64_t keep;      // 0: none
  int64_t capacity;  // 0: none
  int64_t min_keep;
  double fuse_threshold;
  double fuse_alpha;

  void* relevance;      // Wide [R]
  int32_t* assignment;  // [R]; between the phases 0 for a kept row, -1 for another
  void* score;          // Wide [R]
  void* norm;           // Wide [R]
  void* closeness;      // Wide [R]
  void* mean;           // Wide [B, C]
  int64_t* count;       // [B], rows that each frame keeps

  // Known after the first phase.
  const int64_t* offset_out;  // [B + 1]
  void* tokens;               // T [R', C]
  int64_t* index;             // [R']
  void* gate;                 // T [R']
};

struct VscBackward {
  const void* grad_tokens;  // T [R', C], or null
  const void* grad_gate;    // T [R'], or null
  const void* x;            // T [R, C]
  const int64_t* offset;
  const int64_t* offset_out;
  const int64_t* index;       // [R']
  const int32_t* assignment;  // [R]
  const void* score;          // Wide [R]
  const void* norm;           // Wide [R]
  const void* closeness;      // Wide [R]
  const void* mean;           // Wide [B, C]
  const void* guide;          // Wide [B, C]
  double guide_weight;
  int64_t channels;
  double fuse_alpha;

  void* grad_x;         // T [R, C]
  void* grad_guide;     // Wide [B, C]
  double* grad_weight;  // [B], each frame's share of ∂L/∂λ
};

struct VscKernels {
  // Scores, relevance and the partition of frames [begin, end).
  void (*select)(const VscForward&, int64_t begin, int64_t end, char* scratch);
  // Compaction, nearest relevant tokens and fusion.
  void (*merge)(const VscForward&, int64_t begin, int64_t end, char* scratch);
  void (*backward)(const VscBackward&, int64_t begin, int64_t end, char* scratch);
  // Bytes of scratch that any of them needs for frames of at most `longest` rows.
  int64_t (*scratch_bytes)(int64_t longest, int64_t channels);
};

namespace baseline {
VscKernels vsc_kernels(DType dtype);
}
namespace avx2 {
VscKernels vsc_kernels(DType dtype);
}
namespace avx512 {
VscKernels vsc_kernels(DType dtype);
}

}  // namespace deepmsi
