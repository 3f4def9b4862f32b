// Flash attention over paged or contiguous keys and values: how the work is cut into items and shared by threads.
//
// The rows of a sequence and a KV head are its queries times the query heads of the KV head, query by query. An item is
// up to kTileRows of them and a range of splits of their keys. A sequence that makes few items otherwise (decode) gives
// every split its own, so that one long sequence keeps all threads busy; the item that finishes last merges the parts in
// order. Which way is taken changes only the time, not the numbers.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <vector>

#include "quantized_cache.h"
#include "tile.h"

namespace optc {

// A sequence whose last `queries` tokens attend to its `length` tokens. Contiguous keys are one block of their own.
struct Sequence {
  int64_t q_offset, out_offset, k_offset, v_offset;  // of its first query, and of its keys and values, in elements
  const int32_t* blocks;                             // the block of every block_size tokens
  int64_t queries, length;
};

struct Strides {
  int64_t token, head, block;
};

// Keys and values are in the queries' type T, or codes.
template <typename T, typename Key = T>
struct Problem {
  const T* q;
  const Key *k, *v;
  T* out;
  Strides q_stride, k_stride, v_stride, out_stride;  // in elements
  int64_t heads, kv_heads, k_dim, v_dim, block_size, window;
  float scale, softcap;
  std::vector<float> sinks;  // of each head, or empty
  std::vector<Sequence> sequences;
  const Key *k_scales = nullptr, *v_scales = nullptr;  // of codes: where those of the first block are

  int64_t group() const { return heads / kv_heads; }
  int64_t width() const { return round_up(v_dim, kLanes); }  // of a row of values or of results in float32
};

// The partial results of rows whose splits are separate items.
struct SharedRows {
  std::unique_ptr<float[]> memory;
  int64_t first_split, splits;
  std::atomic<int64_t> unfinished;

  SharedRows(int64_t first_split, int64_t splits, int64_t floats)
      : memory(new float[splits * floats]), first_split(first_split), splits(splits), unfinished(splits) {}
};

struct Item {
  const Sequence* sequence;
  int64_t kv_head, first_row, rows;
  int64_t first_key, end_key;  // that some row may see
  int64_t first_split, end_split;
  SharedRows* shared;  // null when the item covers all splits of its rows
  int64_t cost;

  int64_t first_key_of(int64_t split) const { return std::max(split * kSplitKeys, first_key / kTileKeys * kTileKeys); }
  int64_t end_key_of(int64_t split) const { return std::min((split + 1) * kSplitKeys, end_key); }
};

// Memory of one thread, kept between calls because fresh pages cost more than a small decode step.
class Scratch {
 public:
  float* reserve(size_t floats) {
    if (floats > size_) {
      memory_.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64))));
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Delete> memory_;
  size_t size_ = 0;
};

template <typename T, typename Key>
class Worker {
 public:
  explicit Worker(const Problem<T, Key>& problem) : p_(problem), width_(problem.width()) {
    static thread_local Scratch scratch;
    const int64_t q = kTileRows * p_.k_dim, keys = p_.k_dim * kTileKeys, values = kTileKeys * width_;
    const int64_t partial = Partial::floats(kTileRows, width_);
    keys_ = scratch.reserve(keys + values + 2 * partial + q);  // vectors first: they stay aligned
    values_ = keys_ + keys;
    total_ = Partial::at(values_ + values, kTileRows);
    part_ = Partial::at(values_ + values + partial, kTileRows);
    q_ = values_ + values + 2 * partial;
  }

