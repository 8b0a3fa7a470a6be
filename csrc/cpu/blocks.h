// What the registrations of the CPU's transformer blocks share: working rows, packed weights, and rows over
// threads.
//
// A block works in chunks whose inner rows stay in cache. Inside a chunk, products run over tiles of rows on
// torch's threads; gradients of weights are summed chunk by chunk, each element by one thread, so that their
// bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstring>

#include "gemm.h"
#include "memory.h"
#include "tensors.h"
#include "threads.h"

namespace deepmsi {

// Rows of one product whose results a thread passes on while they are in its cache.
constexpr int64_t kBlockRows = 48;

// Rows of a product that a thread takes at a time where `width` numbers of each stay in its cache meanwhile:
// the more, the less often the weights pass by.
constexpr int64_t kBlockBytes = int64_t{800} << 10;
inline int64_t block_rows(int64_t width) {
  const int64_t rows = kBlockBytes / (static_cast<int64_t>(sizeof(float)) * std::max<int64_t>(width, 1));
  return std::clamp<int64_t>(rows / kBlockRows, 1, 4) * kBlockRows;
}

// The kernels for tensors of a type.
inline const BlockKernels& block_kernels(DType stored) {
  static const auto active = [] {
#if DEEPMSI_X86
    switch (active_isa()) {
      case Isa::kAvx512Bf16:
        return avx512_bf16::block_kernels;
      case Isa::kAvx512:
        return avx512::block_kernels;
      case Isa::kAvx2:
        return avx2::block_kernels;
      default:
        break;
    }
#endif
    return baseline::block_kernels;
  }();
  static const BlockKernels floats = active(DType::kFloat), halves = active(DType::kBFloat16);
  return stored == DType::kBFloat16 ? halves : floats;
}

// Rows by where they start and how far apart they lie, for what only the kernels know the type of.
struct Rows {
  char* start;
  int64_t bytes;
  void* at(int64_t row) const { return start + row * bytes; }
};

// The rows of a dense tensor.
inline Rows rows_of(const Tensor& x, int64_t width) {
  return {static_cast<char*>(x.data_ptr()), width * static_cast<int64_t>(x.element_size())};
}

// Working memory of floats.
class Floats {
 public:
  explicit Floats(int64_t count) : bytes_(count * static_cast<int64_t>(sizeof(float))) {}
  float* data() const { return reinterpret_cast<float*>(bytes_.data()); }

 private:
  Bytes bytes_;
};

// Rows of floats that a product writes: at the place of what becomes of them, where that is floats, too, or
// in working memory.
class FloatRows {
 public:
  FloatRows(bool in_place, int64_t rows, int64_t columns)
      : in_place_(in_place), own_(in_place ? 0 : rows * columns) {}
  float* at(void* place) const { return in_place_ ? static_cast<float*>(place) : own_.data(); }

 private:
  bool in_place_;
  Floats own_;
};

// Working memory of rows of operands; in that of floats, where operands are such and may take their place.
class OperandRows {
 public:
  OperandRows(const BlockKernels& k, int64_t rows, int64_t columns)
      : own_(rows * row_bytes(k, columns)),
        rows_{own_.data(), row_bytes(k, columns)},
        unpadded_(columns * bytes_of(k.operand)) {}
  OperandRows(const BlockKernels& k, int64_t rows, int64_t columns, const Floats& floats)
      : own_(k.multiplies_floats() ? 0 : rows * row_bytes(k, columns)),
        rows_{k.multiplies_floats() ? reinterpret_cast<char*>(floats.data()) : own_.data(),
              row_bytes(k, columns)},
        unpadded_(columns * bytes_of(k.operand)) {}
  void* at(int64_t row) const { return rows_.at(row); }
  // Put zeros behind the columns of rows that something else than the block's kernels wrote.
  void pad(int64_t row, int64_t count) const {
    for (int64_t r = row; unpadded_ < rows_.bytes && r < row + count; ++r)
      std::memset(static_cast<char*>(at(r)) + unpadded_, 0, rows_.bytes - unpadded_);
  }
  static int64_t row_bytes(const BlockKernels& k, int64_t columns) {
    return k.pitch(columns) * bytes_of(k.operand);
  }

