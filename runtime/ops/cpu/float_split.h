// Attention over a split in float32: a tile of keys and values at a time is widened, the keys transposed.
#pragma once

#include "key_rows.h"
#include "scratch.h"
#include "tile.h"

namespace optc {

template <typename T, typename Key>
class FloatSplit {
 public:
  static int64_t width(const Problem<T, Key>& p) { return round_up(p.v_dim, kLanes); }

  FloatSplit(const Problem<T, Key>& problem, Carver& memory)
      : p_(problem),
        width_(width(problem)),
        keys_(memory.take<float>(p_.k_dim * kTileKeys)),
        values_(memory.take<float>(kTileKeys * width_)),
        q_(memory.take<float>(kTileRows * p_.k_dim)),
        key_scales_(memory.take<float>(kSplitKeys)),
        value_scales_(memory.take<float>(kSplitKeys)) {}

  void load_queries(const ItemRows<T, Key>& rows) {
    for (int64_t r = 0; r < rows.item.rows; r++) {
      float* to = q_ + r * p_.k_dim;
      load_row(rows.q(r), to, p_.k_dim);
      for (int64_t d = 0; d < p_.k_dim; d++) to[d] *= p_.scale;
    }
  }

  // Into `part`, and meanwhile the rows of `next` into the processor's cache.
  void attend(const Item& item, const int64_t* positions, const KeyRows<Key>& rows, const KeyRows<Key>& next,
              const Partial& part) {
    part.clear(item.rows, width_);
    if constexpr (kIsCode<Key>) load_scales(rows, key_scales_, value_scales_);
    for (int64_t first = 0; first < rows.count; first += kTileKeys) {
      const int64_t count = std::min(kTileKeys, rows.count - first);
      const bool last_tile = first + kTileKeys >= rows.count;
      pack(rows, first, count, last_tile ? next : rows, last_tile ? 0 : first + kTileKeys);
      const Tile tile{keys_, values_, kIsCode<Key> ? value_scales_ + first : nullptr, rows.start + first, count};
      for (int64_t r = 0; r < item.rows; r += kRowBlock)
        attend_rows(std::min<int64_t>(kRowBlock, item.rows - r),
                    {q_ + r * p_.k_dim, positions + r, part.from_row(r, width_)}, tile, p_.k_dim, width_, p_.window,
                    p_.softcap);
    }
  }

  // A row of results in its natural order.
  static const float* in_order(const float* acc, float*, int64_t) { return acc; }

 private:
  void pack(const KeyRows<Key>& rows, int64_t first, int64_t count, const KeyRows<Key>& next, int64_t next_first) {
    for (int64_t j = 0; j < count; j++) {
      if (next_first + j < next.count) {
        fetch(next.keys[next_first + j], p_.k_dim * sizeof(Key));
        fetch(next.values[next_first + j], p_.v_dim * sizeof(Key));
      }
      float* to = values_ + j * width_;
      load_row(rows.values[first + j], to, p_.v_dim);
      std::fill(to + p_.v_dim, to + width_, 0.0f);
    }
    for (int64_t j = 0; j < count; j += kLanes)
      transpose_keys(rows.keys + first + j, key_scales_ + first + j, keys_ + j);
  }

  void transpose_keys(const Key* const* rows, const float* scales, float* to) {
    int64_t d = 0;
    if constexpr (sizeof(Key) == 2) {  // in pairs, at half the work
      for (; d + 2 * kLanes <= p_.k_dim; d += 2 * kLanes) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; j++) std::memcpy(&square[j], rows[j] + d, sizeof(Vec));
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

  const Problem<T, Key>& p_;
  const int64_t width_;
  float *keys_, *values_, *q_, *key_scales_, *value_scales_;
};

}  // namespace optc
