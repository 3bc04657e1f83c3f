// The GPU target on the emulators of its machines, and the kernels of kernels/gna/cuda/hopper called
// with plain arrays.

#include "gna_gpu.cu"

namespace gna {
namespace {

// A problem in integers: batch, heads, key heads, dimension, that of values, additional keys; then
// of each of three dimensions its `Axis`.
Problem problem_of(const int* n, float scale) {
  Problem p{n[0], n[1], n[2], n[3], n[4], n[5], 1, scale, {}};
  for (int m = 0; m < 3; ++m) {
    const int* a = n + 6 + 6 * m;
    p.axis[m] = {a[0], a[1], a[2], a[3], a[4], a[5]};
    p.tokens *= a[0];
  }
  return p;
}

template <typename T>
Operand<T> operand(void* const* arrays, int at, int more, int heads, int dim) {
  return {static_cast<T*>(arrays[at]), more ? static_cast<T*>(arrays[more]) : nullptr, heads, dim};
}

template <typename T, int kD>
cudaError_t forward(const Problem& p, const int* box, void* const* arrays) {
  return launch_hopper_forward<T, kD>(
      p, {box[0], box[1], box[2]}, operand<const T>(arrays, 0, 0, p.heads, p.dim),
      operand<const T>(arrays, 1, 3, p.kv_heads, p.dim),
      operand<const T>(arrays, 2, 4, p.kv_heads, p.value_dim),
      operand<T>(arrays, 5, 0, p.heads, p.value_dim), static_cast<float*>(arrays[6]), nullptr);
}

template <typename T, int kD>
cudaError_t backward(const Problem& by_query, const int* keys, const Problem& by_key,
                     const int* queries, void* const* arrays) {
  const Problem& p = by_query;
  const auto q = operand<const T>(arrays, 0, 0, p.heads, p.dim);
  const auto k = operand<const T>(arrays, 1, 3, p.kv_heads, p.dim);
  const auto v = operand<const T>(arrays, 2, 4, p.kv_heads, p.value_dim);
  const auto d_output = operand<const T>(arrays, 5, 0, p.heads, p.value_dim);
  const auto *lse = static_cast<float*>(arrays[6]), *delta = static_cast<float*>(arrays[7]);
  const cudaError_t error = arrays[8] == nullptr ? cudaSuccess : launch_hopper_gradients<T, kD, false>(
      by_query, {keys[0], keys[1], keys[2]},
      Pairs<T>{q, d_output, k, v, operand<T>(arrays, 8, 0, p.heads, p.dim), {}, lse, delta},
      nullptr);
  if (error != cudaSuccess) return error;
  return launch_hopper_gradients<T, kD, true>(
      by_key, {queries[0], queries[1], queries[2]},
      Pairs<T>{k, v, q, d_output, operand<T>(arrays, 9, 11, p.kv_heads, p.dim),
               operand<T>(arrays, 10, 12, p.kv_heads, p.value_dim), lse, delta},
      nullptr);
}

}  // namespace
}  // namespace gna

// Why the call failed, or null. `arrays` are query, key, value, additional keys and values, output,
// log-sum-exp.
extern "C" const char* hopper_forward(const int* problem, float scale, bool bfloat, int dim,
                                      const int* box, void* const* arrays) {
  using namespace gna;
  const Problem p = problem_of(problem, scale);
  const auto run = [&](auto number) {
    using T = decltype(number);
    if (dim <= 64) return forward<T, 64>(p, box, arrays);
    return forward<T, 128>(p, box, arrays);
  };
  const cudaError_t error = bfloat ? run(BFloat16{}) : run(Float16{});
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Likewise; `arrays` are query, key, value, additional keys and values, the output's cotangent,
// log-sum-exp and delta, then the gradients of the first five; without the query's, if that is null.
extern "C" const char* hopper_backward(const int* by_query, const int* keys, const int* by_key,
                                       const int* queries, float scale, bool bfloat, int dim,
                                       void* const* arrays) {
  using namespace gna;
  const Problem one = problem_of(by_query, scale), other = problem_of(by_key, scale);
  const auto run = [&](auto number) {
    using T = decltype(number);
    if (dim <= 64) return backward<T, 64>(one, keys, other, queries, arrays);
    return backward<T, 128>(one, keys, other, queries, arrays);
  };
  const cudaError_t error = bfloat ? run(BFloat16{}) : run(Float16{});
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether the custom calls find a machine for the kernels.
extern "C" void hopper_is_here(bool here) { emulator::hopper_is_here() = here; }

// Begins from a seed, and spoils an instruction: nothing where `change` is 0.
extern "C" void hopper_begin(unsigned seed, const char* what, const char* file, int line,
                             int change) {
  emulator::machine().random.seed(seed);
  emulator::hopper().spoiled = {what, file, line, change};
}

// The sites met since the last call, a line each: instruction, file, line.
extern "C" const char* hopper_sites(bool collect) {
  static std::string text;
  text.clear();
  for (const auto& [what, file, line] : emulator::hopper().sites) {
    text += what + ' ' + file + ' ' + std::to_string(line) + '\n';
  }
  emulator::hopper().sites.clear();
  emulator::hopper().collects = collect;
  return text.c_str();
}
