// The threads that run a pass, and how they share and wait.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>

#ifdef DASH_CHECKED
#include <thread>
#include <vector>
#else
// OpenMP as libraries have it, so that neither the compiler nor the system has to bring one.
extern "C" {
void GOMP_parallel(void (*work)(void *), void *shared, unsigned num_threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}
#endif

#ifdef __x86_64__
#include <immintrin.h>
#endif

// Waits for what comes within microseconds, and gives the processor away if it does not: on a busy machine it may be
// the one that the other thread needs.
class Spin {
 public:
  void turn() {
    if (++turns_ > kSpins) {
      sched_yield();
      return;
    }
#ifdef __x86_64__
    _mm_pause();
#endif
  }

 private:
  static constexpr int64_t kSpins = 2000;
  int64_t turns_ = 0;
};

// Work for a thread that waits.
class Idle {
 public:
  virtual bool work() = 0;  // does a part; returns false if there is none now
};

// All threads wait here for the last one.
class Barrier {
 public:
  void wait(int64_t num_threads, Idle *idle) {
    if (num_threads == 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == num_threads - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    Spin spin;
    while (round_.load(std::memory_order_acquire) == round)
      if (!idle || !idle->work()) spin.turn();
  }

 private:
  alignas(64) std::atomic<int64_t> waiting_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

// Calls `work` in so many threads at most, with each one's number and how many there are.
template <class Work>
void in_threads(int64_t num_threads, Work work) {
#ifdef DASH_CHECKED
  // The thread sanitizer knows nothing of how OpenMP's threads wait for each other.
  std::vector<std::thread> others;
  for (int64_t index = 1; index < num_threads; ++index) others.emplace_back(work, index, num_threads);
  work(int64_t{0}, num_threads);
  for (std::thread &other : others) other.join();
#else
  const auto in_thread = [](void *shared) {
    (*static_cast<Work *>(shared))(int64_t{omp_get_thread_num()}, int64_t{omp_get_num_threads()});
  };
  GOMP_parallel(in_thread, &work, static_cast<unsigned>(num_threads), 0);
#endif
}

struct Member {
  Barrier *barrier;
  int64_t index, num_threads;
  Idle *idle = nullptr;

  void wait() const { barrier->wait(num_threads, idle); }
  int64_t first(int64_t count) const { return count * index / num_threads; }
  int64_t last(int64_t count) const { return count * (index + 1) / num_threads; }
};
