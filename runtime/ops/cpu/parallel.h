// Runs the pieces of a kernel on several threads: a pool of our own.
//
// A decode step has over a hundred parallel regions of 10 to 100 us. OpenMP's threads either sleep at the end of each, and
// then waking them costs more than the work, or they spin, and then every region waits for a thread that the system may
// have given its core to somebody else. Here threads spin for a moment and sleep then, and nobody waits for a thread that
// has not begun: whoever is awake takes the next piece, the caller too. Kernels give each piece the same numbers whoever
// computes it.
//
// Between two regions one thread works and the memory is idle. The others fetch meanwhile what the next region will read, as a
// step reads the same weights in the same order as the step before.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace optc {

using Pieces = void (*)(int64_t begin, int64_t end, const void* f);

// What a region reads, each byte once: of piece i those from `data` + i * `bytes` on.
struct Reads {
  const void* data = nullptr;
  int64_t bytes = 0;
};

// Calls run(begin, end, f) for ranges that cover 0 .. count - 1, on at most `threads` threads and then each at most `chunk`
// long.
void run_pieces(int64_t count, int64_t chunk, int64_t threads, Reads reads, Pieces run, const void* f);

// Calls f(begin, end) for ranges that cover first .. last - 1, on as many threads as PyTorch is set to use; on this thread
// alone if there are no more than `grain`, inside of a parallel region, or while another thread runs one.
template <typename F>
inline void parallel_for(int64_t first, int64_t last, int64_t grain, const F& f, Reads reads = {}) {
  const int64_t count = last - first;
  if (count <= 0) return;
  if (count <= grain) return f(first, last);
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1) return f(first, last);
  struct Shifted {
    const F& f;
    int64_t first;
  } shifted{f, first};
  // Small pieces: a thread that is late has little left to do.
  constexpr int64_t kPiecesAThread = 16;
  const int64_t chunk = std::max((grain + 3) / 4, (count + kPiecesAThread * threads - 1) / (kPiecesAThread * threads));
  run_pieces(
      count, chunk, threads, reads,
      [](int64_t begin, int64_t end, const void* context) {
        const auto& given = *static_cast<const Shifted*>(context);
        given.f(given.first + begin, given.first + end);
      },
      &shifted);
}

}  // namespace optc
