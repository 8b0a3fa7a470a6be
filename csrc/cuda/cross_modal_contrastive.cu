// cross_modal_contrastive under the CUDA key: scores in tiles of 64 x 64 that are never stored, so that
// memory stays O(B·D). One pass over the columns finds log Z of each row and the largest of its negatives, a
// second the loss and what each row pushes and pulls with; the gradients of a and of b make every tile once
// more. Sums run in a fixed order without atomics.
#include "tensors.cuh"

namespace deepmsi {
namespace {

constexpr const char* kContrastive = "cross_modal_contrastive";
constexpr int kTile = 64;       // rows and columns of a tile
constexpr int kDepth = 16;      // channels of a product at a time
constexpr int kChannels = 128;  // channels of the gradient that a block makes
constexpr int kSide = 16;       // threads along a side of the tile
constexpr int kEach = kTile / kSide;
constexpr int kThreads = kSide * kSide;
constexpr float kUnitNormFloor = 1e-12f;

// What every kernel reads of a call. Row i of a is row row_offset + i of the joined batch.
struct Contrastive {
  const float* unit_a;      // [B, D]
  const float* unit_b;      // [P, J, D]
  const float* inverse_a;   // [B]: 1 / norm
  const float* inverse_b;   // [P, J]
  const int64_t* labels;    // [B]
  const int64_t* labels_b;  // [J]
  const bool* valid;        // [P, B] or null
  const bool* valid_b;      // [P, J] or null
  const int32_t* count;     // [P]: joined rows that take part
  float* parts;             // [P, B]: loss of a row
  float4* state;  // [P, B]: maximum of the negatives, log Z, a positive's share, a negative's push over Z
  int64_t rows, columns, dim, pairs, row_offset;
  float per_temperature;
  bool include_matched, per_positive;
};

// One block per row: x / max(|x|, floor). A row that no mask of its set holds becomes 0, whatever is in it.
__global__ void unit_kernel(const float* x, const bool* valid, int64_t rows, int64_t dim, int64_t masks,
                            float* unit, float* inverse) {
  const int64_t of = blockIdx.y, row = blockIdx.x;
  bool present = valid == nullptr;
  for (int64_t k = 0; k < masks && !present; ++k) present = valid[(of * masks + k) * rows + row];
  x += (of * rows + row) * dim;
  unit += (of * rows + row) * dim;
  float squares = 0.0f;
  for (int64_t c = threadIdx.x; present && c < dim; c += blockDim.x) squares += x[c] * x[c];
  const float norm = sqrtf(block_sum(squares));
  // Not fmaxf, which would take the floor for a NaN.
  const float scale = 1.0f / (norm < kUnitNormFloor ? kUnitNormFloor : norm);
  for (int64_t c = threadIdx.x; c < dim; c += blockDim.x) unit[c] = present ? x[c] * scale : 0.0f;
  if (threadIdx.x == 0) inverse[of * rows + row] = scale;
}

__global__ void count_kernel(const bool* valid_b, int64_t columns, int32_t* count) {
  int32_t held = 0;
  for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
    held += valid_b == nullptr || valid_b[blockIdx.x * columns + j];
  }
  held = block_sum(held);
  if (threadIdx.x == 0) count[blockIdx.x] = held;
}

// The loss of all rows, in double.
__global__ void total_kernel(const float* parts, int64_t size, float* loss) {
  double sum = 0.0;
  for (int64_t k = threadIdx.x; k < size; k += blockDim.x) sum += parts[k];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum);
}

__global__ void scale_kernel(const float* x, const float* factor, int64_t size, float* y) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k < size) y[k] = x[k] * *factor;
}

struct Slabs {
  float x[kDepth][kTile + 4];
  float y[kDepth][kTile + 4];
};

