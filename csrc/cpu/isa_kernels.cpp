// Compiled once per instruction set (see setup.py): every kernel of the package in that instruction set. With
// products of bfloat16 those alone that have them; the others are the same without.
#if !defined(__AVX512BF16__)
#include "cross_modal_contrastive_kernel.h"
#include "dilated_causal_conv1d_kernel.h"
#include "vsc_compress_kernel.h"
#include "window_attention_kernel.h"
#endif
#include "gemm_kernel.h"
