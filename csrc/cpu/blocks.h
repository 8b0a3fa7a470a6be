// What the registrations of the CPU's transformer blocks share: memory, packed weights, and rows over
// threads.
//
// A block works in chunks whose inner rows stay in cache. Inside a chunk, products run over tiles of rows on
// torch's threads; gradients of weights are summed chunk by chunk, each element by one thread, so that their
// bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "gemm.h"
#include "tensors.h"

namespace deepmsi {

// Rows of one product whose results a thread passes on while they are in its cache.
constexpr int64_t kBlockRows = 48;
// Bytes of the widest rows of a chunk.
constexpr int64_t kChunkBytes = int64_t{4} << 20;
// Terms between two additions to a gradient of a weight: the scratch of add_outer.
constexpr int64_t kOuterDepth = 256;

// Rows of a product that a thread takes at a time where `width` numbers of each stay in its cache meanwhile:
// the more, the less often the weights pass by.
constexpr int64_t kBlockBytes = int64_t{800} << 10;
inline int64_t block_rows(int64_t width) {
  const int64_t rows = kBlockBytes / (static_cast<int64_t>(sizeof(float)) * std::max<int64_t>(width, 1));
  return std::clamp<int64_t>(rows / kBlockRows, 1, 4) * kBlockRows;
}

inline const BlockKernels& block_kernels() {
  static const BlockKernels kernels = [] {
#if DEEPMSI_X86
    if (active_isa() == Isa::kAvx512) return avx512::block_kernels();
    if (active_isa() == Isa::kAvx2) return avx2::block_kernels();
#endif
    return baseline::block_kernels();
  }();
  return kernels;
}

// Memory of working rows and packed weights, kept for the next call: a block asks for the same sizes at every
// step, and the first touch of a page that the system hands out anew costs more than what is computed in it.
class Memory {
 public:
  static Memory& shared() {
    static Memory& memory = *new Memory;  // threads may outlive static objects
    return memory;
  }

  struct Piece {
    int64_t bytes = 0;
    std::unique_ptr<char[]> start;
  };

  // The smallest kept piece that fits and is not much too large, or a new one.
  Piece take(int64_t bytes) {
    if (bytes == 0) return {};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = kept_.lower_bound(bytes);
      if (found != kept_.end() && found->first <= bytes + bytes / 4) {
        Piece piece{found->first, std::move(found->second)};
        total_ -= piece.bytes;
        kept_.erase(found);
        return piece;
      }
    }
    return {bytes, std::unique_ptr<char[]>(new char[bytes])};
  }

  void give_back(Piece piece) {
    if (piece.bytes == 0 || piece.bytes > kMost) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    // The small ones go first: a large piece is the dearer one to have anew.
    while (total_ + piece.bytes > kMost) {
      total_ -= kept_.begin()->first;
      kept_.erase(kept_.begin());
    }
    total_ += piece.bytes;
    kept_.emplace(piece.bytes, std::move(piece.start));
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kMost = 0;  // so that no piece is read after its end
#else
  static constexpr int64_t kMost = int64_t{64} << 20;  // bytes that are kept
#endif
  std::mutex mutex_;
  std::multimap<int64_t, std::unique_ptr<char[]>> kept_;
  int64_t total_ = 0;
};

// Floats that start at a cache line and hold anything.
class Floats {
 public:
  explicit Floats(int64_t count = 0)
      : piece_(Memory::shared().take(count == 0 ? 0 : count * static_cast<int64_t>(sizeof(float)) + 64)),
        start_(piece_.start.get() + (64 - reinterpret_cast<uintptr_t>(piece_.start.get()) % 64)) {}
  Floats& operator=(Floats&& other) {
    std::swap(piece_, other.piece_);
    std::swap(start_, other.start_);
    return *this;
  }
  ~Floats() { Memory::shared().give_back(std::move(piece_)); }
  float* data() const { return reinterpret_cast<float*>(start_); }