// score[r][c] = ⟨x[first_x + 4·ty + r], y[first_y + tx + 16·c]⟩ / τ; 0 past the ends.
__device__ void tile_scores(const float* x, int64_t first_x, int64_t size_x, const float* y, int64_t first_y,
                            int64_t size_y, int64_t dim, float per_temperature, Slabs& slabs,
                            float (&score)[kEach][kEach]) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) score[r][c] = 0.0f;
  }
  for (int64_t first = 0; first < dim; first += kDepth) {
    __syncthreads();  // the slabs have been read
    for (int at = threadIdx.x; at < kTile * kDepth; at += kThreads) {
      const int row = at / kDepth, k = at % kDepth;
      const bool inside = first + k < dim;
      slabs.x[k][row] = inside && first_x + row < size_x ? x[(first_x + row) * dim + first + k] : 0.0f;
      slabs.y[k][row] = inside && first_y + row < size_y ? y[(first_y + row) * dim + first + k] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float left[kEach], right[kEach];
#pragma unroll
      for (int r = 0; r < kEach; ++r) left[r] = slabs.x[k][ty * kEach + r];
#pragma unroll
      for (int c = 0; c < kEach; ++c) right[c] = slabs.y[k][tx + kSide * c];
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
#pragma unroll
        for (int c = 0; c < kEach; ++c) score[r][c] += left[r] * right[c];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) score[r][c] *= per_temperature;
  }
}

// A row of a or of b as its pairs see it.
struct Party {
  int64_t index;  // in the joined batch
  int64_t label;
  bool present;
};

__device__ __forceinline__ Party row_of(const Contrastive& call, int64_t pair, int64_t i) {
  const bool inside = i < call.rows;
  return {call.row_offset + i, inside ? call.labels[i] : 0,
          inside && (call.valid == nullptr || call.valid[pair * call.rows + i])};
}

__device__ __forceinline__ Party column_of(const Contrastive& call, int64_t pair, int64_t j) {
  const bool inside = j < call.columns;
  return {j, inside ? call.labels_b[j] : 0,
          inside && (call.valid_b == nullptr || call.valid_b[pair * call.columns + j])};
}

__device__ __forceinline__ bool is_positive(const Contrastive& call, const Party& x, const Party& y) {
  return x.present && y.present && x.label == y.label && (call.include_matched || x.index != y.index);
}

__device__ __forceinline__ bool is_negative(const Party& x, const Party& y) {
  return x.present && y.present && x.label != y.label;
}

// Over the 16 threads that hold a row of the tile.
template <typename V>
__device__ __forceinline__ V side_sum(V value) {
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

__device__ __forceinline__ float side_max(float value) {
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

// Logistic function of x, the derivative of softplus.
__device__ __forceinline__ float logistic_of(float x) {
  const float t = expf(-fabsf(x)), rest = 1.0f / (1.0f + t);
  return x < 0.0f ? t * rest : rest;
}

// Loss and state of a block of rows in one pair.
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(Contrastive call) {
  __shared__ Slabs slabs;
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  const int64_t pair = blockIdx.y, first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const float* unit_b = call.unit_b + pair * call.columns * call.dim;
  Party row[kEach];
  float top[kEach], total[kEach], loss[kEach], pull[kEach], log_z[kEach], score[kEach][kEach];
  int32_t positives[kEach];
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    row[r] = row_of(call, pair, first_row + ty * kEach + r);
    top[r] = -INFINITY;
    total[r] = loss[r] = pull[r] = 0.0f;
    positives[r] = 0;
  }
  for (int64_t first = 0; first < call.columns; first += kTile) {
    tile_scores(call.unit_a, first_row, call.rows, unit_b, first, call.columns, call.dim,
                call.per_temperature, slabs, score);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      bool negative[kEach];
      float high = top[r];
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        const Party column = column_of(call, pair, first + tx + kSide * c);
        negative[c] = is_negative(row[r], column);
        positives[r] += is_positive(call, row[r], column);
        if (negative[c]) high = fmaxf(high, score[r][c]);
      }
      high = side_max(high);
      const float shown = high == -INFINITY ? 0.0f : high;
      // Each thread sums its own columns; all of a row share the maximum.
      total[r] *= expf(top[r] - shown);
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        if (negative[c]) total[r] += expf(score[r][c] - shown);
      }
      top[r] = high;
    }
  }
  bool active[kEach];
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    total[r] = side_sum(total[r]);
    positives[r] = side_sum(positives[r]);
    active[r] = total[r] != 0.0f && positives[r] > 0;  // a NaN must show
    top[r] = top[r] == -INFINITY ? 0.0f : top[r];
    log_z[r] = active[r] ? top[r] + logf(total[r]) : 0.0f;
  }
  for (int64_t first = 0; first < call.columns; first += kTile) {
    tile_scores(call.unit_a, first_row, call.rows, unit_b, first, call.columns, call.dim,
                call.per_temperature, slabs, score);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        if (!active[r] || !is_positive(call, row[r], column_of(call, pair, first + tx + kSide * c))) continue;
        const float x = log_z[r] - score[r][c];
        loss[r] += fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
        pull[r] += logistic_of(x);
      }
    }
  }
  const int32_t count = call.count[pair];
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const float sum = side_sum(loss[r]), drawn = side_sum(pull[r]);
    const int64_t i = first_row + ty * kEach + r;
    if (tx != 0 || i >= call.rows) continue;
    const float among = call.per_positive ? static_cast<float>(positives[r]) : static_cast<float>(count - 1);
    const float share =
        active[r] ? 1.0f / (static_cast<float>(call.pairs) * static_cast<float>(count) * among) : 0.0f;
    call.parts[pair * call.rows + i] = active[r] ? share * sum : 0.0f;
    call.state[pair * call.rows + i] =
        make_float4(top[r], log_z[r], share, active[r] ? share * drawn / total[r] : 0.0f);
  }
}