  // `upcoming` is the item to run after this one, or null: its first keys are fetched from memory in the meantime.
  void run(const Item& item, const Item* upcoming) {
    const int64_t floats = Partial::floats(item.rows, width_);
    load_queries(item);
    if (!item.shared) start_total(item);
    for (int64_t split = item.first_split; split < item.end_split; split++) {
      Partial part = part_;
      if (item.shared) part = Partial::at(&item.shared->memory[(split - item.shared->first_split) * floats], item.rows);
      part.clear(item.rows, width_);
      attend_split(item, split, part, upcoming);
      if (!item.shared) merge(total_, part, item.rows, width_);
    }
    if (item.shared) {
      if (item.shared->unfinished.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      start_total(item);
      for (int64_t split = 0; split < item.shared->splits; split++)
        merge(total_, Partial::at(&item.shared->memory[split * floats], item.rows), item.rows, width_);
    }
    store_results(item);
  }

 private:
  int64_t head(const Item& item, int64_t row) const {
    return item.kv_head * p_.group() + (item.first_row + row) % p_.group();
  }

  int64_t query(const Item& item, int64_t row) const { return (item.first_row + row) / p_.group(); }

  void load_queries(const Item& item) {
    for (int64_t r = 0; r < item.rows; r++) {
      const T* from = p_.q + item.sequence->q_offset + query(item, r) * p_.q_stride.token;
      float* to = q_ + r * p_.k_dim;
      load_row(from + head(item, r) * p_.q_stride.head, to, p_.k_dim);
      for (int64_t d = 0; d < p_.k_dim; d++) to[d] *= p_.scale;
      positions_[r] = item.sequence->length - item.sequence->queries + query(item, r);
    }
  }

  // A sink is a key that everyone sees, with the sink as its score and zeros as its value.
  void start_total(const Item& item) {
    total_.clear(item.rows, width_);
    if (p_.sinks.empty()) return;
    for (int64_t r = 0; r < item.rows; r++) {
      total_.max[r] = p_.sinks[head(item, r)];
      total_.sum[r] = 1;
    }
  }

  void attend_split(const Item& item, int64_t split, const Partial& part, const Item* upcoming) {
    const int64_t end = item.end_key_of(split);
    find_rows(item, item.first_key_of(split), end, *rows_);
    for (int64_t start = item.first_key_of(split); start < end; start += kTileKeys) {
      if (start + kTileKeys < end)
        find_rows(item, start + kTileKeys, end, *next_);
      else if (split + 1 < item.end_split)
        find_rows(item, item.first_key_of(split + 1), item.end_key_of(split + 1), *next_);
      else if (upcoming)
        find_rows(*upcoming, upcoming->first_key_of(upcoming->first_split),
                  upcoming->end_key_of(upcoming->first_split), *next_);
      else
        next_->count = 0;
      pack(*rows_, *next_);
      const Tile tile{keys_, values_, start, rows_->count};
      for (int64_t r = 0; r < item.rows; r += kRowBlock)
        attend_rows(std::min<int64_t>(kRowBlock, item.rows - r),
                    {q_ + r * p_.k_dim, positions_ + r, part.from_row(r, width_)}, tile, p_.k_dim, width_, p_.window,
                    p_.softcap);
      std::swap(rows_, next_);
    }
  }

  // Where the keys and values of a tile are in memory.
  struct TileRows {
    int64_t count;
    const Key *keys[kTileKeys], *values[kTileKeys];
    float key_scales[kTileKeys], value_scales[kTileKeys];  // of codes
  };

  void find_rows(const Item& item, int64_t start, int64_t end, TileRows& rows) {
    rows.count = std::min(kTileKeys, end - start);
    const Key* k = p_.k + item.sequence->k_offset + item.kv_head * p_.k_stride.head;
    const Key* v = p_.v + item.sequence->v_offset + item.kv_head * p_.v_stride.head;
    // A window may begin inside the tile. What lies before it may be given back already, so its place is taken by the
    // first key of the window; no row sees it there.
    const int64_t skipped = std::max<int64_t>(0, item.first_key - start);
    int64_t block = (start + skipped) / p_.block_size, offset = (start + skipped) % p_.block_size;
    for (int64_t j = skipped; j < rows.count; block++, offset = 0) {
      const int64_t number = item.sequence->blocks[block];
      for (; j < rows.count && offset < p_.block_size; j++, offset++) {
        rows.keys[j] = k + number * p_.k_stride.block + offset * p_.k_stride.token;
        rows.values[j] = v + number * p_.v_stride.block + offset * p_.v_stride.token;
        if constexpr (kIsCode<Key>) {
          const int64_t at = number * p_.k_stride.block + item.kv_head * p_.k_stride.head + offset * kScaleBytes;
          rows.key_scales[j] = load_scale(p_.k_scales + at);
          rows.value_scales[j] = load_scale(p_.v_scales + at);
        }
      }
    }
    for (int64_t j = 0; j < skipped; j++) repeat(rows, skipped, j);
  }

  static void repeat(TileRows& rows, int64_t from, int64_t to) {
    rows.keys[to] = rows.keys[from];
    rows.values[to] = rows.values[from];
    if constexpr (kIsCode<Key>) {
      rows.key_scales[to] = rows.key_scales[from];
      rows.value_scales[to] = rows.value_scales[from];
    }
  }

  // Brings a tile into float32, the keys transposed, and meanwhile the next one into the processor's cache.
  void pack(TileRows& rows, const TileRows& next) {
    for (int64_t j = 0; j < rows.count; j++) {
      if (j < next.count) {
        prefetch(next.keys[j], p_.k_dim);
        prefetch(next.values[j], p_.v_dim);
      }
      if constexpr (kIsCode<Key>)
        dequantize_row(rows.values[j], rows.value_scales[j], values_ + j * width_, p_.v_dim);
      else
        load_row(rows.values[j], values_ + j * width_, p_.v_dim);
      std::fill(values_ + j * width_ + p_.v_dim, values_ + (j + 1) * width_, 0.0f);
    }
    for (int64_t j = rows.count; j < round_up(rows.count, kLanes); j++)
      repeat(rows, rows.count - 1, j);  // whatever they hold is hidden later
    for (int64_t j = 0; j < rows.count; j += kLanes) transpose_keys(rows.keys + j, rows.key_scales + j, keys_ + j);
  }

  static void prefetch(const Key* row, int64_t n) {
    for (int64_t d = 0; d < n; d += 64 / sizeof(Key)) __builtin_prefetch(row + d);
  }

  void transpose_keys(const Key* const* rows, const float* scales, float* to) {
    int64_t d = 0;
    if constexpr (sizeof(Key) == 2) {  // in pairs, at half the work
      for (; d + 2 * kLanes <= p_.k_dim; d += 2 * kLanes) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; j++) square[j] = load(reinterpret_cast<const float*>(rows[j] + d));
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) {
          store(to + (d + 2 * i) * kTileKeys, widen<Key>((BitsVec)square[i] & 0xffffu));
          store(to + (d + 2 * i + 1) * kTileKeys, widen<Key>((BitsVec)square[i] >> 16));
        }
      }
    }
    for (; d + kLanes <= p_.k_dim; d += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; j++) square[j] = load(rows[j] + d);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) store(to + (d + i) * kTileKeys, square[i]);
    }
    for (; d < p_.k_dim; d++)
      for (int j = 0; j < kLanes; j++) to[d * kTileKeys + j] = static_cast<float>(rows[j][d]);
    if constexpr (kIsCode<Key>) {
      const Vec scale = load(scales);
      for (d = 0; d < p_.k_dim; d++) store(to + d * kTileKeys, load(to + d * kTileKeys) * scale);
    }
  }

  void store_results(const Item& item) {
    for (int64_t r = 0; r < item.rows; r++) {
      T* to = p_.out + item.sequence->out_offset + query(item, r) * p_.out_stride.token;
      to += head(item, r) * p_.out_stride.head;
      const float inverse = 1 / total_.sum[r];
      for (int64_t d = 0; d < p_.v_dim; d++) to[d] = static_cast<T>(total_.acc[r * width_ + d] * inverse);
    }
  }

  const Problem<T, Key>& p_;
  const int64_t width_;
  float *keys_, *values_, *q_;
  Partial total_, part_;
  int64_t positions_[kTileRows];
  TileRows tile_rows_[2], *rows_ = &tile_rows_[0], *next_ = &tile_rows_[1];
};

