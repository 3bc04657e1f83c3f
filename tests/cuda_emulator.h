// A machine for the CUDA sources where there is none: the instructions that the kernels use, as
// functions on a CPU. A block's threads are fibers that hand over to each other where they wait.
// Copies arrive as late as they may, and threads run in another order each round, so that a missing
// wait or barrier shows in the results.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "numbers.h"
#include "xla/ffi/api/ffi.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define GNA_DEVICE inline
// Where an instruction is called: last among the parameters of what stands for it.
#define GNA_SITE int line = __builtin_LINE(), const char* file = __builtin_FILE()
#define threadIdx (emulator::machine().thread_index())
#define blockIdx (emulator::machine().block_index)

struct Index {
  unsigned x = 0;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct EmulatedStream;
using cudaStream_t = EmulatedStream*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
const char* cudaGetErrorString(cudaError_t);

namespace xla::ffi {
template <>
struct CtxDecoding<PlatformStream<cudaStream_t>> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return nullptr;
  }
};
}  // namespace xla::ffi

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool present;
};

// A thread. It starts on a stack of its own and hands over by jumps, which need no system call.
struct Fiber {
  std::jmp_buf place;
  std::vector<Copy> copies;
  bool started = false, done = false;
  const int* word = nullptr;  // it waits while this has the value
  int value;
};

// Threads that wait for each other; the last one to come does the work of all.
struct Gathering {
  int arrived = 0, generation = 0;
};

struct Lane {
  uint32_t words[16];
  const void* row;
};

struct Warp {
  Gathering gathering;
  Lane given[32];
  uint32_t result[32][4];
};

// What goes on beside the threads: copies and products that were started.
class Engine {
 public:
  virtual ~Engine() = default;
  // Lets something end if anything is under way; `must`: nothing else can go on.
  virtual bool proceed(bool must) = 0;
  virtual void start_block(int threads) = 0;
  virtual void end_block() = 0;
  // How the instruction at a site is spoiled by a test, 0 if it is not.
  virtual int change(const char* what, int line, const char* file) = 0;
};

class Machine {
 public:
  Index block_index;
  std::vector<char> bytes;
  Engine* engine = nullptr;
  std::string failure;  // of the last launch
  std::mt19937 random{0};

  Index thread_index() const { return {static_cast<unsigned>(current_)}; }
  int lane() const { return current_ % 32; }
  int threads() const { return static_cast<int>(fibers_.size()); }
  Fiber& fiber() { return fibers_[current_]; }
  Warp& warp() { return warps_[current_ / 32]; }

  // False if the block failed.
  bool run_block(int threads, int shared_bytes, const std::function<void()>& body) {
    body_ = &body;
    bytes.assign(shared_bytes + 1024, static_cast<char>(0xff));  // NaN, in any format
    fibers_.assign(threads, Fiber{});
    warps_ = std::vector<Warp>(threads / 32);
    block_ = Gathering{};
    alive_ = threads;
    failure.clear();
    while (stacks_.size() < static_cast<size_t>(threads)) stacks_.emplace_back(new char[kStack]);
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    if (engine) engine->start_block(threads);
    if (_setjmp(failed_) == 0) {
      while (alive_ > 0) {
        std::shuffle(order.begin(), order.end(), random);
        bool moved = false;
        for (int n : order) {
          Fiber& fiber = fibers_[n];
          if (fiber.done || (fiber.word && *fiber.word == fiber.value)) continue;
          fiber.word = nullptr;
          current_ = n;
          moved = true;
          enter();
        }
        if (engine) moved |= engine->proceed(!moved);
        if (!moved) fail("threads wait for each other");
      }
      if (engine) engine->end_block();
    }
    return failure.empty();
  }

  // Lets others run until `word` has another value.
  void wait(const int& word, int value) {
    if (word != value) return;
    fiber().word = &word;
    fiber().value = value;
    pause();
  }
  void pause() {
    if (_setjmp(fiber().place) == 0) std::longjmp(scheduler_, 1);
  }

  template <typename Work>
  void meet(Gathering& place, int threads, const Work& work) {
    const int generation = place.generation;
    if (++place.arrived == threads) {
      work();
      place.arrived = 0;
      ++place.generation;
    } else {
      wait(place.generation, generation);
    }
  }
  void meet_block() { meet(block_, alive_, [] {}); }

  // Gives up the block: its launch fails.
  [[noreturn]] void fail(const std::string& why) {
    failure = why;
    std::longjmp(failed_, 1);
  }

  static Machine& get() {
    static thread_local Machine machine;
    return machine;
  }

 private:
  static constexpr size_t kStack = 1 << 18;

  void enter() {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber().started) std::longjmp(fiber().place, 1);
    fiber().started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_[current_].get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Machine::run, 0);
    setcontext(&context);
  }

  static void run() {
    Machine& machine = get();
    (*machine.body_)();
    if (!machine.fiber().copies.empty()) {
      machine.fail("a thread ends without waiting for its copies");
    }
    machine.fiber().done = true;
    --machine.alive_;
    std::longjmp(machine.scheduler_, 1);
  }

  std::jmp_buf scheduler_, failed_;
  const std::function<void()>* body_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Gathering block_;
  int current_ = 0, alive_ = 0;
};

inline Machine& machine() { return Machine::get(); }

