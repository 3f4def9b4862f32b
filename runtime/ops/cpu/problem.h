// What a flash attention call is asked for, and the items of work it is cut into.
#pragma once

#include <cstdint>
#include <vector>

#include "partial.h"
#include "quantized_cache.h"

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
};

// The partial results of rows whose splits are in several items.
struct SharedRows {
  float* memory;
  int64_t first_split, end_split;
  int unfinished;  // items; counted down atomically
};

// Rows of a sequence and KV head, and a range of splits of their keys.
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

// First key that the query at `position` sees.
inline int64_t first_visible(int64_t position, int64_t window) {
  return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
}

// Where the rows of an item are.
template <typename T, typename Key>
struct ItemRows {
  const Problem<T, Key>& p;
  const Item& item;

  int64_t query(int64_t row) const { return (item.first_row + row) / p.group(); }
  int64_t head(int64_t row) const { return item.kv_head * p.group() + (item.first_row + row) % p.group(); }
  int64_t position(int64_t row) const { return item.sequence->length - item.sequence->queries + query(row); }
  const T* q(int64_t row) const {
    return p.q + item.sequence->q_offset + query(row) * p.q_stride.token + head(row) * p.q_stride.head;
  }
  T* out(int64_t row) const {
    return p.out + item.sequence->out_offset + query(row) * p.out_stride.token + head(row) * p.out_stride.head;
  }
};

}  // namespace optc
