// The instructions of sm_90a on a CPU, for kernels/gna/cuda/hopper: barriers in shared memory,
// copies of boxes, and products of warpgroups, which end late, early or in between, in any order
// that the machine allows. What it would hang on, fault on or leave undefined fails the launch.
//
// Every call of an instruction is a site, by file and line; a test may spoil one (`spoil`), to see
// that it is missed.
#pragma once

#include "cuda_emulator.h"

#include <array>
#include <deque>
#include <map>
#include <set>
#include <tuple>

namespace gna {

struct TensorMap {
  const char* base;
  std::array<int64_t, 5> sizes, strides;  // strides in bytes
  std::array<int, 5> box;
};

struct Barrier {
  uint32_t started;  // a magic number, once it is
  int arrivals, pending, bytes, phase;
};

}  // namespace gna

namespace emulator {

struct Product {
  float* sums;
  int columns;
  const uint32_t* a;  // null: in shared memory, at `a_at`
  uint64_t a_at, b_at;
  bool add;
  void (*numbers)(const uint16_t (&)[8], float*);
};

struct Box {
  char* to;
  gna::TensorMap map;
  gna::Barrier* barrier;
  std::array<int, 5> at;
};

// What a test spoils: an instruction's site and how.
struct Spoiled {
  std::string what, file;
  int line = 0, change = 0;
};

class Hopper : public Engine {
 public:
  static constexpr uint32_t kStarted = 0xba881e55;
  static constexpr int kBase = 1024;  // of shared addresses

  Spoiled spoiled;
  std::set<std::tuple<std::string, std::string, int>> sites;
  int64_t products = 0, boxes = 0;

  int change(const char* what, int line, const char* file) override {
    const std::string name = std::string(file).substr(std::string(file).rfind('/') + 1);
    if (collects) sites.emplace(what, name, line);
    if (spoiled.change == 0 || spoiled.line != line || spoiled.what != what) return 0;
    return spoiled.file == name ? spoiled.change : 0;
  }
  bool collects = false;

  void start_block(int threads) override {
    threads_ = std::vector<Thread>(threads);
    groups_ = std::vector<Gathering>(threads / 128 + 1);
    copies_.clear();
    barriers.clear();
    for (Named& named : named_) named = Named{};
    registers_.assign(threads / 128 + 1, 65536 / threads / 8 * 8);
    most_registers_ = 65536 / threads / 8 * 8 * threads / 128;
    unpublished = false;
    manner_ = machine().random() % 3;
  }

  void end_block() override {
    if (!copies_.empty()) machine().fail("a box is still being copied at the end");
    for (const Thread& thread : threads_) {
      if (!thread.groups.empty() || !thread.open.empty()) {
        machine().fail("a product has not ended at the end");
      }
    }
    for (const gna::Barrier* barrier : barriers) {
      if (barrier->pending != barrier->arrivals || barrier->bytes) {
        machine().fail("a barrier is left within a phase");
      }
    }
    for (const Named& named : named_) {
      if (!named.warps.empty()) machine().fail("threads came to a barrier in vain");
    }
    // Those who take registers wait for those who give them.
    int registers = 0;
    for (size_t n = 0; n < threads_.size() / 128; ++n) registers += registers_[n];
    if (registers > most_registers_) machine().fail("registers run out");
  }

  bool proceed(bool must) override {
    const unsigned lot = machine().random();
    const bool now = must || (manner_ == 0 ? false : manner_ == 1 ? lot % 8 == 0 : true);
    if (!now) return false;
    for (size_t n = 0; manner_ != 0 && n < threads_.size() / 128; ++n) {
      if (committed(n) > 0 && lot / 8 % 2) {
        end_oldest(n);
        return true;
      }
    }
    if (copies_.empty()) return false;
    const size_t n = lot / 16 % copies_.size();
    const Box box = copies_[n];
    copies_.erase(copies_.begin() + n);
    deliver(box);
    return true;
  }

  char* shared() const {
    auto address = reinterpret_cast<uintptr_t>(machine().bytes.data());
    return reinterpret_cast<char*>((address + 1023) / 1024 * 1024);
  }
  uint32_t address(const void* x) const {
    return static_cast<uint32_t>(static_cast<const char*>(x) - shared()) + kBase;
  }
  // Where a byte lies that counts as at this address.
  char* shuffled(uint32_t address) const {
    address -= kBase;
    return shared() + (address ^ (address >> 7 & 7) << 4);
  }

  void check(const gna::Barrier& barrier) const {
    if (barrier.started != kStarted) machine().fail("a barrier was not started");
  }
  void settle(gna::Barrier& barrier) {
    if (barrier.pending < 0) machine().fail("too many arrive at a barrier");
    if (std::abs(barrier.bytes) >= 1 << 20) machine().fail("a barrier expects too many bytes");
    if (barrier.pending || barrier.bytes) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.arrivals;
  }

