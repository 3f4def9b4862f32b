// Flash attention over paged or contiguous keys and values: how the work is cut into items and shared by threads.
//
// The rows of a sequence and a KV head are its queries times the query heads of the KV head, query by query. An item is
// up to kTileRows of them and a range of splits of their keys. Where there are few rows (decode), several items share the
// splits, so that one long sequence keeps all threads busy; the item that finishes last merges the parts in order. Which
// way is taken changes only the time, not the numbers.
#pragma once

#include <atomic>

#include "dot_split.h"
#include "float_split.h"
#include "rounding.h"

namespace optc {

// What computes a split.
template <typename T, typename Key>
struct Arithmetic {
  using Split = FloatSplit<T, Key>;
  static bool fits(const Problem<T, Key>&) { return true; }
};

#ifdef __AVX512VNNI__
template <class Dots>
struct DotArithmetic {
  using Split = DotSplit<Dots>;
  static bool fits(const Problem<BFloat16, typename Dots::Key>& p) { return p.k_dim <= Dots::kLargestDim; }
};

template <>
struct Arithmetic<BFloat16, int8_t> : DotArithmetic<Quads> {};
#endif
#ifdef __AVX512BF16__
template <>
struct Arithmetic<BFloat16, BFloat16> : DotArithmetic<Pairs<BFloat16>> {};
template <>
struct Arithmetic<BFloat16, Float8> : DotArithmetic<Pairs<Float8>> {};
#endif

template <typename T, typename Key, class Split>
class Worker {
 public:
  explicit Worker(const Problem<T, Key>& problem) : Worker(problem, memory(problem)) {}

  // `upcoming` is the item to run after this one, or null: its first keys are fetched from memory in the meantime.
  void run(const Item& item, const Item* upcoming) {
    const ItemRows<T, Key> rows{p_, item};
    split_.load_queries(rows);
    for (int64_t r = 0; r < item.rows; r++) positions_[r] = rows.position(r);
    if (!started_) find_rows(p_, item, item.first_split, *rows_);
    started_ = true;
    for (int64_t split = item.first_split; split < item.end_split; split++) {
      if (split + 1 < item.end_split)
        find_rows(p_, item, split + 1, *next_);
      else if (upcoming)
        find_rows(p_, *upcoming, upcoming->first_split, *next_);
      else
        next_->count = next_->run_count = 0;
      if (item.shared)
        split_.attend(item, positions_, *rows_, *next_, part_of(item, split));
      else
        add_split(rows, split);
      std::swap(rows_, next_);
    }
    if (item.shared) {
      if (__atomic_fetch_sub(&item.shared->unfinished, 1, __ATOMIC_ACQ_REL) > 1) return;
      start_total(rows);
      for (int64_t split = item.shared->first_split; split < item.shared->end_split; split++)
        merge(total_, part_of(item, split), item.rows, width_);
    }
    store_results(rows);
  }

 private:
  static char* memory(const Problem<T, Key>& problem) {
    Carver size;
    const Worker counted(problem, size);
    return scratch<char, 0>(size.used());
  }

  Worker(const Problem<T, Key>& problem, char* memory) : Worker(problem, Carver(memory)) {}

  Worker(const Problem<T, Key>& problem, Carver&& memory) : Worker(problem, memory) {}

  Worker(const Problem<T, Key>& problem, Carver& memory)
      : p_(problem), width_(Split::width(problem)), split_(problem, memory) {
    const int64_t floats = Partial::floats(kTileRows, width_);
    total_ = Partial::at(memory.template take<float>(floats), kTileRows);
    part_ = Partial::at(memory.template take<float>(floats), kTileRows);
    row_ = memory.template take<float>(width_);
  }

  Partial part_of(const Item& item, int64_t split) const {
    const int64_t rows = round_up(item.rows, kRowBlock);
    return Partial::at(item.shared->memory + (split - item.shared->first_split) * Partial::floats(rows, width_), rows);
  }

  // Merging with nothing is exact, so the first split needs none if there are no sinks.
  void add_split(const ItemRows<T, Key>& rows, int64_t split) {
    const Item& item = rows.item;
    const bool first = split == item.first_split;
    if (first && p_.sinks.empty()) return split_.attend(item, positions_, *rows_, *next_, total_);
    if (first) start_total(rows);
    split_.attend(item, positions_, *rows_, *next_, part_);
    merge(total_, part_, item.rows, width_);
  }

  // A sink is a key that everyone sees, with the sink as its score and zeros as its value.
  void start_total(const ItemRows<T, Key>& rows) {
    total_.clear(rows.item.rows, width_);
    if (p_.sinks.empty()) return;
    for (int64_t r = 0; r < rows.item.rows; r++) {
      total_.max[r] = p_.sinks[rows.head(r)];
      total_.sum[r] = 1;
    }
  }

  void store_results(const ItemRows<T, Key>& rows) {
    for (int64_t r = 0; r < rows.item.rows; r++) {
      const float inverse = 1 / total_.sum[r];
      const float* acc = Split::in_order(total_.acc + r * width_, row_, width_);
      for (int64_t d = 0; d < width_; d += kLanes) store(row_ + d, load(acc + d) * inverse);
      store_row(row_, rows.out(r), p_.v_dim);
    }
  }