 private:
  Bytes own_;
  Rows rows_;
  int64_t unpadded_;
};

// As many rows as a product takes at a time, of any type.
inline int64_t tile_rows() { return block_kernels(DType::kFloat).tile; }
inline int64_t tiles_of(int64_t rows) { return (rows + tile_rows() - 1) / tile_rows(); }

// Rows of a chunk whose rows are `width` operands wide: few, which the threads' own caches hold; the more,
// the larger the weight whose gradient is read and written for every chunk.
inline int64_t chunk_rows(const BlockKernels& k, int64_t width, int64_t weight) {
  const int64_t bytes = std::clamp<int64_t>(4 * weight * static_cast<int64_t>(sizeof(float)),
                                            int64_t{2} << 20, int64_t{8} << 20);
  return std::max<int64_t>(bytes / (bytes_of(k.operand) * width) / k.tile, 8) * k.tile;
}

// Call run(first, last) on ranges of rows, cut between tiles.
template <typename Run>
void over_rows(int64_t rows, const Run& run) {
  const int64_t tile = tile_rows();
  share_out(tiles_of(rows), kBlockRows / tile,
            [&](int64_t begin, int64_t end) { run(begin * tile, std::min(end * tile, rows)); });
}

// Call run(first, count) for each tile of some rows, on this thread.
template <typename Run>
void each_tile(const BlockKernels& k, int64_t rows, const Run& run) {
  for (int64_t r = 0; r < rows; r += k.tile) run(r, std::min(k.tile, rows - r));
}

// Call run(row) for each of some rows.
template <typename Run>
void over_each_row(int64_t rows, const Run& run) {
  share_out(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(row);
  });
}

// A layer norm of rows; without weights it is none.
struct Norm {
  const float *weight = nullptr, *shift = nullptr;
  float eps = 0.0f;
};

// Stored rows as operands: where they lie, or a copy of `count` of them from `row` on in working memory,
// normed where a norm is given.
class AsOperands {
 public:
  AsOperands(const BlockKernels& k, const Rows& stored, int64_t columns, int64_t most, const Norm& norm = {})
      : k_(k),
        stored_(stored),
        columns_(columns),
        norm_(norm),
        in_place_(norm.weight == nullptr && k.as_stored(columns)),
        copy_(k, in_place_ ? 0 : most, columns) {}
  Rows rows(int64_t row, int64_t count) const {
    const Rows found = from(row);
    make(row, count, found.start);
    return found;
  }
  // The same on all threads.
  Rows rows_of_chunk(int64_t row, int64_t count) const {
    const Rows found = from(row);
    if (in_place_) return found;
    over_rows(count, [&](int64_t first, int64_t last) { make(row + first, last - first, found.at(first)); });
    return found;
  }

 private:
  Rows from(int64_t row) const {
    const int64_t bytes = OperandRows::row_bytes(k_, columns_);
    return {static_cast<char*>(in_place_ ? stored_.at(row) : copy_.at(0)), bytes};
  }
  void make(int64_t row, int64_t count, void* to) const {
    if (in_place_) return;
    if (norm_.weight == nullptr) {
      k_.to_operand(count, columns_, stored_.at(row), to);
    } else {
      k_.normed(count, columns_, stored_.at(row), norm_.weight, norm_.shift, norm_.eps, to);
    }
  }

  const BlockKernels& k_;
  Rows stored_;
  int64_t columns_;
  Norm norm_;
  bool in_place_;
  OperandRows copy_;
};

// A part of a matrix B.
struct Part {
  int64_t row, column, depth, columns;
};

inline int64_t panels_of(const BlockKernels& k, int64_t columns) { return (columns + k.panel - 1) / k.panel; }

// Lay out a part of B [depth, columns], which lies transposed, as torch keeps a weight, or as it is.
inline void pack_part(const BlockKernels& k, const Tensor& weight, bool transposed, int64_t depth,
                      int64_t columns, const Part& part, void* out) {
  const int64_t row = transposed ? depth : columns;
  const int64_t from = transposed ? part.column * row + part.row : part.row * row + part.column;
  const void* start =
      static_cast<const char*>(weight.data_ptr()) + from * static_cast<int64_t>(weight.element_size());
  const auto pack = weight.scalar_type() == ScalarType::Float ? k.pack_floats : k.pack;
  share_out(panels_of(k, part.columns), 1, [&](int64_t begin, int64_t end) {
    pack(start, row, transposed, part.depth, part.columns, begin, end, out);
  });
}

// Whether pack_weight laid a weight out beforehand.
inline bool is_packed(const Tensor& weight) { return weight.dim() == 3; }

// Whether threads share the columns of products of so few rows by a weight, not the rows: all of these,
// `width` numbers each, stay in every thread's cache, and the weight passes by once. Where it is laid out
// anew it passes by anyway.
inline bool shares_columns(const Tensor& weight, int64_t rows, int64_t width) {
  return is_packed(weight) && rows * width * static_cast<int64_t>(sizeof(float)) <= kBlockBytes;
}

