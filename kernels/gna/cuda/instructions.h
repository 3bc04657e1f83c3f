// The machine's instructions that the kernels use (sm_80 and later), each in a function.
//
// A 16-bit matrix lies in shared memory in rows of 16-byte chunks. In the fragments below, lane
// 4 g + t of a warp holds pairs of columns 2 t, 2 t + 1 of row g.
#pragma once

#ifdef GNA_INSTRUCTIONS  // another machine that has them all, such as the tests' emulator
#include GNA_INSTRUCTIONS
#else

#include <cuda_runtime.h>

#include <cstdint>

#include "numbers.h"

namespace gna {

#define GNA_DEVICE __device__ __forceinline__

// All of a block's dynamic shared memory.
GNA_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

GNA_DEVICE uint32_t shared_address(const void* x) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(x));
}

// Starts to copy 16 (or 4) bytes to shared memory, or zeros where not `present`.
GNA_DEVICE void copy_16(void* to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(present ? 16 : 0));
}
GNA_DEVICE void copy_4(void* to, const void* from, bool present) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(present ? 4 : 0));
}

// Waits for all copies that this thread has started.
GNA_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
GNA_DEVICE void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each transposed.
GNA_DEVICE void load_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]. The 8x8 quarters of a come in the order (rows, columns)
// (0, 0), (8, 0), (0, 8), (8, 8); those of b are transposed.
GNA_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
GNA_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to 16 bits, the first in the lower half.
GNA_DEVICE uint32_t pack(float low, float high, Float16) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
GNA_DEVICE uint32_t pack(float low, float high, BFloat16) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

GNA_DEVICE float number(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
GNA_DEVICE float number(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

GNA_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Which lanes of the warp say yes, a bit each.
GNA_DEVICE uint32_t votes(bool yes) { return __ballot_sync(~0u, yes); }
// The value of lane (this lane ^ mask).
GNA_DEVICE float exchange(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
// x, which all lanes of the warp have the same: the compiler does not know.
GNA_DEVICE int uniform(int x) { return __shfl_sync(~0u, x, 0); }
GNA_DEVICE void block_barrier() { __syncthreads(); }
GNA_DEVICE void warp_barrier() { __syncwarp(); }

// Runs kernel(arguments) in blocks of `threads` with `bytes` of dynamic shared memory.
template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, int threads, int bytes,
                   cudaStream_t stream, const Arguments& arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch, which is good, would report it
    return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(arguments);
  return cudaGetLastError();
}

// Loads a kernel onto the current device.
template <typename Arguments>
cudaError_t load(void (*kernel)(Arguments)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// The number of the current device.
inline int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess ? device : 0;
}

}  // namespace gna

#endif
