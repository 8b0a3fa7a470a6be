// Runs the CUDA kernels on a CPU. Every thread of a block is a fiber, which runs until it waits for the block
// or for its warp. Lanes, warps and blocks take turns in orders that are drawn anew each time: what a GPU
// leaves to chance is left to chance here, and a missing barrier changes results. Shared memory holds NaN
// (all bits set) when a block begins. What CUDA forbids ends the launch with a sentence: threads of a block
// that wait at different barriers, lanes of a warp at different operations, a lane that is named and gone or
// read without being named, threads that wait for one another. A grid, a block or an amount of dynamic shared
// memory that there is not is the error that CUDA has for it.
//
// It proves arithmetic, indices and barriers. It says nothing of speed, of what a compiler for GPUs makes of
// the sources, of static shared memory and launch bounds that are too large, of memory that different blocks
// write, or of two threads that change one number between the same two barriers: here nothing comes between a
// read and a write.
#ifndef __x86_64__
#error "fibers are switched in the assembly of x86-64"
#endif

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

extern "C" void cuda_on_cpu_switch(void** from, void* to);

asm(R"(
.text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

namespace cuda_on_cpu {

dim3 thread_index{0}, block_index{0}, block_size{1}, grid_size{1};

namespace {

constexpr size_t kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr int64_t kSharedUnasked = 48 << 10, kSharedMost = 163 << 10;  // of a block, on sm_80

enum class State { kRuns, kWaitsForWarp, kWaitsForBlock, kGone };

struct Fiber {
  void* stack_pointer;
  State state;
  Place place;     // where it waits
  unsigned mask;   // the lanes that it waits for
  uint64_t given;  // to what it waits for
  uint64_t shown;  // what it gave when the warp last went on
};

std::mutex one_launch;
std::vector<Fiber> fibers;
size_t running = 0;
void* scheduler = nullptr;
void (*body)(void*) = nullptr;
void* arguments = nullptr;
char* dynamic = nullptr;
int counted = 0;
Place unnamed = nullptr;  // where a lane asked for one that its mask does not name
std::set<const void*> seen;
std::map<const void*, int64_t> allowed;
cudaError_t error = cudaSuccess;
uint64_t random_state = 0x9E3779B97F4A7C15u;

uint64_t draw() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void shuffle(std::vector<size_t>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
}

bool same(Place place, Place other) { return std::strcmp(place, other) == 0; }

[[noreturn]] void forbid(const std::string& what, Place place, Place other) {
  throw std::runtime_error("CUDA forbids it: " + what + " (" + place +
                           (same(place, other) ? ")" : std::string(", ") + other + ")"));
}

void wait(State state, Place place, unsigned mask, uint64_t given) {
  Fiber& self = fibers[running];
  self.state = state;
  self.place = place;
  self.mask = mask;
  self.given = given;
  cuda_on_cpu_switch(&self.stack_pointer, scheduler);
}

void begin() {
  body(arguments);
  wait(State::kGone, "the end", 0, 0);
  std::abort();
}

char* stack_of(size_t thread) {
  static std::vector<char*> stacks;
  while (stacks.size() <= thread) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // The last page that a stack grows into belongs to nobody.
    if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE) != 0)
      throw std::runtime_error("no memory for the stacks of a block's threads");
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[thread];
}

// Let the lanes that the first waiting one of a warp names go on, if all of them wait.
bool release_warp(size_t first) {
  if (unnamed != nullptr) forbid("a lane reads another that its mask does not name", unnamed, unnamed);
  const size_t last = std::min(first + kWarp, fibers.size());
  size_t named = first;
  while (named < last && fibers[named].state != State::kWaitsForWarp) ++named;
  if (named == last) return false;
  const Place place = fibers[named].place;
  const unsigned mask = fibers[named].mask;
  if (!(mask >> (named - first) & 1))
    forbid("a lane waits for others without being one of them", place, place);
  for (size_t i = first; i < first + kWarp; ++i) {
    if (!(mask >> (i - first) & 1)) continue;
    if (i >= last || fibers[i].state == State::kGone)
      forbid("a warp waits for a lane that is gone", place, place);
    if (fibers[i].state == State::kWaitsForBlock)
      forbid("a lane waits for the block, another for it", place, fibers[i].place);
    if (fibers[i].state == State::kRuns) return false;
    if (!same(fibers[i].place, place) || fibers[i].mask != mask)
      forbid("lanes of a warp wait at different operations", place, fibers[i].place);
  }
  for (size_t i = first; i < last; ++i) {
    if (!(mask >> (i - first) & 1)) continue;
    fibers[i].shown = fibers[i].given;
    fibers[i].state = State::kRuns;
  }
  return true;
}

// Let the block go on, if all of its threads that are not gone wait for it.
bool release_block() {
  Place place = nullptr;
  int count = 0;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::kGone) continue;
    if (fiber.state != State::kWaitsForBlock) return false;
    if (place == nullptr) place = fiber.place;
    if (!same(fiber.place, place))
      forbid("threads of a block wait at different barriers", place, fiber.place);
    count += static_cast<int>(fiber.given);
  }
  if (place == nullptr) return false;
  counted = count;
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::kWaitsForBlock) fiber.state = State::kRuns;
  }
  return true;
}

