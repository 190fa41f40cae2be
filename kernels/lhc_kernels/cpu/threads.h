// Running on the caller's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace lhc {

// How the caller runs code on several threads: `run(workers, work)` calls `work` up to `workers` times at once.
struct Threads {
  int count;
  std::function<void(int workers, const std::function<void()>& work)> run;
};

// Calls body(0) ... body(items - 1), each once, on as many threads as there are; items are handed out one by
// one, so that a thread that is held up takes fewer.
inline void for_each(const Threads& threads, int64_t items, const std::function<void(int64_t)>& body) {
  const int workers = static_cast<int>(std::min<int64_t>(threads.count, items));
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i);
  };
  if (workers <= 1)
    work();
  else
    threads.run(workers, work);
}

}  // namespace lhc
