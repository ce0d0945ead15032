// Threads of the native kernels: single program, multiple data.
//
// parallel(fn) runs fn(team) once on every thread of a team; a kernel takes its share of the work from team.rank and
// team.size, and team.barrier() separates dependent kernels. A whole decoder step is one parallel(), so threads are woken
// once a step, not once an op.
//
// The threads are those of the OpenMP runtime that torch has loaded, found by name at run time: after each of its own
// ops torch's threads spin for milliseconds in wait of the next one, and a second pool on the same cores would run
// against them. Where no such runtime is (or in a forked child, whose runtime has lost its threads) a pool of our own does it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace dschat {

struct Range {
  int64_t begin, end;
};

// Spins for about as long as threads of a quiet machine wait for each other, then sleeps: the thread that is late may
// need the core. (Yielding instead would hand a whole time slice to any other program, at every barrier.)
class Barrier {
 public:
  void wait(int size);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> phase_{0};
  std::atomic<int> sleepers_{0};
};

struct Team {
  int rank;
  int size;
  Barrier* shared_barrier;

  void barrier() const {
    if (size > 1) shared_barrier->wait(size);
  }
  // This thread's contiguous share of n items, cut at multiples of grain.
  Range range(int64_t n, int64_t grain = 1) const {
    int64_t blocks = (n + grain - 1) / grain;
    int64_t b = blocks * rank / size * grain, e = blocks * (rank + 1) / size * grain;
    return {b < n ? b : n, e < n ? e : n};
  }
};

// Runs fn on num_threads() threads, the caller being rank 0; fn must work for a smaller team too. Calls from several
// Python threads take turns. The first exception thrown by rank 0 is passed on; other ranks must not throw.
void parallel(const std::function<void(const Team&)>& fn);

// 1 <= n <= 256, else std::invalid_argument; 0: as many as torch uses, or one a core.
void set_num_threads(int n);
int num_threads();

// Whether torch's OpenMP threads are used; use_openmp(false) and (true) switch, where there are any.
bool uses_openmp();
void use_openmp(bool yes);

}  // namespace dschat