  void copy(const Box& box) {
    if (unpublished) machine().fail("a copy may not know its barrier");
    check(*box.barrier);
    if (address(box.to) % 128) machine().fail("a box is not aligned");
    copies_.push_back(box);
    machine().pause();
  }

  // Products.

  void begin() { thread().begun = true; }
  void add(const Product& product) {
    if (!thread().begun) machine().fail("a product begins without a fence");
    thread().open.push_back(product);
  }
  void commit() {
    thread().groups.push_back(std::move(thread().open));
    thread().open.clear();
    thread().begun = false;
  }
  void wait_for(size_t kept) {
    const int group = machine().thread_index().x / 128;
    machine().meet(groups_[group], 128, [&] {
      while (committed(group) > kept) end_oldest(group);
    });
  }

  // Barriers of some warps.

  struct Named {
    std::set<int> warps;
    Gathering gathering;
    int lanes = 0;
    bool waited = false;
  };
  void come(int id, int threads, bool waits) {
    if (id < 1 || id > 15) machine().fail("there is no such barrier");
    Named& named = named_[id];
    const int warp = machine().thread_index().x / 32;
    if (machine().lane() == 0) {
      if (!named.warps.insert(warp).second) machine().fail("a warp comes to a barrier twice");
    }
    named.waited |= waits;
    const int generation = named.gathering.generation;
    if (++named.lanes == threads) {
      if (!named.waited) machine().fail("nobody waits at a barrier");
      named.lanes = 0;
      named.waited = false;
      named.warps.clear();
      ++named.gathering.generation;
    } else if (waits) {
      machine().wait(named.gathering.generation, generation);
    }
  }

  void set_registers(int registers, bool more) {
    const int group = machine().thread_index().x / 128;
    if (registers % 8 || registers < 24 || registers > 256) machine().fail("registers by 8");
    if (registers != registers_[group] && more != (registers > registers_[group])) {
      machine().fail("registers are given where they are to be taken, or the reverse");
    }
    if (machine().thread_index().x % 128 == 127) registers_[group] = registers;
  }

  bool unpublished = false;
  std::vector<const gna::Barrier*> barriers;  // all that were started

 private:
  struct Thread {
    std::deque<std::vector<Product>> groups;
    std::vector<Product> open;
    bool begun = false;
  };

  Thread& thread() { return threads_[machine().thread_index().x]; }

  // Groups of products that all threads of a warpgroup have begun.
  size_t committed(size_t group) const {
    size_t least = threads_[group * 128].groups.size();
    for (int n = 1; n < 128; ++n) {
      least = std::min(least, threads_[group * 128 + n].groups.size());
    }
    return least;
  }

  void end_oldest(size_t group) {
    Thread* threads = &threads_[group * 128];
    for (size_t n = 0; n < threads[0].groups.front().size(); ++n) {
      for (int t = 1; t < 128; ++t) {
        const auto& others = threads[t].groups.front();
        const Product &one = threads[0].groups.front()[n];
        if (others.size() != threads[0].groups.front().size() || others[n].b_at != one.b_at ||
            others[n].a_at != one.a_at || others[n].add != one.add) {
          machine().fail("threads differ in a product");
        }
      }
      multiply(threads, n);
    }
    for (int t = 0; t < 128; ++t) threads[t].groups.pop_front();
  }

  // Eight numbers of an operand in shared memory: of row `row` from column `k` on, among the rows
  // that its 16 columns are summed over with, or, `transposed`, of row `k` from column `row` on.
  void eight(const Product& product, uint64_t at, int row, int k, bool transposed,
             float* x) const {
    const uint32_t start = (at & 0x3fff) << 4, along = (at >> 16 & 0x3fff) << 4;
    const uint32_t rows = (at >> 32 & 0x3fff) << 4;
    const uint32_t place =
        transposed ? start + row / 64 * along + k / 8 * rows + k % 8 * 128 + row % 64 * 2
                   : start + row / 8 * rows + row % 8 * 128 + k * 2;
    uint16_t bits[8];
    std::fill_n(bits, 8, 0x7fff);  // NaN
    if (place >= kBase && place - kBase + 16 <= machine().bytes.size() - 1024) {
      std::memcpy(bits, shuffled(place), 16);
    }
    product.numbers(bits, x);
  }