// Gradients of a block of rows of a (kOfA: summed over the pairs) or of b (one pair), kChannels of them:
// every tile of scores once more, turned into the gradient of the scores by the state of a's rows, times the
// other side's rows.
template <bool kOfA>
__global__ void __launch_bounds__(kThreads) gradient_kernel(Contrastive call, float* grad) {
  __shared__ union {
    Slabs slabs;
    float other[kDepth][kChannels];
  } shared;
  __shared__ float weight[kTile][kTile + 1];
  constexpr int kOwn = kChannels / kSide;
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  const int64_t first_own = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.z) * kChannels;
  const int64_t own_size = kOfA ? call.rows : call.columns, other_size = kOfA ? call.columns : call.rows;
  const int64_t begin = kOfA ? 0 : blockIdx.y, end = kOfA ? call.pairs : begin + 1;
  float sum[kEach][kOwn], along[kEach], score[kEach][kEach];
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    along[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) sum[r][c] = 0.0f;
  }
  const float* unit_own = kOfA ? call.unit_a : call.unit_b + begin * call.columns * call.dim;
  for (int64_t pair = begin; pair < end; ++pair) {
    const float* unit_other = kOfA ? call.unit_b + pair * call.columns * call.dim : call.unit_a;
    for (int64_t first = 0; first < other_size; first += kTile) {
      tile_scores(unit_own, first_own, own_size, unit_other, first, other_size, call.dim,
                  call.per_temperature, shared.slabs, score);
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
#pragma unroll
        for (int c = 0; c < kEach; ++c) {
          const int64_t own = first_own + ty * kEach + r, other = first + tx + kSide * c;
          const int64_t i = kOfA ? own : other, j = kOfA ? other : own;
          const Party row = row_of(call, pair, i), column = column_of(call, pair, j);
          float value = 0.0f;
          if (row.present && column.present) {
            const float4 state = call.state[pair * call.rows + i];
            if (state.z > 0.0f) {
              if (is_negative(row, column)) {
                value = expf(score[r][c] - state.x) * state.w;
              } else if (is_positive(call, row, column)) {
                value = -state.z * logistic_of(state.y - score[r][c]);
              }
            }
          }
          weight[ty * kEach + r][tx + kSide * c] = value;
          along[r] += value * score[r][c];
        }
      }
      for (int part = 0; part < kTile; part += kDepth) {
        __syncthreads();  // weights are written; the slabs or the last part have been read
        for (int at = threadIdx.x; at < kDepth * kChannels; at += kThreads) {
          const int64_t other = first + part + at / kChannels, channel = first_channel + at % kChannels;
          shared.other[at / kChannels][at % kChannels] =
              other < other_size && channel < call.dim ? unit_other[other * call.dim + channel] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
#pragma unroll
          for (int r = 0; r < kEach; ++r) {
            const float factor = weight[ty * kEach + r][part + k];
#pragma unroll
            for (int c = 0; c < kOwn; ++c) sum[r][c] += factor * shared.other[k][tx + kSide * c];
          }
        }
      }
    }
  }
  const float* inverse = kOfA ? call.inverse_a : call.inverse_b + begin * call.columns;
  if (!kOfA) grad += begin * call.columns * call.dim;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int64_t own = first_own + ty * kEach + r;
    const float product = side_sum(along[r]);
    if (own >= own_size) continue;
    // Below the floor the norm is a constant, so nothing is taken away along the row.
    const float scale = inverse[own], inward = scale < 0.9999f / kUnitNormFloor ? product : 0.0f;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int64_t channel = first_channel + tx + kSide * c;
      if (channel >= call.dim) continue;
      const int64_t at = own * call.dim + channel;
      grad[at] = (sum[r][c] * call.per_temperature - unit_own[at] * inward) * scale;
    }
  }
}