// All lanes of a warp give something, and each takes its part of what comes of it.
template <typename Work>
uint32_t (&collect(const Lane& given, const Work& work))[4] {
  Warp& warp = machine().warp();
  warp.given[machine().lane()] = given;
  machine().meet(warp.gathering, 32, [&] { work(warp.given, warp.result); });
  return warp.result[machine().lane()];
}

}  // namespace emulator

inline const char* cudaGetErrorString(cudaError_t) {
  const std::string& failure = emulator::machine().failure;
  return failure.empty() ? "a wrong argument" : failure.c_str();
}

namespace gna {

inline char* shared_memory() {
  auto address = reinterpret_cast<uintptr_t>(emulator::machine().bytes.data());
  return reinterpret_cast<char*>((address + 127) / 128 * 128);
}

inline void start_copy(void* to, const void* from, int bytes, bool present) {
  const auto address = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (address % bytes) emulator::machine().fail("a copy is not aligned");
  emulator::machine().fiber().copies.push_back({to, from, bytes, present});
}
inline void copy_16(void* to, const void* from, bool present) {
  start_copy(to, from, 16, present);
}
inline void copy_4(void* to, const void* from, bool present) { start_copy(to, from, 4, present); }

inline void wait_for_copies() {
  for (const auto& copy : emulator::machine().fiber().copies) {
    if (copy.present) std::memcpy(copy.to, copy.from, copy.bytes);
    else std::memset(copy.to, 0, copy.bytes);
  }
  emulator::machine().fiber().copies.clear();
}

inline void load_any(uint32_t (&x)[4], const void* row, bool transposed) {
  emulator::Lane given{};
  given.row = row;
  auto& result = emulator::collect(given, [&](emulator::Lane* lanes, uint32_t (*results)[4]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t m[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(m[r], lanes[matrix * 8 + r].row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t low = transposed ? m[t][g] : m[g][t];
        const uint32_t high = transposed ? m[t + 1][g] : m[g][t + 1];
        results[lane][matrix] = low | high << 16;
      }
    }
  });
  std::memcpy(x, result, sizeof x);
}
inline void load_matrices(uint32_t (&x)[4], const void* row) { load_any(x, row, false); }
inline void load_transposed(uint32_t (&x)[4], const void* row) { load_any(x, row, true); }

template <typename T>
float half_of(uint32_t word, int half) {
  return to_float(T{static_cast<uint16_t>(word >> (16 * half))});
}

// The fragments' places, from the description of mma.m16n8k16 in the PTX manual.
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  emulator::Lane given{};
  std::copy_n(a, 4, given.words);
  given.words[4] = b0;
  given.words[5] = b1;
  for (int i = 0; i < 4; ++i) given.words[6 + i] = as_bits(c[i]);
  auto& result = emulator::collect(given, [](emulator::Lane* lanes, uint32_t (*results)[4]) {
    float x[16][16], y[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = i % 4 < 2 ? g : g + 8, column = t * 2 + i % 2 + (i < 4 ? 0 : 8);
        x[row][column] = half_of<T>(lanes[lane].words[i / 2], i % 2);
      }
      for (int i = 0; i < 4; ++i) {
        y[t * 2 + i % 2 + (i < 2 ? 0 : 8)][g] = half_of<T>(lanes[lane].words[4 + i / 2], i % 2);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
        float sum = as_float(lanes[lane].words[6 + i]);
        for (int k = 0; k < 16; ++k) sum += x[row][k] * y[k][column];
        results[lane][i] = as_bits(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) c[i] = as_float(result[i]);
}

template <typename T>
uint32_t pack(float low, float high, T) {
  T x, y;
  from_float(low, x);
  from_float(high, y);
  return x.bits | static_cast<uint32_t>(y.bits) << 16;
}

template <typename T>
float number(T x) {
  return to_float(x);
}

inline float power_of_two(float x) { return std::exp2(x); }

inline uint32_t votes(bool yes) {
  emulator::Lane given{};
  given.words[0] = yes;
  return emulator::collect(given, [](emulator::Lane* lanes, uint32_t (*results)[4]) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= lanes[lane].words[0] << lane;
    for (int lane = 0; lane < 32; ++lane) results[lane][0] = bits;
  })[0];
}

inline float exchange(float x, int mask) {
  emulator::Lane given{};
  given.words[0] = as_bits(x);
  return as_float(emulator::collect(given, [&](emulator::Lane* lanes, uint32_t (*results)[4]) {
    for (int lane = 0; lane < 32; ++lane) results[lane][0] = lanes[lane ^ mask].words[0];
  })[0]);
}

inline int uniform(int x) { return x; }
inline void block_barrier(GNA_SITE) {
  emulator::Machine& machine = emulator::machine();
  if (machine.engine && machine.engine->change("block_barrier", line, file)) return;
  machine.meet_block();
}
inline void warp_barrier() { votes(true); }

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, int threads, int bytes, cudaStream_t,
                   const Arguments& arguments) {
  emulator::Machine& machine = emulator::machine();
  if (bytes > 227 * 1024) return cudaErrorInvalidConfiguration;
  for (int64_t n = 0; n < blocks; ++n) {
    machine.block_index.x = static_cast<unsigned>(n);
    if (!machine.run_block(threads, bytes, [&] { kernel(arguments); })) {
      return cudaErrorInvalidValue;
    }
  }
  return cudaSuccess;
}

template <typename Arguments>
cudaError_t load(void (*)(Arguments)) {
  return cudaSuccess;
}
inline int current_device() { return 0; }

}  // namespace gna
