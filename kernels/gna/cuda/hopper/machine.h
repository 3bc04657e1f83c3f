// The machine's instructions that the kernels for sm_90a use beside those of ../instructions.h.
//
// A tile of 16-bit numbers lies in shared memory in panels of 64 columns: a row of a panel is 128
// bytes, whose 16-byte chunks are shuffled within every 8 rows, as boxes are written (128-byte
// swizzle) and products read. Panels begin at multiples of 1024 bytes.
//
// Copies of boxes and products are asynchronous. A copy ends by counting its bytes off a barrier in
// shared memory; products end in the order of their groups. What a product reads, in registers or
// shared memory, may not change before its group has ended, and its sums may not be touched.
#pragma once

#include "../instructions.h"

#ifdef GNA_HOPPER_MACHINE  // another machine that has them all, such as the tests' emulator
#include GNA_HOPPER_MACHINE
#else

#include <cuda.h>

#include "products.h"

namespace gna {

using TensorMap = CUtensorMap;
using Barrier = uint64_t;  // in shared memory

// All of a block's dynamic shared memory, for panels.
GNA_DEVICE char* panels_memory() {
  extern __shared__ __align__(1024) char panels[];
  return panels;
}

// A barrier's phase ends when `arrivals` threads have arrived and all bytes expected are there.
GNA_DEVICE void start_barrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}
// Shows barriers that were started to the copies' engine; before the block's barrier.
GNA_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
GNA_DEVICE void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
// Arrives, and lets the phase wait for so many bytes more.
GNA_DEVICE void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}
// Waits while the barrier is in a phase of this parity; the first phase has parity 0. A barrier
// that was just started counts as having ended a phase of parity 1.
GNA_DEVICE void wait(Barrier& barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Starts to copy a box, to a place of a panel that is a multiple of 1024 bytes; `at` is its corner,
// the fastest dimension first. What lies outside of the map is 0, but its bytes count.
GNA_DEVICE void copy_box(void* to, const TensorMap& map, Barrier& barrier, const int (&at)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
      "r"(at[4])
      : "memory");
}

// Before a group's first product, and after registers that it reads or adds to have changed.
GNA_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GNA_DEVICE void end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kGroups of the last groups have not ended.
template <int kGroups>
GNA_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// Tells the compiler that products have changed these.
template <int kN>
GNA_DEVICE void changed(float (&x)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Keeps what makes this number, which is never negative, before what follows: the assembler moves
// waits ahead of arithmetic, but not out of what could be a loop.
GNA_DEVICE void keep_before(float x) {
  asm volatile(
      "{\n"
      ".reg .pred negative;\n"
      "setp.lt.f32 negative, %0, 0f00000000;\n"
      "vote.sync.any.pred negative, negative, -1;\n"
      "@!negative bra.uni done;\n"
      "again:\n"
      "nanosleep.u32 32;\n"
      "bra.uni again;\n"
      "done:\n"
      "}" ::"f"(x)
      : "memory");
}

// Barriers 1 to 15 of some warps, all of which wait, or of which some only tell the others.
GNA_DEVICE void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
GNA_DEVICE void signal(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers of each of a warpgroup's threads from here on.
template <int kRegisters>
GNA_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
GNA_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// `width` bits from `start` on, both at least 0; those from 32 on are lost.
GNA_DEVICE uint32_t bit_range(int start, int width) {
  uint32_t bits;
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(bits) : "r"(start), "r"(width));
  return bits;
}

// Whether the current device is such a machine.
inline bool has_boxes() {
  int device = 0, major = 0, minor = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return known && major == 9 && minor == 0;
}

// A map of an array of 16-bit numbers: sizes, distances in bytes from the second dimension on, and
// the sizes of a box. The driver makes it, and is found at run time, so that nothing links to it.
inline cudaError_t make_map(TensorMap& map, bool bfloat, const void* base,
                            const uint64_t (&sizes)[5], const uint64_t (&strides)[4],
                            const uint32_t (&box)[5]) {
  using Make = decltype(&cuTensorMapEncodeTiled);
  static const Make make = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<Make>(found);
  }();
  if (make == nullptr) return cudaErrorNotSupported;
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      make(&map, bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
           const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
           CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace gna

#endif

namespace gna {

// Whether code is compiled for such a machine; kernels are empty elsewhere.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasBoxes = false;
#else
constexpr bool kHasBoxes = true;
#endif

// What a product reads from shared memory: rows of a panel from a multiple of 8 on and 16 columns
// from a multiple of 16 bytes on. `along` is the distance of the next 64 columns, where a product
// reads columns of more than one panel.
GNA_DEVICE uint64_t operand_at(const void* rows, int along = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = 1024;
  return kSwizzle128 | kEightRows >> 4 << 32 | uint64_t(along >> 4) << 16 |
         (shared_address(rows) & 0x3ffff) >> 4;
}

// The same, some bytes further.
GNA_DEVICE uint64_t further(uint64_t operand, int bytes) {
  constexpr uint64_t kHigh = ~uint64_t{0} << 32;
  return (operand & kHigh) | (static_cast<uint32_t>(operand) + (bytes >> 4));
}

}  // namespace gna
