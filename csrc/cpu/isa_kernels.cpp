// Compiled once per instruction set (see setup.py): every kernel of the package in that instruction set.
#include "cross_modal_contrastive_kernel.h"
#include "dilated_causal_conv1d_kernel.h"
#include "gemm_kernel.h"
#include "vsc_compress_kernel.h"
#include "window_attention_kernel.h"
