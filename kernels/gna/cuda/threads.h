// Work shared out over XLA's thread pool.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>

#include "xla/ffi/api/ffi.h"

namespace gna {

// Hands out the numbers below a limit, each once.
class Counter {
 public:
  explicit Counter(int64_t limit) : limit_(limit) {}
  bool next(int64_t& i) { return (i = next_.fetch_add(1, std::memory_order_relaxed)) < limit_; }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t limit_;
};

// Runs work(counter) on the calling thread and on those of the pool that are free; returns when all
// numbers below `tasks` are done, false if memory ran out. The caller only waits for threads that
// are at work: a pool whose threads are all busy, or all waiting here, stops nobody.
template <typename Work>
bool parallel(xla::ffi::ThreadPool& pool, int64_t tasks, const Work& work) {
  struct State {
    explicit State(int64_t tasks) : counter(tasks) {}
    Counter counter;
    std::mutex mutex;
    std::condition_variable idle;
    int running = 0;
    bool closed = false, failed = false;
  };
  auto state = std::make_shared<State>(tasks);
  auto run = [](State& state, const Work& work) {
    try {
      work(state.counter);
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  };
  const int64_t threads = pool.num_threads() < tasks ? pool.num_threads() : tasks;
  for (int64_t n = 1; n < threads; ++n) {
    pool.Schedule([state, run, &work] {
      {
        std::lock_guard<std::mutex> lock(state->mutex);
        if (state->closed) return;  // `work` may be gone
        ++state->running;
      }
      const bool good = run(*state, work);
      std::lock_guard<std::mutex> lock(state->mutex);
      state->failed |= !good;
      if (--state->running == 0) state->idle.notify_one();
    });
  }
  const bool good = run(*state, work);
  std::unique_lock<std::mutex> lock(state->mutex);
  state->closed = true;
  state->idle.wait(lock, [&] { return state->running == 0; });
  return good && !state->failed;
}

}  // namespace gna
