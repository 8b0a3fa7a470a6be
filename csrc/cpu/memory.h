// Memory that the registrations of the CPU kernels lend to these, kept from call to call.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace deepmsi {

// Memory that kernels work in, kept for the next call: a model asks for the same sizes at every step, and the
// first touch of a page that the system hands out anew costs more than what is computed in it.
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

// Bytes that start at a cache line and hold anything.
class Bytes {
 public:
  explicit Bytes(int64_t count = 0)
      : piece_(Memory::shared().take(count == 0 ? 0 : count + 64)),
        start_(piece_.start.get() + (64 - reinterpret_cast<uintptr_t>(piece_.start.get()) % 64)) {}
  Bytes& operator=(Bytes&& other) {
    std::swap(piece_, other.piece_);
    std::swap(start_, other.start_);
    return *this;
  }
  ~Bytes() { Memory::shared().give_back(std::move(piece_)); }
  char* data() const { return start_; }

 private:
  Memory::Piece piece_;
  char* start_;
};

}  // namespace deepmsi
