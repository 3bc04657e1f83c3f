// NATTEN's forward kernel for Hopper as a custom call, to measure beside: `gpu_prepare.sh` compiles it
// with the sources of NATTEN's own distribution.  2-D in tiles of 16x8 and 3-D in tiles of 2x8x8,
// bfloat16, heads of 128, not causal; operands are permuted to tiles, as `_natten.py` does.

#include <iostream>
#include <string>

#include "natten/cuda/fna_hopper/fna_forward.cuh"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using natten::cuda::hopper::HopperKernelSchedule;
using Integers = ffi::Span<const int64_t>;
using cute::Int;

using cute::false_type;

// By rank: sizes known as it runs, and no causal dimension.
template <int kRank>
struct Rank;
template <>
struct Rank<2> {
  using Causal = cute::tuple<false_type, false_type>;
  static auto read(const int64_t* x) { return cute::make_tuple(int(x[0]), int(x[1])); }
};
template <>
struct Rank<3> {
  using Causal = cute::tuple<false_type, false_type, false_type>;
  static auto read(const int64_t* x) {
    return cute::make_tuple(int(x[0]), int(x[1]), int(x[2]));
  }
};

template <class Tile, HopperKernelSchedule kSchedule>
ffi::Error run(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
               ffi::Result<ffi::AnyBuffer>& output, ffi::ResultBuffer<ffi::F32>& lse,
               const int64_t* sizes, float scale) {
  constexpr int kRank = decltype(cute::rank(Tile{}))::value;
  using Kernel = natten::cuda::fna_hopper::KernelForward<
      cutlass::bfloat16_t, typename Rank<kRank>::Causal, Tile, Tile,
      cute::tuple<Int<128>, Int<128>, Int<128>>, kSchedule>;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return ffi::Error::Internal(cudaGetErrorString(error));
  const auto dims = q.dimensions();  // [B, tokens, heads, 128]
  const int tokens = static_cast<int>(dims[1]);
  auto sized = [&](int place) { return Rank<kRank>::read(sizes + place * kRank); };
  Kernel kernel;
  const auto arguments = kernel.initialize(
      q.untyped_data(), k.untyped_data(), v.untyped_data(), output->untyped_data(),
      lse->untyped_data(), static_cast<int>(dims[0]), tokens, tokens, static_cast<int>(dims[2]),
      128, sized(0), sized(0), sized(1), sized(2), sized(3), sized(4), device, scale);
  if (kernel.get_workspace_size(arguments) > 0) return ffi::Error::Internal("workspace is needed");
  auto status = kernel.op.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = kernel.op.run(arguments, nullptr, stream);
  if (status == cutlass::Status::kSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("NATTEN: ") + cutlass::cutlassGetStatusString(status));
}

// `sizes`: padded layout, layout, window, stride and dilation, one number a dimension each.
ffi::Error forward(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                   ffi::Result<ffi::AnyBuffer> output, ffi::ResultBuffer<ffi::F32> lse,
                   Integers sizes, bool pingpong, float scale) {
  using Square = cute::tuple<Int<16>, Int<8>>;
  using Box = cute::tuple<Int<2>, Int<8>, Int<8>>;
  constexpr auto kCooperative = HopperKernelSchedule::WSCooperative;
  constexpr auto kPingpong = HopperKernelSchedule::WSPingpong;
  if (q.element_type() != ffi::DataType::BF16 || q.dimensions().back() != 128 ||
      (sizes.size() != 10 && sizes.size() != 15)) {
    return ffi::Error::InvalidArgument("2-D or 3-D, bfloat16 and heads of 128");
  }
  const auto call = sizes.size() == 10
                        ? (pingpong ? run<Square, kPingpong> : run<Square, kCooperative>)
                        : (pingpong ? run<Box, kPingpong> : run<Box, kCooperative>);
  return call(stream, q, k, v, output, lse, sizes.begin(), scale);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NattenForward, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<Integers>("sizes")
                                  .Attr<bool>("pingpong")
                                  .Attr<float>("scale"),
                              {ffi::Traits::kCmdBufferCompatible});
