// The thread pool behind parallel.h. One region runs at a time; its caller is one of its threads.

#include "parallel.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace optc {
namespace {

constexpr int64_t kMostThreads = 256;
constexpr int kSpins = 4000;  // pauses before a thread sleeps: 50 to 150 us, longer than what lies between two regions

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

void futex(std::atomic<uint32_t>* word, int operation, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

thread_local bool inside_region = false;

struct Pool {
  std::mutex owner;                     // held by the thread whose region runs
  std::atomic<uint32_t> generation{0};  // of regions; workers sleep on it
  std::atomic<int64_t> sleeping{0};
  int64_t workers = 0;

  // The region. It is changed only while it is closed and nobody is in it.
  std::atomic<bool> is_open{false};
  std::atomic<int64_t> present{0};  // workers that look at the region
  std::atomic<int64_t> next{0}, admitted{0};
  int64_t count = 0, chunk = 0, threads = 0;
  Pieces run = nullptr;
  const void* f = nullptr;
  std::mutex error_lock;
  std::exception_ptr error;

  void take_pieces() {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < count;) {
      try {
        run(begin, std::min(count, begin + chunk), f);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_lock);
        if (!error) error = std::current_exception();
        next = count;
      }
    }
  }

  void work() {
    inside_region = true;
    uint32_t seen = generation;
    while (true) {
      for (int spin = 0; generation == seen && spin < kSpins; spin++) pause();
      if (generation == seen) {
        sleeping++;
        futex(&generation, FUTEX_WAIT, seen);  // returns at once if there is a new region by now
        sleeping--;
        continue;
      }
      seen = generation;
      present++;
      if (is_open && admitted.fetch_add(1) < threads - 1) take_pieces();
      present--;
    }
  }

  void start_workers(int64_t wanted) {
    for (; workers < std::min(wanted, kMostThreads); workers++) std::thread([this] { work(); }).detach();
  }
};

// Never destroyed, as its threads never end. A forked process has none of the threads, and gets a pool of its own.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  Pool* found = current;
  if (found) return *found;
  static std::mutex making;
  const std::lock_guard<std::mutex> lock(making);
  if (!current) {
    static const int once = pthread_atfork(nullptr, nullptr, [] { current = nullptr, inside_region = false; });
    (void)once;
    current = new Pool;
  }
  return *current;
}

}  // namespace

void run_pieces(int64_t count, int64_t chunk, int64_t threads, Pieces run, const void* f) {
  if (inside_region) return run(0, count, f);
  Pool& p = pool();
  const std::unique_lock<std::mutex> lock(p.owner, std::try_to_lock);
  if (!lock) return run(0, count, f);
  p.start_workers(threads - 1);
  p.count = count, p.chunk = chunk, p.threads = threads, p.run = run, p.f = f, p.error = nullptr;
  p.next = 0, p.admitted = 0;
  p.is_open = true;
  p.generation++;
  if (p.sleeping > 0) futex(&p.generation, FUTEX_WAKE, INT_MAX);
  inside_region = true;
  p.take_pieces();
  inside_region = false;
  p.is_open = false;
  for (int spin = 0; p.present > 0; spin++)
    if (spin < kSpins) pause(); else std::this_thread::yield();  // a worker was interrupted in the middle of a piece
  if (p.error) std::rethrow_exception(p.error);
}

}  // namespace optc
