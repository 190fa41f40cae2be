// Running on the caller's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

namespace lhc {

// How the caller runs code on several threads: `run(workers, work)` calls work(0) ... work(workers - 1), at once if it
// can, and a number on the same thread each time.
struct Threads {
  int count;
  std::function<void(int workers, const std::function<void(int worker)>& work)> run;
};

// Calls body(0) ... body(items - 1), each once, on as many threads as there are. A thread begins with its own share of
// the items: layer after layer it then finds in its own caches what it wrote there. Who is done first helps the others.
inline void for_each(const Threads& threads, int64_t items, const std::function<void(int64_t)>& body) {
  const int workers = static_cast<int>(std::min<int64_t>(threads.count, items));
  if (workers <= 1) {
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(workers);
  for (int w = 0; w < workers; ++w) {
    shares[w].next = items * w / workers;
    shares[w].end = items * (w + 1) / workers;
  }
  threads.run(workers, [&](int worker) {
    for (int w = 0; w < workers; ++w) {
      Share& share = shares[(worker + w) % workers];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) body(i);
    }
  });
}

}  // namespace lhc
