// The custom calls and their signatures, the same for all targets but for what a target runs on.
#pragma once

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace gna {

using AnyArray = xla::ffi::AnyBuffer;
using FloatArray = xla::ffi::Buffer<xla::ffi::F32>;
using Integers = xla::ffi::Span<const int64_t>;

}  // namespace gna

// Defines `GnaForward` and `GnaBackward` from `run_forward` and `run_backward`; after the context
// that they are given may come their traits.
#define GNA_DEFINE_HANDLERS(Context, ...)                                                         \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                  \
      GnaForward, gna::run_forward,                                                               \
      xla::ffi::Ffi::Bind()                                                                       \
          .Ctx<Context>()                                                                         \
          .Arg<gna::AnyArray>().Arg<gna::AnyArray>().Arg<gna::AnyArray>() /* q, k, v */           \
          .Arg<gna::AnyArray>().Arg<gna::AnyArray>() /* ak, av */                                 \
          .Ret<gna::AnyArray>().Ret<gna::FloatArray>() /* output, lse */                          \
          .Attr<gna::Integers>("windows")                                                         \
          .Attr<gna::Integers>("tiles")                                                           \
          .Attr<float>("scale"),                                                                  \
      {__VA_ARGS__});                                                                             \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                  \
      GnaBackward, gna::run_backward,                                                             \
      xla::ffi::Ffi::Bind()                                                                       \
          .Ctx<Context>()                                                                         \
          .Arg<gna::AnyArray>().Arg<gna::AnyArray>().Arg<gna::AnyArray>() /* q, k, v */           \
          .Arg<gna::AnyArray>().Arg<gna::AnyArray>() /* ak, av */                                 \
          .Arg<gna::FloatArray>() /* lse */                                                       \
          .Arg<gna::AnyArray>().Arg<gna::FloatArray>() /* d_output, delta */                      \
          .Ret<gna::AnyArray>().Ret<gna::AnyArray>().Ret<gna::AnyArray>() /* dq, dk, dv */        \
          .Ret<gna::AnyArray>().Ret<gna::AnyArray>() /* dak, dav */                               \
          .Attr<gna::Integers>("windows")                                                         \
          .Attr<gna::Integers>("tiles")                                                           \
          .Attr<float>("scale"),                                                                  \
      {__VA_ARGS__})