  void multiply(Thread* threads, size_t n) {
    const Product& one = threads[0].groups.front()[n];
    static float a[64][16], b[16][256], c[256];
    ++products;
    for (uint64_t at : {one.b_at, one.a ? one.b_at : one.a_at}) {
      if (at >> 62 != 1 || (at >> 49 & 7) != 0) machine().fail("an operand is laid out otherwise");
    }
    for (int row = 0; row < 64; ++row) {
      for (int k = 0; k < 16; k += 8) {
        if (one.a == nullptr) {
          eight(one, one.a_at, row, k, false, &a[row][k]);
          continue;
        }
        uint16_t bits[8];
        for (int i = 0; i < 8; ++i) {
          const int t = row / 16 * 32 + row % 8 * 4 + i / 2;
          const uint32_t word = threads[t].groups.front()[n].a[row / 8 % 2 + k / 8 * 2];
          bits[i] = static_cast<uint16_t>(word >> (i % 2 * 16));
        }
        one.numbers(bits, &a[row][k]);
      }
    }
    for (int column = 0; column < one.columns; column += one.a ? 8 : 1) {
      for (int k = 0; k < 16; k += one.a ? 1 : 8) {
        if (one.a) {
          eight(one, one.b_at, column, k, true, &b[k][column]);
          continue;
        }
        float x[8];
        eight(one, one.b_at, column, k, false, x);
        for (int i = 0; i < 8; ++i) b[k + i][column] = x[i];
      }
    }
    for (int row = 0; row < 64; ++row) {
      const int t = row / 16 * 32 + row % 8 * 4, half = row / 8 % 2;
      float* sums[4];
      for (int i = 0; i < 4; ++i) sums[i] = threads[t + i].groups.front()[n].sums + 2 * half;
      for (int column = 0; column < one.columns; ++column) {
        c[column] = one.add ? sums[column % 8 / 2][column / 8 * 4 + column % 2] : 0;
      }
      for (int k = 0; k < 16; ++k) {
        const float x = a[row][k];
        for (int column = 0; column < one.columns; ++column) c[column] += x * b[k][column];
      }
      for (int column = 0; column < one.columns; ++column) {
        sums[column % 8 / 2][column / 8 * 4 + column % 2] = c[column];
      }
    }
  }

  void deliver(const Box& box) {
    ++boxes;
    const auto& size = box.map.box;
    uint32_t to = address(box.to);
    for (int w = 0; w < size[4]; ++w)
      for (int z = 0; z < size[3]; ++z)
        for (int y = 0; y < size[2]; ++y)
          for (int x = 0; x < size[1]; ++x)
            for (int column = 0; column < size[0]; column += 8, to += 16) {
              const int64_t at[5] = {box.at[0] + column, box.at[1] + x, box.at[2] + y,
                                     box.at[3] + z, box.at[4] + w};
              const char* from = box.map.base;
              bool inside = true;
              for (int m = 0; m < 5; ++m) {
                inside &= at[m] >= 0 && at[m] < box.map.sizes[m];
                from += at[m] * box.map.strides[m];
              }
              if (inside) std::memcpy(shuffled(to), from, 16);
              else std::memset(shuffled(to), 0, 16);
            }
    box.barrier->bytes -= static_cast<int>(to - address(box.to));
    settle(*box.barrier);
  }

  std::vector<Thread> threads_;
  std::vector<Gathering> groups_;
  std::vector<Box> copies_;
  Named named_[16];
  std::vector<int> registers_;
  int most_registers_ = 0, manner_ = 0;
};

inline Hopper& hopper() {
  static thread_local Hopper hopper;
  machine().engine = &hopper;
  return hopper;
}

// Whether the machine is one for these instructions.
inline bool& hopper_is_here() {
  static bool here = false;
  return here;
}

}  // namespace emulator

