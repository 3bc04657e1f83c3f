// Products of a warpgroup (wgmma), each in a function: sums [64, kN] += a [64, 16] b [16, kN].
//
// `multiply(sums, a, b, add, T)` where `b` lies in shared memory by its columns, as keys of 16
// numbers each, and so does `a` by its rows; `multiply(sums, a, b, add, T)` with `a` in registers
// where `b` lies by its rows, as 16 values. Unless `add`, sums begin at 0.
//
// Thread 32 w + 4 g + t holds, of rows 16 w + g + 8 h, sums[4 n + 2 h + c] of column 8 n + 2 t + c,
// and a[h + 2 m] of columns 8 m + 2 t (lower half) and 8 m + 2 t + 1.
#pragma once

#include <cstdint>

#include "../numbers.h"

#define GNA_SUMS_8(i)                                                                     \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
      "+f"(x[i + 6]), "+f"(x[i + 7])
#define GNA_SUMS_16 GNA_SUMS_8(0), GNA_SUMS_8(8)
#define GNA_SUMS_32 GNA_SUMS_16, GNA_SUMS_8(16), GNA_SUMS_8(24)
#define GNA_SUMS_48 GNA_SUMS_32, GNA_SUMS_8(32), GNA_SUMS_8(40)
#define GNA_SUMS_64 GNA_SUMS_48, GNA_SUMS_8(48), GNA_SUMS_8(56)
#define GNA_SUMS_128                                                                         \
  GNA_SUMS_64, GNA_SUMS_8(64), GNA_SUMS_8(72), GNA_SUMS_8(80), GNA_SUMS_8(88), GNA_SUMS_8(96), \
      GNA_SUMS_8(104), GNA_SUMS_8(112), GNA_SUMS_8(120)

#define GNA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GNA_NAMES_32 \
  GNA_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GNA_NAMES_48 \
  GNA_NAMES_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define GNA_NAMES_64 \
  GNA_NAMES_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GNA_NAMES_128                                                                              \
  GNA_NAMES_64                                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "   \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "     \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "     \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// kN, kN / 2, and the numbers from kN / 2 on, which name the other operands.
#define GNA_PRODUCTS(n, half, o0, o1, o2, o3, o4, o5, name, T)                                    \
  __device__ __forceinline__ void multiply(float (&x)[half], uint64_t a, uint64_t b, bool add,    \
                                           T) {                                                   \
    asm volatile(                                                                                 \
        "{ .reg .pred add; setp.ne.b32 add, %" #o2 ", 0; "                                        \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" GNA_NAMES_##half    \
        "}, %" #o0 ", %" #o1 ", add, 1, 1, 0, 0; }"                                               \
        : GNA_SUMS_##half                                                                         \
        : "l"(a), "l"(b), "r"(int{add}));                                                         \
  }                                                                                               \
  __device__ __forceinline__ void multiply(float (&x)[half], const uint32_t (&a)[4], uint64_t b,  \
                                           bool add, T) {                                         \
    asm volatile(                                                                                 \
        "{ .reg .pred add; setp.ne.b32 add, %" #o5 ", 0; "                                        \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" GNA_NAMES_##half    \
        "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", add, 1, 1, 1; }"                  \
        : GNA_SUMS_##half                                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{add}));                     \
  }
#define GNA_PRODUCTS_OF(name, T)                                          \
  GNA_PRODUCTS(32, 16, 16, 17, 18, 19, 20, 21, name, T)                   \
  GNA_PRODUCTS(64, 32, 32, 33, 34, 35, 36, 37, name, T)                   \
  GNA_PRODUCTS(96, 48, 48, 49, 50, 51, 52, 53, name, T)                   \
  GNA_PRODUCTS(128, 64, 64, 65, 66, 67, 68, 69, name, T)                  \
  GNA_PRODUCTS(256, 128, 128, 129, 130, 131, 132, 133, name, T)

namespace gna {

GNA_PRODUCTS_OF("bf16", BFloat16)
GNA_PRODUCTS_OF("f16", Float16)

}  // namespace gna
