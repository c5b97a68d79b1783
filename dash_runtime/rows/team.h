// The threads that run a pass, and how they share and wait.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>
#endif

// Where all threads wait for the last one. They spin, since it comes within microseconds, and give their processor away
// if it does not: on a busy machine it may be the one that the last thread needs.
class Barrier {
 public:
  void wait(int64_t num_threads) {
    if (num_threads == 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == num_threads - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
#ifdef __x86_64__
        _mm_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int64_t kSpins = 2000;
  alignas(64) std::atomic<int64_t> waiting_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

struct Member {
  Barrier *barrier;
  int64_t index, num_threads;

  void wait() const { barrier->wait(num_threads); }
  int64_t first(int64_t count) const { return count * index / num_threads; }
  int64_t last(int64_t count) const { return count * (index + 1) / num_threads; }
};