std::optional<Tensor> dense_mask(const std::optional<Tensor>& mask, int64_t pairs, int64_t size) {
  if (!mask.has_value()) return std::nullopt;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == pairs * size, kContrastive,
                  ": valid must be [P, B] bool and valid_b [P, J] bool");
  return dense(*mask);
}

std::tuple<Tensor, Tensor, Tensor> contrastive_fwd_cuda(Tensor a_any, Tensor b_any, Tensor labels_any,
                                                        Tensor labels_b_any, int64_t row_offset,
                                                        std::optional<Tensor> valid_any,
                                                        std::optional<Tensor> valid_b_any, double temperature,
                                                        bool include_matched, bool per_positive,
                                                        bool with_grad) {
  STD_TORCH_CHECK(a_any.dim() == 2 && b_any.dim() == 3 && a_any.size(1) == b_any.size(2) &&
                      a_any.scalar_type() == ScalarType::Float && b_any.scalar_type() == ScalarType::Float,
                  kContrastive, ": a must be [B, D] and b [P, J, D], both float32");
  const Launch launch(a_any);
  const Tensor a = dense(a_any), b = dense(b_any), labels = dense(labels_any), labels_b = dense(labels_b_any);
  const int64_t rows = a.size(0), dim = a.size(1), pairs = b.size(0), columns = b.size(1);
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels_b.scalar_type() == ScalarType::Long &&
                      labels.numel() == rows && labels_b.numel() == columns && row_offset >= 0 &&
                      row_offset + rows <= columns,
                  kContrastive,
                  ": labels must be int64 and fit the rows, which must lie in the joined batch");
  STD_TORCH_CHECK(pairs < 65536, kContrastive, ": more pairs than a grid holds");
  const std::optional<Tensor> valid = dense_mask(valid_any, pairs, rows);
  const std::optional<Tensor> valid_b = dense_mask(valid_b_any, pairs, columns);

  Tensor grad_a = torch::stable::new_empty(a, {with_grad ? rows : 0, dim});
  Tensor grad_b = torch::stable::new_empty(a, {pairs, with_grad ? columns : 0, dim});
  if (rows == 0 || dim == 0 || pairs == 0) {
    torch::stable::zero_(grad_a);
    torch::stable::zero_(grad_b);
    return {torch::stable::new_zeros(a, {}), grad_a, grad_b};
  }
  Tensor loss = torch::stable::new_empty(a, {});
  Tensor unit_a = torch::stable::new_empty(a, {rows, dim});
  Tensor unit_b = torch::stable::new_empty(a, {pairs, columns, dim});
  Tensor inverse_a = torch::stable::new_empty(a, {rows}),
         inverse_b = torch::stable::new_empty(a, {pairs, columns});
  Tensor count = torch::stable::new_empty(a, {pairs}, ScalarType::Int);
  Tensor parts = torch::stable::new_empty(a, {pairs, rows}),
         state = torch::stable::new_empty(a, {pairs, rows, 4});
  const Contrastive call{pointer<const float>(unit_a),
                         pointer<const float>(unit_b),
                         pointer<const float>(inverse_a),
                         pointer<const float>(inverse_b),
                         pointer<const int64_t>(labels),
                         pointer<const int64_t>(labels_b),
                         pointer_or_null<const bool>(valid),
                         pointer_or_null<const bool>(valid_b),
                         pointer<const int32_t>(count),
                         pointer<float>(parts),
                         pointer<float4>(state),
                         rows,
                         columns,
                         dim,
                         pairs,
                         row_offset,
                         static_cast<float>(1.0 / temperature),
                         include_matched,
                         per_positive};
  const cudaStream_t stream = launch.stream();
  const auto blocks = [](int64_t size) { return static_cast<unsigned>(ceil_div(size, kTile)); };
  const unsigned chunks = static_cast<unsigned>(ceil_div(dim, kChannels)),
                 pair_count = static_cast<unsigned>(pairs);
  unit_kernel<<<dim3(static_cast<unsigned>(rows)), 128, 0, stream>>>(pointer<const float>(a), call.valid,
                                                                     rows, dim, pairs, pointer<float>(unit_a),
                                                                     pointer<float>(inverse_a));
  Launch::check(kContrastive);
  unit_kernel<<<dim3(static_cast<unsigned>(columns), pair_count), 128, 0, stream>>>(
      pointer<const float>(b), call.valid_b, columns, dim, 1, pointer<float>(unit_b),
      pointer<float>(inverse_b));
  Launch::check(kContrastive);
  count_kernel<<<pair_count, kThreads, 0, stream>>>(call.valid_b, columns, pointer<int32_t>(count));
  Launch::check(kContrastive);
  rows_kernel<<<dim3(blocks(rows), pair_count), kThreads, 0, stream>>>(call);
  Launch::check(kContrastive);
  total_kernel<<<1, 1024, 0, stream>>>(call.parts, pairs * rows, pointer<float>(loss));
  Launch::check(kContrastive);
  if (with_grad) {
    gradient_kernel<true>
        <<<dim3(blocks(rows), 1, chunks), kThreads, 0, stream>>>(call, pointer<float>(grad_a));
    Launch::check(kContrastive);
    gradient_kernel<false>
        <<<dim3(blocks(columns), pair_count, chunks), kThreads, 0, stream>>>(call, pointer<float>(grad_b));
    Launch::check(kContrastive);
  }
  return {loss, grad_a, grad_b};
}