 private:
  Memory::Piece piece_;
  char* start_;
};

inline int64_t tiles_of(int64_t rows) { return (rows + block_kernels().tile - 1) / block_kernels().tile; }

// Rows of a chunk whose rows are `width` wide.
inline int64_t chunk_rows(int64_t width) {
  const int64_t tile = block_kernels().tile;
  return std::max<int64_t>(kChunkBytes / (static_cast<int64_t>(sizeof(float)) * width) / tile, 8) * tile;
}

// Call run(first, last) on ranges of rows, cut between tiles.
template <typename Run>
void over_rows(int64_t rows, const Run& run) {
  const int64_t tile = block_kernels().tile;
  torch::stable::parallel_for(0, tiles_of(rows), 1, [&](int64_t begin, int64_t end) {
    run(begin * tile, std::min(end * tile, rows));
  });
}

// A matrix B [depth, columns] in panels.
class Packed {
 public:
  // From a weight [columns, depth] as torch keeps it (transposed), or from [depth, columns]; its rows lie
  // `row` numbers apart where it is a part of a larger one.
  Packed(const float* weight, bool transposed, int64_t depth, int64_t columns, int64_t row = 0)
      : depth_(depth), columns_(columns) {
    if (row == 0) row = transposed ? depth : columns;
    const BlockKernels& k = block_kernels();
    const int64_t panels = (columns + k.panel - 1) / k.panel;
    memory_ = Floats(panels * k.panel * depth);
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      k.pack(weight, row, transposed, depth, columns, begin, end, memory_.data());
    });
  }
  void multiply(int64_t rows, const float* a, float* c) const {
    block_kernels().multiply(rows, columns_, depth_, a, depth_, memory_.data(), depth_, false, c, columns_);
  }
  // By `count` columns from `first` on, a multiple of the panel's.
  void multiply_columns(int64_t rows, const float* a, int64_t first, int64_t count, float* c) const {
    block_kernels().multiply(rows, count, depth_, a, depth_, memory_.data() + first * depth_, depth_, false,
                             c, count);
  }
  // By `count` rows from `first` on; added to c, where asked.
  void multiply_rows(int64_t rows, const float* a, int64_t first, int64_t count, bool add, float* c) const {
    block_kernels().multiply(rows, columns_, count, a, count, memory_.data() + first * block_kernels().panel,
                             depth_, add, c, columns_);
  }

 private:
  int64_t depth_, columns_;
  Floats memory_;
};

// grad_weight [out, in] += grad_y [rows, out]^T x [rows, in].
inline void add_weight_gradient(int64_t rows, int64_t out, int64_t in, const float* grad_y, const float* x,
                                float* grad_weight) {
  over_rows(out, [&](int64_t first, int64_t last) {
    Floats scratch(kOuterDepth * block_kernels().panel);
    block_kernels().add_outer(last - first, in, rows, grad_y + first, out, x, in, grad_weight + first * in,
                              in, scratch.data());
  });
}

// Sums over rows that are kept per tile, then added in order.
class ColumnSums {
 public:
  explicit ColumnSums(int64_t width) : width_(width), total_(width, 0.0) {}
  void begin_chunk(int64_t rows) { partial_.assign(tiles_of(rows) * width_, 0.0f); }
  float* tile(int64_t row) { return partial_.data() + row / block_kernels().tile * width_; }
  void end_chunk() {
    for (size_t at = 0; at < partial_.size(); at += width_) {
      for (int64_t c = 0; c < width_; ++c) total_[c] += partial_[at + c];
    }
  }
  void write(int64_t from, const Tensor& out) const {
    for (int64_t c = 0; c < out.numel(); ++c) pointer<float>(out)[c] = static_cast<float>(total_[from + c]);
  }

 private:
  int64_t width_;
  std::vector<double> total_;
  std::vector<float> partial_;
};

inline Tensor floats(const Tensor& x, int64_t count, const char* op, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.numel() == count, op, ": ", name, " must be ",
                  count, " float32 numbers");
  return dense(x);
}

inline std::optional<Tensor> floats(const std::optional<Tensor>& x, int64_t count, const char* op,
                                    const char* name) {
  return x.has_value() ? std::optional<Tensor>(floats(*x, count, op, name)) : std::nullopt;
}

inline const float* pointer_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? pointer<const float>(*x) : nullptr;
}

// Rows from `row` on of something that may be absent.
inline const float* at_row(const float* x, int64_t row, int64_t width = 1) {
  return x == nullptr ? nullptr : x + row * width;
}

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
  const int64_t row = to.size(1), count = (to.size(0) - first) * row;
  float* out = pointer<float>(to) + first * row;
  if (from == nullptr) {
    std::fill_n(out, count, 0.0f);
  } else {
    std::copy_n(pointer<const float>(*from) + first * row, count, out);
  }
}

inline Tensor zeros_like(const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, x.sizes());
  std::memset(out.data_ptr(), 0, out.numel() * sizeof(float));
  return out;
}

// Zeros like a tensor, to sum in; without elements where the sums are not wanted.
inline Tensor zeros_where(bool wanted, const Tensor& like) {
  return wanted ? zeros_like(like) : torch::stable::new_empty(like, {0});
}

}  // namespace deepmsi