// A matrix B [depth, columns] in panels, or a part of it.
class Packed {
 public:
  // From a weight [columns, depth] as torch keeps it (transposed) or as pack_weight lays it out, or from
  // [depth, columns].
  Packed(const BlockKernels& kernels, const Tensor& weight, bool transposed, int64_t depth, int64_t columns)
      : Packed(kernels, weight, transposed, depth, columns, {0, 0, depth, columns}) {}
  Packed(const BlockKernels& kernels, const Tensor& weight, bool transposed, int64_t depth, int64_t columns,
         const Part& part)
      : k_(kernels), depth_(part.depth), panel_depth_(part.depth), columns_(part.columns) {
    if (is_packed(weight)) {
      STD_TORCH_CHECK(transposed, "deepmsi: a packed weight has no gradient");
      STD_TORCH_CHECK(part.column % k_.panel == 0 && part.row % 2 == 0, "deepmsi: a part that cuts panels");
      panel_depth_ = depth;
      start_ = static_cast<const char*>(weight.data_ptr()) +
               (part.column * k_.pitch(depth) + part.row * k_.panel) * bytes_of(k_.operand);
      return;
    }
    memory_ = Bytes(panels_of(k_, columns_) * k_.panel * k_.pitch(depth_) * bytes_of(k_.operand));
    pack_part(k_, weight, transposed, depth, columns, part, memory_.data());
    start_ = memory_.data();
  }
  void multiply(int64_t rows, const void* a, float* c) const {
    k_.multiply(rows, columns_, depth_, a, start_, panel_depth_, false, c, columns_);
  }
  // The same on all threads, each of which takes some columns.
  void multiply_shared(int64_t rows, const void* a, float* c) const {
    share_out(panels_of(k_, columns_), 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * k_.panel, count = std::min(end * k_.panel, columns_) - first;
      k_.multiply(rows, count, depth_, a, at(first * k_.pitch(panel_depth_)), panel_depth_, false, c + first,
                  columns_);
    });
  }
  // By `count` columns from `first` on, a multiple of the panel's.
  void multiply_columns(int64_t rows, const void* a, int64_t first, int64_t count, float* c) const {
    k_.multiply(rows, count, depth_, a, at(first * k_.pitch(panel_depth_)), panel_depth_, false, c, count);
  }
  // By `count` rows from `first` on, an even number; added to c, where asked.
  void multiply_rows(int64_t rows, const void* a, int64_t first, int64_t count, bool add, float* c) const {
    k_.multiply(rows, columns_, count, a, at(first * k_.panel), panel_depth_, add, c, columns_);
  }

 private:
  const void* at(int64_t number) const { return start_ + number * bytes_of(k_.operand); }

  const BlockKernels& k_;
  int64_t depth_, panel_depth_, columns_;
  Bytes memory_;
  const char* start_;
};

// Sums over rows that are kept per tile, then added in order.
class ColumnSums {
 public:
  explicit ColumnSums(int64_t width) : width_(width), total_(width, 0.0) {}
  void begin_chunk(int64_t rows) { partial_.assign(tiles_of(rows) * width_, 0.0f); }
  float* tile(int64_t row) { return partial_.data() + row / tile_rows() * width_; }
  void end_chunk() {
    for (size_t at = 0; at < partial_.size(); at += width_) {
      for (int64_t c = 0; c < width_; ++c) total_[c] += partial_[at + c];
    }
  }
  // Sums from one on as a tensor of that many, like another, float32 or bfloat16.
  Tensor write(int64_t from, int64_t count, const Tensor& like) const {
    return write(from, count, like, like.scalar_type());
  }
  Tensor write(int64_t from, int64_t count, const Tensor& like, ScalarType type) const {
    Tensor out = torch::stable::new_empty(like, {count}, type);
    for (int64_t c = 0; c < count; ++c) {
      const float sum = static_cast<float>(total_[from + c]);
      if (type == ScalarType::BFloat16) {
        pointer<BFloat16>(out)[c] = Storage<BFloat16>::narrow(sum);
      } else {
        pointer<float>(out)[c] = sum;
      }
    }
    return out;
  }

 private:
  int64_t width_;
  std::vector<double> total_;
  std::vector<float> partial_;
};

// The gradient of a weight [out, in], summed in float32; without elements where it is not wanted.
class WeightGradient {
 public:
  WeightGradient(const BlockKernels& k, bool wanted, const Tensor& weight, int64_t out, int64_t in)
      : k_(k),
        out_(out),
        in_(in),
        tensor_(wanted ? torch::stable::new_empty(weight, {out, in}) : torch::stable::new_empty(weight, {0})),
        own_(wanted && !in_floats() ? out * in : 0),
        sums_(in_floats() ? pointer<float>(tensor_) : own_.data()) {
    if (wanted) std::fill_n(sums_, out * in, 0.0f);
  }