// Whether some lane of a warp can go on.
bool runs(size_t first) {
  const size_t last = std::min(first + kWarp, fibers.size());
  return std::any_of(fibers.begin() + static_cast<std::ptrdiff_t>(first),
                     fibers.begin() + static_cast<std::ptrdiff_t>(last),
                     [](const Fiber& fiber) { return fiber.state == State::kRuns; });
}

void resume(size_t thread) {
  const unsigned at = static_cast<unsigned>(thread);
  thread_index = dim3(at % block_size.x, at / block_size.x % block_size.y, at / block_size.x / block_size.y);
  running = thread;
  cuda_on_cpu_switch(&scheduler, fibers[thread].stack_pointer);
}

void run_block() {
  seen.clear();
  std::vector<size_t> warps;  // their first threads
  for (size_t i = 0; i < fibers.size(); ++i) {
    if (i % kWarp == 0) warps.push_back(i);
    // What a switch takes from a stack: six registers, and where to return to, which finds the stack as after
    // a call.
    void** top = reinterpret_cast<void**>(stack_of(i) + kStackBytes) - 8;
    std::fill_n(top, 8, nullptr);
    top[6] = reinterpret_cast<void*>(&begin);
    fibers[i] = {top, State::kRuns, 0, 0, 0, 0};
  }
  // A warp may be far ahead of another on a GPU: either one runs for as long as it can, or one step, and then
  // another.
  const bool far = draw() % 2 == 0;
  std::vector<size_t> lanes(kWarp);
  std::iota(lanes.begin(), lanes.end(), 0);
  do {
    for (std::vector<size_t> ready = warps; !ready.empty();) {
      const size_t chosen = draw() % ready.size(), first = ready[chosen];
      do {
        shuffle(lanes);
        for (const size_t lane : lanes) {
          if (first + lane < fibers.size() && fibers[first + lane].state == State::kRuns)
            resume(first + lane);
        }
      } while (release_warp(first) && far);
      if (!runs(first)) ready.erase(ready.begin() + static_cast<std::ptrdiff_t>(chosen));
    }
  } while (release_block());
  for (const Fiber& fiber : fibers) {
    if (fiber.state != State::kGone) forbid("threads wait for one another", fiber.place, fiber.place);
  }
}

}  // namespace

int lane() { return static_cast<int>(running % kWarp); }

void barrier(Place place) { wait(State::kWaitsForBlock, place, 0, 0); }

int barrier_count(bool holds, Place place) {
  wait(State::kWaitsForBlock, place, 0, holds);
  return counted;
}

void warp_barrier(unsigned mask, Place place) { wait(State::kWaitsForWarp, place, mask, 0); }

uint64_t warp_exchange(unsigned mask, uint64_t given, int from, Place place) {
  if (from < 0 || from >= static_cast<int>(kWarp) || !(mask >> from & 1)) unnamed = place;
  wait(State::kWaitsForWarp, place, mask, given);
  return fibers[running / kWarp * kWarp + static_cast<size_t>(from)].shown;
}

unsigned warp_ballot(unsigned mask, bool holds, Place place) {
  wait(State::kWaitsForWarp, place, mask, holds);
  unsigned votes = 0;
  for (size_t i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) votes |= static_cast<unsigned>(fibers[running / kWarp * kWarp + i].shown) << i;
  }
  return votes;
}

char* dynamic_shared() { return dynamic; }

bool is_fresh(const void* shared) { return seen.insert(shared).second; }

void allow_shared(const void* kernel, int64_t bytes) { allowed[kernel] = bytes; }

int64_t shared_limit() { return kSharedMost; }

cudaError_t take_error() { return std::exchange(error, cudaSuccess); }

void run(const void* kernel, dim3 grid, dim3 block, int64_t shared, void (*body_)(void*), void* arguments_) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  const auto asked = allowed.find(kernel);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || block.z > 64 ||
      shared > std::min(kSharedMost, asked == allowed.end() ? kSharedUnasked : asked->second)) {
    error = cudaErrorInvalidConfiguration;
    return;
  }
  unnamed = nullptr;
  body = body_;
  arguments = arguments_;
  grid_size = grid;
  block_size = block;
  fibers.resize(static_cast<size_t>(threads));
  // Of exactly that size, so that AddressSanitizer sees what is past it; malloc aligns by 16 as CUDA does.
  const std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::malloc(static_cast<size_t>(shared))), &std::free);
  dynamic = memory.get();
  std::vector<size_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  shuffle(order);
  for (const size_t at : order) {
    block_index = dim3(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                       static_cast<unsigned>(at / grid.x / grid.y));
    if (shared > 0) std::memset(dynamic, 0xff, static_cast<size_t>(shared));
    run_block();
  }
}

}  // namespace cuda_on_cpu