constexpr int64_t kEnoughItems = 64;             // so many items of a sequence keep all threads busy as they are
constexpr int64_t kMaxSharedFloats = 4ll << 20;  // memory of a sequence's partial results

// First key that the query at `position` sees.
inline int64_t first_visible(int64_t position, int64_t window) {
  return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
}

template <typename T, typename Key>
std::vector<Item> make_items(const Problem<T, Key>& p, std::deque<SharedRows>& shared) {
  std::vector<Item> items;
  for (const Sequence& sequence : p.sequences) {
    const int64_t rows = sequence.queries * p.group(), tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t part_floats = p.kv_heads * Partial::floats(rows, p.width());
    const int64_t splits = (sequence.length - 1) / kSplitKeys + 1;
    const bool split_keys = tiles * p.kv_heads < kEnoughItems && splits * part_floats <= kMaxSharedFloats;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t count = std::min(kTileRows, rows - row), before = sequence.length - sequence.queries;
      const int64_t first_key = first_visible(before + row / p.group(), p.window);
      const int64_t end_key = before + (row + count - 1) / p.group() + 1;
      const int64_t first_split = first_key / kSplitKeys, end_split = (end_key - 1) / kSplitKeys + 1;
      const bool share = split_keys && end_split - first_split > 1;
      for (int64_t kv_head = 0; kv_head < p.kv_heads; kv_head++) {
        SharedRows* parts = nullptr;
        if (share) {
          shared.emplace_back(first_split, end_split - first_split, Partial::floats(count, p.width()));
          parts = &shared.back();
        }
        for (int64_t split = first_split; split < end_split; split += share ? 1 : end_split - first_split) {
          const int64_t end = share ? split + 1 : end_split;
          const int64_t keys = std::min(end * kSplitKeys, end_key) - std::max(split * kSplitKeys, first_key);
          // Packing a key costs about as much as six rows' use of it.
          items.push_back(
              {&sequence, kv_head, row, count, first_key, end_key, split, end, parts, keys * (count + 6)});
        }
      }
    }
  }
  return items;
}

template <typename T, typename Key>
void flash_attention(const Problem<T, Key>& problem) {
  std::deque<SharedRows> shared;
  std::vector<Item> items = make_items(problem, shared);
  // Long items first: then threads that take the next item when they are free finish at about the same time.
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  int64_t cost = 0;
  for (const Item& item : items) cost += item.cost * (problem.k_dim + problem.v_dim);
  constexpr int64_t kWorthAThread = 100'000;  // multiply-adds, about 5 us
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), cost / kWorthAThread + 1);
  std::atomic<size_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    (void)begin, (void)end;  // a thread takes items until none is left, whichever part of the range it was given
    Worker<T, Key> worker(problem);
    auto take = [&]() -> const Item* {
      const size_t i = next.fetch_add(1, std::memory_order_relaxed);
      return i < items.size() ? &items[i] : nullptr;
    };
    for (const Item *item = take(), *upcoming; item; item = upcoming) {
      upcoming = take();
      worker.run(*item, upcoming);
    }
  });
}

}  // namespace optc