  const Problem<T, Key>& p_;
  const int64_t width_;
  Split split_;
  Partial total_, part_;
  float* row_;
  int64_t positions_[kTileRows];
  KeyRows<Key> key_rows_[2], *rows_ = &key_rows_[0], *next_ = &key_rows_[1];
  bool started_ = false;
};

constexpr int64_t kItemsAThread = 8;             // at least, where there are enough splits: threads then finish together
constexpr int64_t kMaxSharedFloats = 4ll << 20;  // memory of a sequence's partial results
constexpr int64_t kWorthAThread = 100'000;       // multiply-adds

// The items of a call; its memory is kept for the next one.
struct Plan {
  std::vector<Item> items;
  std::vector<SharedRows> shared;
  Scratch memory;
};

// Cuts the rows of each sequence and KV head into items that each cover all of their splits.
template <typename T, typename Key>
void cut_rows(const Problem<T, Key>& p, std::vector<Item>& items) {
  items.clear();
  for (const Sequence& sequence : p.sequences) {
    const int64_t rows = sequence.queries * p.group(), before = sequence.length - sequence.queries;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t count = std::min(kTileRows, rows - row);
      const int64_t first_key = first_visible(before + row / p.group(), p.window);
      const int64_t end_key = before + (row + count - 1) / p.group() + 1;
      // Packing a key costs about as much as six rows' use of it.
      const int64_t cost = (end_key - first_key) * (count + 6);
      for (int64_t kv_head = 0; kv_head < p.kv_heads; kv_head++)
        items.push_back({&sequence, kv_head, row, count, first_key, end_key, first_key / kSplitKeys,
                         (end_key - 1) / kSplitKeys + 1, nullptr, cost});
    }
  }
}

// Cuts items whose cost is above `most` further, where they have several splits.
inline void cut_splits(int64_t most, int64_t width, Plan& plan) {
  const auto pieces = [&](const Item& item) {
    return std::clamp<int64_t>((item.cost + most - 1) / most, 1, item.end_split - item.first_split);
  };
  const auto floats = [&](const Item& item) {
    return (item.end_split - item.first_split) * Partial::floats(round_up(item.rows, kRowBlock), width);
  };
  int64_t total = 0;
  plan.shared.clear();
  for (const Item& item : plan.items)
    if (pieces(item) > 1) {
      total += floats(item);
      plan.shared.push_back({nullptr, item.first_split, item.end_split, 0});
    }
  if (plan.shared.empty() || total > kMaxSharedFloats) return;
  float* memory = reinterpret_cast<float*>(plan.memory.reserve(total * sizeof(float)));
  SharedRows* shared = plan.shared.data();
  const size_t uncut = plan.items.size();
  for (size_t i = 0; i < uncut; i++) {
    const Item whole = plan.items[i];
    const int64_t count = pieces(whole), splits = whole.end_split - whole.first_split;
    if (count == 1) continue;
    shared->memory = memory;
    shared->unfinished = static_cast<int>(count);
    memory += floats(whole);
    for (int64_t piece = 0; piece < count; piece++) {
      Item part = whole;
      part.first_split = whole.first_split + splits * piece / count;
      part.end_split = whole.first_split + splits * (piece + 1) / count;
      part.cost = whole.cost / count;
      part.shared = shared;
      if (piece == 0)
        plan.items[i] = part;
      else
        plan.items.push_back(part);
    }
    shared++;
  }
}

template <class Split, typename T, typename Key>
void run_flash_attention(const Problem<T, Key>& problem) {
  static thread_local Plan plan;
  std::vector<Item>& items = plan.items;
  cut_rows(problem, items);
  int64_t cost = 0;
  for (const Item& item : items) cost += item.cost;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(),
                                            cost * (problem.k_dim + problem.v_dim) / kWorthAThread + 1);
  if (threads > 1) {
    cut_splits(cost / (threads * kItemsAThread) + 1, Split::width(problem), plan);
    // Long items first: then threads that take the next item when they are free finish at about the same time.
    const auto longer = [](const Item& a, const Item& b) { return a.cost > b.cost; };
    if (!std::is_sorted(items.begin(), items.end(), longer)) std::stable_sort(items.begin(), items.end(), longer);
  }
  const Item* const all = items.data();  // a thread's own `plan` is another one
  const size_t count = items.size();
  std::atomic<size_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    (void)begin, (void)end;  // a thread takes items until none is left, whichever part of the range it was given
    if (next.load(std::memory_order_relaxed) >= count) return;
    Worker<T, Key, Split> worker(problem);
    auto take = [&]() -> const Item* {
      const size_t i = next.fetch_add(1, std::memory_order_relaxed);
      return i < count ? all + i : nullptr;
    };
    for (const Item *item = take(), *upcoming; item; item = upcoming) {
      upcoming = take();
      worker.run(*item, upcoming);
    }
  });
}

template <typename T, typename Key>
void flash_attention(const Problem<T, Key>& problem) {
  using Best = Arithmetic<T, Key>;
  if (Best::fits(problem))
    run_flash_attention<typename Best::Split>(problem);
  else
    run_flash_attention<FloatSplit<T, Key>>(problem);
}

}  // namespace optc
