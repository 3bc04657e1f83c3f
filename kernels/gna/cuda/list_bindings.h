// The custom calls for listed blocks and their signatures, as `bindings.h` has those for windows.
#pragma once

#include "bindings.h"

namespace gna {

using IntArray = xla::ffi::Buffer<xla::ffi::S32>;

}  // namespace gna

// Defines `GnaListsForward` and `GnaListsBackward` from `run_lists_forward` and
// `run_lists_backward`: the same with lists of blocks, and no windows.
#define GNA_DEFINE_LIST_HANDLERS(Context)                                                         \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                  \
      GnaListsForward, gna::run_lists_forward,                                                    \
      xla::ffi::Ffi::Bind()                                                                       \
          .Ctx<Context>()                                                                         \
          .Arg<gna::AnyArray>().Arg<gna::AnyArray>().Arg<gna::AnyArray>() /* q, k, v */           \
          .Arg<gna::AnyArray>().Arg<gna::AnyArray>() /* ak, av */                                 \
          .Arg<gna::IntArray>().Arg<gna::IntArray>() /* blocks, counts */                         \
          .Ret<gna::AnyArray>().Ret<gna::FloatArray>() /* output, lse */                          \
          .Attr<gna::Integers>("sizes")                                                           \
          .Attr<float>("scale"));                                                                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                  \
      GnaListsBackward, gna::run_lists_backward,                                                  \
      xla::ffi::Ffi::Bind()                                                                       \
          .Ctx<Context>()                                                                         \
          .Arg<gna::AnyArray>().Arg<gna::AnyArray>().Arg<gna::AnyArray>() /* q, k, v */           \
          .Arg<gna::AnyArray>().Arg<gna::AnyArray>() /* ak, av */                                 \
          .Arg<gna::IntArray>().Arg<gna::IntArray>() /* blocks, counts */                         \
          .Arg<gna::FloatArray>() /* lse */                                                       \
          .Arg<gna::AnyArray>().Arg<gna::FloatArray>() /* d_output, delta */                      \
          .Ret<gna::AnyArray>().Ret<gna::AnyArray>().Ret<gna::AnyArray>() /* dq, dk, dv */        \
          .Ret<gna::AnyArray>().Ret<gna::AnyArray>() /* dak, dav */                               \
          .Attr<gna::Integers>("sizes")                                                           \
          .Attr<float>("scale"))
