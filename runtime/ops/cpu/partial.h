// Attention over a part of the keys, and how parts are put together.
//
// The keys of a sequence are cut at multiples of kSplitKeys, whatever the batch and the number of threads. The result of
// each split is computed for itself, and the splits are merged in order.
#pragma once

#include <algorithm>
#include <limits>

#include "simd.h"

namespace optc {

constexpr int64_t kTileKeys = 64;    // keys packed at a time; a tile starts at a multiple of it
constexpr int64_t kSplitKeys = 256;  // keys of one partial result; a split starts at a multiple of it
constexpr int64_t kTileRows = 96;    // query rows that share packed keys
constexpr int kRowBlock = 6;         // rows computed together in registers

static_assert(kSplitKeys % kTileKeys == 0 && kTileKeys % 16 == 0 && kTileRows % kRowBlock == 0);

// Attention of some rows over some keys, before the division by `sum`:
// sum = sum_j exp(s_j - max) and acc = sum_j exp(s_j - max) v_j. Over no keys: -inf, 0, 0.
struct Partial {
  float* max;
  float* sum;
  float* acc;  // [rows, width], width a multiple of kLanes

  static int64_t floats(int64_t rows, int64_t width) { return round_up(2 * rows, kLanes) + rows * width; }

  static Partial at(float* memory, int64_t rows) {
    return {memory, memory + rows, memory + round_up(2 * rows, kLanes)};
  }

  Partial from_row(int64_t row, int64_t width) const { return {max + row, sum + row, acc + row * width}; }

  void clear(int64_t rows, int64_t width) const {
    std::fill_n(max, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, rows, 0.0f);
    std::fill_n(acc, rows * width, 0.0f);
  }
};

// total += part, for disjoint sets of keys. Exact when either is empty, so empty parts do not change a result. Not
// inlined, lest the compiler contract the sums of products differently in different places.
__attribute__((noinline)) inline void merge(const Partial& total, const Partial& part, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++) {
    if (part.sum[r] == 0) continue;
    const float top = std::max(total.max[r], part.max[r]);
    const float keep = exp(total.max[r] - top), add = exp(part.max[r] - top);
    total.max[r] = top;
    total.sum[r] = total.sum[r] * keep + part.sum[r] * add;
    float* to = total.acc + r * width;
    const float* from = part.acc + r * width;
    for (int64_t d = 0; d < width; d += kLanes) store(to + d, load(to + d) * keep + load(from + d) * add);
  }
}

}  // namespace optc
