// Where the keys and values of a split are in memory, and their way into the processor's caches.
#pragma once

#include "problem.h"

namespace optc {

template <typename Key>
struct KeyRows {
  int64_t start, count;  // positions start .. start + count - 1
  const Key *keys[kSplitKeys], *values[kSplitKeys];

  // Runs of adjacent scales of codes.
  struct Run {
    const Key *key_scales, *value_scales;
    int64_t first, count;
  };
  int64_t run_count;
  Run runs[kIsCode<Key> ? kSplitKeys : 1];
};

// Finds the rows of a split. Past the last one it is repeated up to a multiple of 16, so that whole vectors of keys are
// there to read; whatever they hold is hidden later.
template <typename T, typename Key>
void find_rows(const Problem<T, Key>& p, const Item& item, int64_t split, KeyRows<Key>& rows) {
  rows.start = item.first_key_of(split);
  rows.count = item.end_key_of(split) - rows.start;
  rows.run_count = 0;
  const Key* k = p.k + item.sequence->k_offset + item.kv_head * p.k_stride.head;
  const Key* v = p.v + item.sequence->v_offset + item.kv_head * p.v_stride.head;
  // A window may begin inside the split. What lies before it may be given back already, so its place is taken by the
  // first key of the window; no row sees it there.
  const int64_t skipped = std::max<int64_t>(0, item.first_key - rows.start);
  int64_t block = (rows.start + skipped) / p.block_size, offset = (rows.start + skipped) % p.block_size;
  for (int64_t j = skipped; j < rows.count; block++, offset = 0) {
    const int64_t number = item.sequence->blocks[block];
    const int64_t run = std::min(rows.count - j, p.block_size - offset);
    const Key* key = k + number * p.k_stride.block + offset * p.k_stride.token;
    const Key* value = v + number * p.v_stride.block + offset * p.v_stride.token;
    for (int64_t i = 0; i < run; i++, key += p.k_stride.token, value += p.v_stride.token) {
      rows.keys[j + i] = key;
      rows.values[j + i] = value;
    }
    if constexpr (kIsCode<Key>) {
      const int64_t at = number * p.k_stride.block + item.kv_head * p.k_stride.head + offset * kScaleBytes;
      rows.runs[rows.run_count++] = {p.k_scales + at, p.v_scales + at, j, run};
    }
    j += run;
  }
  for (int64_t j = 0; j < skipped; j++) {
    rows.keys[j] = rows.keys[skipped];
    rows.values[j] = rows.values[skipped];
  }
  for (int64_t j = rows.count; j < round_up(rows.count, 16); j++) {
    rows.keys[j] = rows.keys[rows.count - 1];
    rows.values[j] = rows.values[rows.count - 1];
  }
}

template <typename Key>
void prefetch_scales(const KeyRows<Key>& rows) {
  for (int64_t i = 0; i < rows.run_count; i++) {
    fetch(rows.runs[i].key_scales, rows.runs[i].count * kScaleBytes);
    fetch(rows.runs[i].value_scales, rows.runs[i].count * kScaleBytes);
  }
}

// The scales of all rows, in order; those of repeated rows are one.
template <typename Key>
void load_scales(const KeyRows<Key>& rows, float* key_scales, float* value_scales) {
  const int64_t skipped = rows.runs[0].first, end = round_up(rows.count, 16);
  std::fill_n(key_scales, skipped, 1.0f);
  std::fill_n(value_scales, skipped, 1.0f);
  for (int64_t i = 0; i < rows.run_count; i++) {
    const auto& run = rows.runs[i];
    if (run.count == 16) {  // copies of a fixed size need no call
      std::memcpy(key_scales + run.first, run.key_scales, 16 * kScaleBytes);
      std::memcpy(value_scales + run.first, run.value_scales, 16 * kScaleBytes);
    } else {
      std::memcpy(key_scales + run.first, run.key_scales, run.count * kScaleBytes);
      std::memcpy(value_scales + run.first, run.value_scales, run.count * kScaleBytes);
    }
  }
  std::fill(key_scales + rows.count, key_scales + end, 1.0f);
  std::fill(value_scales + rows.count, value_scales + end, 1.0f);
}

}  // namespace optc