  // Add grad_y [rows, out]^T x [rows, in], both operands. In even shares: for each, all of x is laid out.
  void add(int64_t rows, const void* grad_y, const void* x) const {
    const int64_t tile = tile_rows();
    torch::stable::parallel_for(0, tiles_of(out_), 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * tile, last = std::min(end * tile, out_);
      const Bytes scratch(k_.outer_scratch);
      k_.add_outer(last - first, in_, rows, static_cast<const char*>(grad_y) + first * bytes_of(k_.operand),
                   k_.pitch(out_), x, sums_ + first * in_, scratch.data());
    });
  }

  const Tensor& written() const {
    if (tensor_.numel() > 0 && !in_floats()) {
      const Rows rows = rows_of(tensor_, in_);
      over_rows(out_, [&](int64_t first, int64_t last) {
        k_.add(last - first, in_, sums_ + first * in_, nullptr, rows.at(first));
      });
    }
    return tensor_;
  }

 private:
  bool in_floats() const { return tensor_.scalar_type() == ScalarType::Float; }

  const BlockKernels& k_;
  int64_t out_, in_;
  Tensor tensor_;
  Floats own_;
  float* sums_;
};

inline DType stored_type(const Tensor& x, const char* op) {
  const DType type = storage_of(x, op);
  STD_TORCH_CHECK(type == DType::kFloat || type == DType::kBFloat16, op, ": takes float32 or bfloat16");
  return type;
}

inline ScalarType scalar_type_of(DType type) {
  return type == DType::kFloat ? ScalarType::Float : ScalarType::BFloat16;
}

// Numbers of the type that is stored.
inline Tensor stored(const Tensor& x, const BlockKernels& k, int64_t count, const char* op,
                     const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == scalar_type_of(k.stored) && x.numel() == count, op, ": ", name,
                  " must be ", count, k.stores_floats() ? " float32" : " bfloat16", " numbers");
  return dense(x);
}

// A weight [out, in] of the type of the rows or of float32, or one that pack_weight laid out for such rows.
inline Tensor weight_of(const Tensor& x, const BlockKernels& k, int64_t out, int64_t in, const char* op,
                        const char* name) {
  if (is_packed(x)) {
    STD_TORCH_CHECK(x.scalar_type() == scalar_type_of(k.operand) && x.size(0) == panels_of(k, out) &&
                        x.size(1) == k.pitch(in) && x.size(2) == k.panel,
                    op, ": ", name, " is packed for another layer, other rows or another CPU");
    return dense(x);
  }
  if (x.scalar_type() != ScalarType::Float) return stored(x, k, out * in, op, name);
  STD_TORCH_CHECK(x.numel() == out * in, op, ": ", name, " must be ", out * in, " numbers");
  return dense(x);
}

// A vector of float32 or bfloat16, or none, as floats.
class Vector {
 public:
  Vector(const std::optional<Tensor>& x, int64_t count, const char* op, const char* name) {
    if (!x.has_value()) return;
    stored_type(*x, op);
    STD_TORCH_CHECK(x->numel() == count, op, ": ", name, " must be ", count, " numbers");
    held_ = dense(*x);
    if (held_->scalar_type() == ScalarType::Float) return;
    wide_.resize(count);
    for (int64_t i = 0; i < count; ++i) wide_[i] = to_wide(pointer<const BFloat16>(*held_)[i]);
  }
  // Null where there is none.
  const float* data() const {
    if (!held_.has_value()) return nullptr;
    return held_->scalar_type() == ScalarType::Float ? pointer<const float>(*held_) : wide_.data();
  }
  // What starts at a row.
  const float* at(int64_t row) const { return held_.has_value() ? data() + row : nullptr; }
  bool has_value() const { return held_.has_value(); }

 private:
  std::optional<Tensor> held_;
  std::vector<float> wide_;
};

// Rows that count: those before the last offset, or all where there are no offsets.
inline int64_t valid_rows(const std::optional<Tensor>& cu_seqlens, int64_t rows, const char* op) {
  if (!cu_seqlens.has_value()) return rows;
  STD_TORCH_CHECK(
      cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, op,
      ": cu_seqlens must be [F + 1] int32");
  const int64_t valid = pointer<const int32_t>(dense(*cu_seqlens))[cu_seqlens->size(0) - 1];
  STD_TORCH_CHECK(0 <= valid && valid <= rows, op, ": cu_seqlens must end within the rows of x");
  return valid;
}

// Rows past the last offset are nobody's: what stands for them is `from`'s, or zeros.
inline void pass_rows(const Tensor& to, const Tensor* from, int64_t first) {
  if (to.size(0) <= first) return;
  const Rows out = rows_of(to, to.size(1));
  const int64_t bytes = (to.size(0) - first) * out.bytes;
  if (from == nullptr) {
    std::memset(out.at(first), 0, bytes);
  } else {
    std::memcpy(out.at(first), rows_of(*from, to.size(1)).at(first), bytes);
  }
}

}  // namespace deepmsi
