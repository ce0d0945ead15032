#include "parallel.h"

#include <algorithm>
#include <climits>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dschat {
namespace {

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About 50 us of polling: longer than any barrier inside a step on a quiet machine.
constexpr int kSpins = 2000;

// Sleeps until woken if `value` still is `expected`; may return early.
inline void sleep_while(const std::atomic<uint32_t>& value, uint32_t expected) {
#if defined(__linux__)
  syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
#else
  (void)value, (void)expected;
  std::this_thread::yield();
#endif
}

inline void wake_all(const std::atomic<uint32_t>& value) {
#if defined(__linux__)
  syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)value;
#endif
}

// The OpenMP runtime in the process, by the entry points that GCC's and LLVM's both have.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*team_size)() = nullptr;
  int (*max_threads)() = nullptr;

  static OpenMP find() {
    OpenMP omp;
#if !defined(_WIN32)
    const auto look = [](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
      return function != nullptr;
    };
    if (!look(omp.thread_num, "omp_get_thread_num") || !look(omp.team_size, "omp_get_num_threads") ||
        !look(omp.max_threads, "omp_get_max_threads") || !look(omp.parallel, "GOMP_parallel"))
      omp.parallel = nullptr;
#endif
    return omp;
  }
};

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;  // never destroyed: worker threads outlive static destructors
    return *pool;
  }

  void run(const std::function<void(const Team&)>& fn) {
    std::lock_guard<std::mutex> turn(turn_);
    const int threads = size();
    if (threads == 1) fn(Team{0, 1, &barrier_});
    else if (uses_openmp()) run_openmp(fn, threads);
    else run_own(fn, threads);
  }

  void resize(int n) {
    if (n < 0 || n > 256)
      throw std::invalid_argument("num_threads is " + std::to_string(n) + ": give a number from 1 to 256, or 0.");
    std::lock_guard<std::mutex> turn(turn_);
    size_.store(n, std::memory_order_relaxed);
  }

  int size() const {
    if (const int set = size_.load(std::memory_order_relaxed)) return set;
    return uses_openmp() ? omp_.max_threads() : int(std::max(1u, std::thread::hardware_concurrency()));
  }

  bool uses_openmp() const { return omp_.parallel && allow_openmp_.load(std::memory_order_relaxed); }

  void use_openmp(bool yes) {
    std::lock_guard<std::mutex> turn(turn_);
    allow_openmp_.store(yes, std::memory_order_relaxed);
  }

 private:
  void run_openmp(const std::function<void(const Team&)>& fn, int threads) {
    struct Job {
      const std::function<void(const Team&)>& fn;
      const OpenMP& omp;
      Barrier& barrier;
      std::exception_ptr error;
    } job{fn, omp_, barrier_, nullptr};
    const auto body = [](void* data) {
      Job& j = *static_cast<Job*>(data);
      const Team team{j.omp.thread_num(), j.omp.team_size(), &j.barrier};
      if (team.rank != 0) return j.fn(team);
      try {  // no exception may cross the runtime's frames
        j.fn(team);
      } catch (...) {
        j.error = std::current_exception();
      }
    };
    omp_.parallel(body, &job, unsigned(threads), 0);
    if (job.error) std::rethrow_exception(job.error);
  }

  void run_own(const std::function<void(const Team&)>& fn, int size) {
    Team team{0, size, &barrier_};
    grow(size);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &fn;
      job_size_ = size;
      pending_.store(size - 1, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    std::exception_ptr error;
    try {
      fn(team);
    } catch (...) {
      error = std::current_exception();
    }
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpins) pause_cpu();
      else std::this_thread::yield();
    }
    if (error) std::rethrow_exception(error);
  }

  Pool() {
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { Pool::get().after_fork(); });
#endif
  }

  void after_fork() {
    // Neither these threads nor the runtime's exist here; forgetting them without join is the only safe thing to do.
    allow_openmp_.store(false, std::memory_order_relaxed);
    new (&workers_) std::vector<std::thread>();
    new (&mutex_) std::mutex();
    new (&turn_) std::mutex();
    new (&wake_) std::condition_variable();
    pending_.store(0, std::memory_order_relaxed);
  }

  void grow(int size) {
    while (int(workers_.size()) < size - 1) {
      int rank = int(workers_.size()) + 1;
      uint64_t seen = generation_.load(std::memory_order_relaxed);
      workers_.emplace_back([this, rank, seen] { work(rank, seen); });
      workers_.back().detach();
    }
  }

  void work(int rank, uint64_t seen) {
    for (;;) {
      // Decode steps follow each other within microseconds: poll for a moment before going to sleep.
      for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) pause_cpu();
      const std::function<void(const Team&)>* job;
      int size;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        job = job_;
        size = job_size_;
      }
      if (rank >= size) continue;  // the team is smaller than the pool now
      (*job)(Team{rank, size, &barrier_});
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex turn_;   // one parallel region at a time
  std::mutex mutex_;  // guards job_, job_size_ and the generation's change
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  const std::function<void(const Team&)>* job_ = nullptr;
  int job_size_ = 1;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<int> size_{0};
  const OpenMP omp_ = OpenMP::find();
  std::atomic<bool> allow_openmp_{true};
  Barrier barrier_;
};

}  // namespace

void Barrier::wait(int size) {
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1);  // sequentially consistent with sleepers_: either a sleeper is seen or it sees the phase
    if (sleepers_.load() != 0) wake_all(phase_);
    return;
  }
  for (int spins = 0; spins < kSpins; ++spins) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
    pause_cpu();
  }
  sleepers_.fetch_add(1);
  while (phase_.load() == phase) sleep_while(phase_, phase);
  sleepers_.fetch_sub(1);
}

void parallel(const std::function<void(const Team&)>& fn) { Pool::get().run(fn); }
void set_num_threads(int n) { Pool::get().resize(n); }
int num_threads() { return Pool::get().size(); }
bool uses_openmp() { return Pool::get().uses_openmp(); }
void use_openmp(bool yes) { Pool::get().use_openmp(yes); }

}  // namespace dschat
