// Work shared by torch's threads.
#pragma once

#include <algorithm>
#include <atomic>

#include "tensors.h"

namespace deepmsi {

// Call run(begin, end) for ranges of [0, count), which do not depend on one another, on torch's threads.
//
// A thread takes the next range when it is free, of a multiple of `least`, shorter ones towards the end:
// threads do not run equally fast, beside others and on unlike cores, nor do equal ranges take equal times.
// Where `count` is small, each thread gets an equal share.
template <typename Run>
void share_out(int64_t count, int64_t least, const Run& run) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || count < 4 * threads * least) {
    torch::stable::parallel_for(0, count, 1, run);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.load(); begin < count;) {
      const int64_t parts = std::max<int64_t>((count - begin) / (2 * threads * least), 1);
      const int64_t end = std::min(begin + parts * least, count);
      if (!next.compare_exchange_weak(begin, end)) continue;
      run(begin, end);
      begin = next.load();
    }
  });
}

}  // namespace deepmsi