// The gradients that the forward made, times the gradient of the loss.
std::tuple<Tensor, Tensor> contrastive_bwd_cuda(Tensor grad_loss, Tensor grad_a, Tensor grad_b) {
  STD_TORCH_CHECK(grad_loss.numel() == 1 && grad_loss.scalar_type() == ScalarType::Float, kContrastive,
                  ": the gradient of the loss must be one float32");
  const Launch launch(grad_a);
  const auto scaled = [&](const Tensor& any) {
    const Tensor x = dense(any);
    Tensor y = torch::stable::new_empty(x, x.sizes());
    const int64_t size = x.numel();
    if (size > 0) {
      scale_kernel<<<static_cast<unsigned>(ceil_div(size, kThreads)), kThreads, 0, launch.stream()>>>(
          pointer<const float>(x), pointer<const float>(grad_loss), size, pointer<float>(y));
      Launch::check(kContrastive);
    }
    return y;
  };
  return {scaled(grad_a), scaled(grad_b)};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CUDA, m) {
  m.impl("cross_modal_contrastive_cpp_fwd", TORCH_BOX(&contrastive_fwd_cuda));
  m.impl("cross_modal_contrastive_cpp_bwd", TORCH_BOX(&contrastive_bwd_cuda));
}

}  // namespace
}  // namespace deepmsi
