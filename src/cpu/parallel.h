// Threads of the CPU backend: one loop over numbered tasks, each worker with scratch of its own.
#ifndef FLEXPREFILL_SRC_CPU_PARALLEL_H_
#define FLEXPREFILL_SRC_CPU_PARALLEL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/info.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/partitioner.h>
#include <oneapi/tbb/task_arena.h>

#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

#include "flexprefill/types.h"

namespace flexprefill {

// Workers of a call: as many as asked for, or as TBB's default, within what it allows the process
// (beyond that it would run fewer and print a warning).
inline int worker_count(const Execution& execution) {
  namespace tbb = oneapi::tbb;
  const int wanted =
      execution.num_threads > 0 ? execution.num_threads : tbb::info::default_concurrency();
  const size_t allowed =
      tbb::global_control::active_value(tbb::global_control::max_allowed_parallelism);
  return allowed < static_cast<size_t>(wanted) ? static_cast<int>(allowed) : wanted;
}

// Runs task(worker, t) for t = 0 .. n_tasks - 1, begun in this order; the next free worker takes
// the next task. worker is below `workers`, and no two tasks run as one worker at a time.
template <typename Task>
void parallel_tasks(int workers, int64_t n_tasks, const Task& task) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t t = next++; t < n_tasks; t = next++) task(worker, t);
  };
  if (workers == 1 || n_tasks <= 1) return work(0);
#ifdef __SANITIZE_THREAD__
  // oneTBB's library is not instrumented, so its handing over of work looks like a race, and
  // suppressing that would hide races of the tasks. Theirs show on plain threads just as well.
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker) threads.emplace_back(work, worker);
  for (std::thread& thread : threads) thread.join();
#else
  oneapi::tbb::task_arena arena(workers);
  arena.execute(
      [&] { oneapi::tbb::parallel_for(0, workers, work, oneapi::tbb::simple_partitioner()); });
#endif
}

}  // namespace flexprefill

#endif  // FLEXPREFILL_SRC_CPU_PARALLEL_H_