namespace gna {

inline char* panels_memory() { return emulator::hopper().shared(); }
inline uint32_t shared_address(const void* x) { return emulator::hopper().address(x); }

inline void start_barrier(Barrier& barrier, int arrivals, GNA_SITE) {
  arrivals += emulator::hopper().change("start_barrier", line, file);
  barrier = {emulator::Hopper::kStarted, arrivals, arrivals, 0, 0};
  emulator::hopper().barriers.push_back(&barrier);
  emulator::hopper().unpublished = true;
}
inline void publish_barriers(GNA_SITE) {
  if (emulator::hopper().change("publish_barriers", line, file)) return;
  emulator::hopper().unpublished = false;
}
inline void arrive(Barrier& barrier, GNA_SITE) {
  if (emulator::hopper().change("arrive", line, file)) return;
  emulator::hopper().check(barrier);
  --barrier.pending;
  emulator::hopper().settle(barrier);
  emulator::machine().pause();
}
inline void arrive_expecting(Barrier& barrier, int bytes, GNA_SITE) {
  emulator::hopper().check(barrier);
  barrier.bytes += bytes + emulator::hopper().change("arrive_expecting", line, file);
  --barrier.pending;
  emulator::hopper().settle(barrier);
  emulator::machine().pause();
}
inline void wait(Barrier& barrier, int parity, GNA_SITE) {
  if (emulator::hopper().change("wait", line, file)) return;
  emulator::hopper().check(barrier);
  emulator::machine().wait(barrier.phase, parity);
}

// Spoiled, the box is another along a dimension, or does not come.
inline void copy_box(void* to, const TensorMap& map, Barrier& barrier, const int (&at)[5],
                     GNA_SITE) {
  emulator::Box box{static_cast<char*>(to), map, &barrier, {at[0], at[1], at[2], at[3], at[4]}};
  const int change = emulator::hopper().change("copy_box", line, file);
  if (change > 5) return;
  if (change > 0) ++box.at[change - 1];
  emulator::hopper().copy(box);
}

inline void begin_products(GNA_SITE) {
  if (emulator::hopper().change("begin_products", line, file)) return;
  emulator::hopper().begin();
}
inline void end_group(GNA_SITE) {
  if (emulator::hopper().change("end_group", line, file)) return;
  emulator::hopper().commit();
}
template <int kGroups>
void wait_for_products(GNA_SITE) {
  emulator::hopper().wait_for(kGroups +
                              emulator::hopper().change("wait_for_products", line, file));
}
template <int kN>
void changed(float (&)[kN]) {}

inline void keep_before(float) {}

template <typename T>
void numbers_of(const uint16_t (&bits)[8], float* x) {
  for (int i = 0; i < 8; ++i) x[i] = to_float(T{bits[i]});
}
// Spoiled: the first row, the distance of eight rows, that of panels, the swizzle, or `add`.
inline uint64_t spoil_operand(uint64_t at, int change) {
  if (change == 1) return at + (128 * 8 >> 4);
  if (change == 2) return at ^ uint64_t{512 >> 4} << 32;
  if (change == 3) return at ^ uint64_t{512 >> 4} << 16;
  if (change == 4) return at ^ uint64_t{3} << 62;
  return at;
}
template <int kN, typename T>
void multiply(float (&sums)[kN], uint64_t a, uint64_t b, bool add, T, GNA_SITE) {
  const int change = emulator::hopper().change("multiply_shared", line, file);
  emulator::hopper().add({sums, 2 * kN, nullptr, a, spoil_operand(b, change), add != (change == 5),
                          numbers_of<T>});
}
template <int kN, typename T>
void multiply(float (&sums)[kN], const uint32_t (&a)[4], uint64_t b, bool add, T, GNA_SITE) {
  const int change = emulator::hopper().change("multiply_registers", line, file);
  emulator::hopper().add({sums, 2 * kN, a, 0, spoil_operand(b, change), add != (change == 5),
                          numbers_of<T>});
}

inline void meet(int barrier, int threads, GNA_SITE) {
  if (emulator::hopper().change("meet", line, file)) return;
  emulator::hopper().come(barrier, threads, true);
}
inline void signal(int barrier, int threads, GNA_SITE) {
  if (emulator::hopper().change("signal", line, file)) return;
  emulator::hopper().come(barrier, threads, false);
  emulator::machine().pause();
}

template <int kRegisters>
void give_registers(GNA_SITE) {
  if (emulator::hopper().change("give_registers", line, file)) return;
  emulator::hopper().set_registers(kRegisters, false);
}
template <int kRegisters>
void take_registers(GNA_SITE) {
  emulator::hopper().set_registers(kRegisters, true);
}

inline uint32_t bit_range(int start, int width, GNA_SITE) {
  const int change = emulator::hopper().change("bit_range", line, file);
  if (change == 1) ++start;
  if (change == 2) ++width;
  if (change == 3 && width > 0) --width;
  if (start < 0 || width < 0) emulator::machine().fail("a range of bits below 0");
  if (start >= 32) return 0;
  const uint32_t from = ~0u << start;
  return start + width >= 32 ? from : from & ~(~0u << (start + width));
}

inline bool has_boxes() { return emulator::hopper_is_here(); }

inline cudaError_t make_map(TensorMap& map, bool, const void* base, const uint64_t (&sizes)[5],
                            const uint64_t (&strides)[4], const uint32_t (&box)[5]) {
  emulator::hopper();  // works beside all blocks from here on
  bool good = reinterpret_cast<uintptr_t>(base) % 16 == 0 && base && box[0] * 2 <= 128;
  map.base = static_cast<const char*>(base);
  for (int m = 0; m < 5; ++m) {
    map.sizes[m] = static_cast<int64_t>(sizes[m]);
    map.strides[m] = m == 0 ? 2 : static_cast<int64_t>(strides[m - 1]);
    map.box[m] = static_cast<int>(box[m]);
    good &= sizes[m] >= 1 && sizes[m] <= uint64_t{1} << 32 && box[m] >= 1 && box[m] <= 256;
    if (m > 0) good &= strides[m - 1] % 16 == 0 && strides[m - 1] < uint64_t{1} << 40;
  }
  return good ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace gna
