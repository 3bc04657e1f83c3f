// The GPU target of the custom calls, for 16-bit operands on NVIDIA GPUs from sm_80.
//
// The operands stay in the layout of the call: nothing is permuted before or after, and tiles of keys
// need no grid. On sm_90a boxes of tokens are copied at a time (hopper/); elsewhere, and where boxes
// do not say what a tile meets, copies of 16 bytes gather its rows from wherever they lie.

#include <atomic>

#include "backward.h"
#include "bindings.h"
#include "forward.h"
#include "hopper/backward.h"
#include "hopper/forward.h"
#include "problem.h"

namespace gna {
namespace {

template <typename T>
Operand<const T> in(const ffi::AnyBuffer& x, const ffi::AnyBuffer* more = nullptr) {
  const auto dims = x.dimensions();
  return {static_cast<const T*>(x.untyped_data()),
          more ? static_cast<const T*>(more->untyped_data()) : nullptr,
          static_cast<int>(dims[dims.size() - 2]), static_cast<int>(dims.back())};
}

template <typename T>
Operand<T> out(ffi::Result<ffi::AnyBuffer>& x, ffi::Result<ffi::AnyBuffer>* more = nullptr) {
  const auto dims = x->dimensions();
  return {static_cast<T*>(x->untyped_data()),
          more ? static_cast<T*>((*more)->untyped_data()) : nullptr,
          static_cast<int>(dims[dims.size() - 2]), static_cast<int>(dims.back())};
}

ffi::Error result(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("gna: ") + cudaGetErrorString(error));
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls run(T{}, Constant<kD>{}) for the operands' type and the size that holds their rows.
template <typename Run>
ffi::Error dispatch(const Problem& p, ffi::DataType type, const Run& run) {
  auto typed = [&](auto number) {
    const int dim = p.dim > p.value_dim ? p.dim : p.value_dim;
    if (p.dim % 8 || p.value_dim % 8 || dim > 128) {
      return ffi::Error::InvalidArgument("gna: head dimensions must be multiples of 8 up to 128");
    }
    if (dim <= 32) return result(run(number, Constant<32>{}));
    if (dim <= 64) return result(run(number, Constant<64>{}));
    return result(run(number, Constant<128>{}));
  };
  if (type == ffi::DataType::BF16) return typed(BFloat16{});
  if (type == ffi::DataType::F16) return typed(Float16{});
  return ffi::Error::InvalidArgument("gna: operands must be of 16-bit floats");
}

ffi::Error run_forward(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                       ffi::AnyBuffer ak, ffi::AnyBuffer av, ffi::Result<ffi::AnyBuffer> output,
                       ffi::ResultBuffer<ffi::F32> lse, ffi::Span<const int64_t> windows,
                       ffi::Span<const int64_t> tiles, float scale) {
  Problem p;
  ffi::Error error = decode(p, q, v, ak, windows, tiles, scale);
  if (error.failure()) return error;
  if (boxes_do(p)) {
    error = set_tile(p, tiles, kHopperForward, kMostRows);
    if (error.failure()) return error;
    return dispatch(p, q.element_type(), [&](auto number, auto dim) {
      using T = decltype(number);
      constexpr int kD = decltype(dim)::value;
      return launch_hopper_forward<T, (kD > kPanel ? 128 : kPanel)>(
          p, TileShape(tiles, kHopperForward + 1).size, in<T>(q), in<T>(k, &ak), in<T>(v, &av),
          out<T>(output), lse->typed_data(), stream);
    });
  }
  error = set_tile(p, tiles, kForwardTile, kMostRows);
  if (error.failure()) return error;
  return dispatch(p, q.element_type(), [&](auto number, auto dim) {
    using T = decltype(number);
    constexpr int kD = decltype(dim)::value;
    const ForwardArguments<T> a{p,           layout_tiles(p), in<T>(q),         in<T>(k, &ak),
                                in<T>(v, &av), out<T>(output),  lse->typed_data()};
    return launch(forward_kernel<T, kD>, int64_t{a.tiles} * p.heads * p.batch, kThreads,
                  Forward<kD>::kShared, stream, a);
  });
}

ffi::Error run_backward(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                        ffi::AnyBuffer ak, ffi::AnyBuffer av, ffi::Buffer<ffi::F32> lse,
                        ffi::AnyBuffer d_output, ffi::Buffer<ffi::F32> delta,
                        ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                        ffi::Result<ffi::AnyBuffer> dv, ffi::Result<ffi::AnyBuffer> dak,
                        ffi::Result<ffi::AnyBuffer> dav, ffi::Span<const int64_t> windows,
                        ffi::Span<const int64_t> tiles, float scale) {
  Problem by_query;
  ffi::Error error = decode(by_query, q, v, ak, windows, tiles, scale);
  Problem by_key = by_query;
  if (error.success() && boxes_do(by_query)) {
    return dispatch(by_query, q.element_type(), [&](auto number, auto dim) {
      using T = decltype(number);
      constexpr int kD = decltype(dim)::value > kPanel ? 128 : kPanel;
      constexpr int kKeyTile =
          HopperBackward<kD, true>::kColumns == 64 ? kHopperKeys : kHopperKeysWide;
      const TileShape query_tile(tiles, kHopperForward), key_tile(tiles, kKeyTile);
      for (int m = 0; m < 3; ++m) {
        by_query.axis[m].tile = query_tile.size[m];
        by_key.axis[m].tile = key_tile.size[m];
      }
      const float *norms = lse.typed_data(), *shifts = delta.typed_data();
      const cudaError_t failed = launch_hopper_gradients<T, kD, false>(
          by_query, TileShape(tiles, kHopperForward + 1).size,
          Pairs<T>{in<T>(q), in<T>(d_output), in<T>(k, &ak), in<T>(v, &av), out<T>(dq), {}, norms,
                   shifts},
          stream);
      if (failed != cudaSuccess) return failed;
      return launch_hopper_gradients<T, kD, true>(
          by_key, TileShape(tiles, kKeyTile + 1).size,
          Pairs<T>{in<T>(k, &ak), in<T>(v, &av), in<T>(q), in<T>(d_output), out<T>(dk, &dak),
                   out<T>(dv, &dav), norms, shifts},
          stream);
    });
  }
  if (error.success()) error = set_tile(by_query, tiles, kQueryTile, Backward<128>::kRows);
  if (error.success()) error = set_tile(by_key, tiles, kKeyTile, Backward<128>::kRows);
  if (error.failure()) return error;
  return dispatch(by_query, q.element_type(), [&](auto number, auto dim) {
    using T = decltype(number);
    constexpr int kD = decltype(dim)::value;
    using Shape = Backward<kD>;
    const int key_tiles = layout_tiles(by_key) + ceil_div(by_key.additional, Shape::kRows);
    const float *norms = lse.typed_data(), *shifts = delta.typed_data();
    const BackwardArguments<T> queries{
        by_query,      layout_tiles(by_query), in<T>(q),   in<T>(d_output),
        in<T>(k, &ak), in<T>(v, &av),          out<T>(dq), {},
        norms,         shifts};
    const BackwardArguments<T> keys{
        by_key,   key_tiles,       in<T>(k, &ak),    in<T>(v, &av),
        in<T>(q), in<T>(d_output), out<T>(dk, &dak), out<T>(dv, &dav),
        norms,    shifts};
    const int64_t batch = by_query.batch;
    const cudaError_t failed =
        launch(backward_kernel<T, kD, false>, batch * by_query.heads * queries.tiles, kThreads,
               Shape::kShared, stream, queries);
    if (failed != cudaSuccess) return failed;
    return launch(backward_kernel<T, kD, true>, batch * by_key.kv_heads * key_tiles, kThreads,
                  Shape::kShared, stream, keys);
  });
}

template <typename T, int kD>
cudaError_t load_kernels() {
  constexpr int kBoxed = kD > kPanel ? 128 : kPanel;
  cudaError_t error = cudaSuccess;
  const auto add = [&](auto kernel) {
    if (error == cudaSuccess) error = load(kernel);
  };
  add(forward_kernel<T, kD>);
  add(backward_kernel<T, kD, false>);
  add(backward_kernel<T, kD, true>);
  if (error != cudaSuccess || !has_boxes()) return error;
  add(hopper_forward<T, kBoxed>);
  add(hopper_backward<T, kBoxed, false>);
  add(hopper_backward<T, kBoxed, true>);
  return error;
}

// Loads the kernels onto a device, once: later it may happen while a graph of calls is recorded.
ffi::Error initialize() {
  static std::atomic<uint64_t> loaded{0};
  const uint64_t device = uint64_t{1} << current_device() % 64;
  if (loaded & device) return ffi::Error::Success();
  cudaError_t error = cudaSuccess;
  const auto add = [&](auto number) {
    using T = decltype(number);
    if (error == cudaSuccess) error = load_kernels<T, 32>();
    if (error == cudaSuccess) error = load_kernels<T, 64>();
    if (error == cudaSuccess) error = load_kernels<T, 128>();
  };
  add(BFloat16{});
  add(Float16{});
  if (error == cudaSuccess) loaded |= device;
  return result(error);
}

}  // namespace
}  // namespace gna

GNA_DEFINE_HANDLERS(xla::ffi::PlatformStream<cudaStream_t>,
                    xla::ffi::Traits::kCmdBufferCompatible);

XLA_FFI_DEFINE_HANDLER_SYMBOL(GnaInitialize, gna::initialize, xla::ffi::Ffi::BindInitialize());
