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
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace optc {
namespace {

constexpr int64_t kMostThreads = 256;
constexpr int kSpins = 4000;  // pauses before a thread sleeps: 50 to 150 us, longer than what lies between two regions
constexpr int64_t kFetched = 256 << 10;  // bytes that a thread fetches ahead, for second-level caches of 1 MiB and more
constexpr int64_t kFetchedAtOnce = 512;  // so few that a new region does not wait

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

// A region that reads something. Workers see it while it is changed: wrong numbers only fetch what is not needed.
struct Region {
  std::atomic<const char*> data{nullptr};
  std::atomic<int64_t> bytes{0}, count{0}, chunk{0}, threads{0};
};

// Where the pieces of thread `thread` of so many begin.
int64_t first_piece(int64_t thread, int64_t count, int64_t chunk, int64_t threads) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  return std::min(count, chunks * thread / threads * chunk);
}

// Which region follows on which, by what they read: what came last is what will come.
class Sequence {
 public:
  // A region begins. Returns what was known to follow on it.
  const Region* advance(Reads reads, int64_t count, int64_t chunk, int64_t threads) {
    Region& slot = next_[last_];
    slot.data.store(static_cast<const char*>(reads.data), std::memory_order_relaxed);
    slot.bytes.store(reads.bytes, std::memory_order_relaxed);
    slot.count.store(count, std::memory_order_relaxed);
    slot.chunk.store(chunk, std::memory_order_relaxed);
    slot.threads.store(threads, std::memory_order_relaxed);
    last_ = (reinterpret_cast<uintptr_t>(reads.data) >> 6) * 0x9e3779b97f4a7c15u >> 52;
    return &next_[last_];
  }

 private:
  size_t last_ = 0;
  Region next_[4096];
};

// What a worker fetches while it waits.
class Fetching {
 public:
  explicit Fetching(int64_t thread) : thread_(thread) {}

  // Fetches a little of what `region` reads first on this thread; false if there is nothing left.
  bool some_of(const Region* region) {
    if (region != region_) begin(region);
    if (at_ >= end_) return false;
    for (int64_t i = 0; i < kFetchedAtOnce; i += 64) __builtin_prefetch(at_ + i, 0, 2);
    at_ += kFetchedAtOnce;
    return true;
  }

 private:
  void begin(const Region* region) {
    region_ = region, at_ = end_ = nullptr;
    if (!region) return;
    const int64_t count = region->count, chunk = region->chunk, threads = region->threads;
    if (chunk <= 0 || thread_ >= threads) return;
    const int64_t first = first_piece(thread_, count, chunk, threads), last = first_piece(thread_ + 1, count, chunk, threads);
    at_ = region->data + first * region->bytes;
    end_ = at_ + std::min(kFetched, (last - first) * region->bytes);
  }

  int64_t thread_;
  const Region* region_ = nullptr;
  const char *at_ = nullptr, *end_ = nullptr;
};

// The pieces that a thread begins with; other threads take them too when they have none of their own left.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Pool {
  std::mutex owner;                     // held by the thread whose region runs
  std::atomic<uint32_t> generation{0};  // of regions; workers sleep on it
  std::atomic<int64_t> sleeping{0};
  std::atomic<const Region*> upcoming{nullptr};
  Sequence sequence;
  int64_t workers = 0;

  // The region. It is changed only while it is closed and nobody is in it.
  std::atomic<bool> is_open{false};
  std::atomic<int64_t> present{0};  // workers that look at the region
  Share shares[kMostThreads];       // of each thread; the first is the caller's
  int64_t chunk = 0, threads = 0;
  Pieces run = nullptr;
  const void* f = nullptr;
  std::mutex error_lock;
  std::exception_ptr error;

  void take_pieces(int64_t thread) {
    for (int64_t i = 0; i < threads; i++) {
      Share& share = shares[(thread + i) % threads];
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;  // many threads would fight for its line
      for (int64_t begin; (begin = share.next.fetch_add(chunk)) < share.end;) {
        try {
          run(begin, std::min(share.end, begin + chunk), f);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(error_lock);
          if (!error) error = std::current_exception();
          for (int64_t t = 0; t < threads; t++) shares[t].next = shares[t].end;
        }
      }
    }
  }

  void work(int64_t thread) {
    inside_region = true;
    Fetching fetching(thread);
    uint32_t seen = generation;
    while (true) {
      for (int spin = 0; generation == seen && spin < kSpins; spin++)
        if (!fetching.some_of(upcoming.load(std::memory_order_relaxed))) pause();
      if (generation == seen) {
        sleeping++;
        futex(&generation, FUTEX_WAIT, seen);  // returns at once if there is a new region by now
        sleeping--;
        continue;
      }
      seen = generation;
      present++;
      if (is_open && thread < threads) take_pieces(thread);
      present--;
    }
  }

  // As many as the system lets us have: those that there are take all pieces.
  void start_workers(int64_t wanted) {
    try {
      for (; workers < wanted; workers++) std::thread([this, thread = workers + 1] { work(thread); }).detach();
    } catch (const std::system_error&) {
    }
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

void run_pieces(int64_t count, int64_t chunk, int64_t threads, Reads reads, Pieces run, const void* f) {
  if (inside_region) return run(0, count, f);
  Pool& p = pool();
  const std::unique_lock<std::mutex> lock(p.owner, std::try_to_lock);
  if (!lock) return run(0, count, f);
  threads = std::min(threads, kMostThreads);
  p.start_workers(threads - 1);
  p.chunk = chunk, p.threads = threads, p.run = run, p.f = f, p.error = nullptr;
  for (int64_t t = 0; t < threads; t++) {
    p.shares[t].next = first_piece(t, count, chunk, threads);
    p.shares[t].end = first_piece(t + 1, count, chunk, threads);
  }
  p.is_open = true;
  p.generation++;
  if (p.sleeping > 0) futex(&p.generation, FUTEX_WAKE, INT_MAX);
  if (reads.data) p.upcoming.store(p.sequence.advance(reads, count, chunk, threads), std::memory_order_relaxed);
  inside_region = true;
  p.take_pieces(0);
  inside_region = false;
  p.is_open = false;
  for (int spin = 0; p.present > 0; spin++)
    if (spin < kSpins) pause(); else std::this_thread::yield();  // a worker was interrupted in the middle of a piece
  if (p.error) std::rethrow_exception(p.error);
}

}  // namespace optc
