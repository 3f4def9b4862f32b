// The float32 arithmetic of attention on one tile of keys and values.
//
// Every query row is computed with the same operations in the same order however rows are grouped into blocks, tiles
// and work items. So a token's attention has the same bits alone or in a batch, as decode or as part of a prompt, on any
// number of threads.
#pragma once

#include <algorithm>
#include <limits>

#include "partial.h"

namespace optc {

// c[M, N * kLanes] (+)= a[M, depth] * b[depth, N * kLanes]
template <int M, int N>
inline void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                           int64_t depth, bool accumulate) {
  Vec sum[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sum[m][n] = accumulate ? load(c + m * ldc + n * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; k++) {
    Vec row[N];
    for (int n = 0; n < N; n++) row[n] = load(b + k * ldb + n * kLanes);
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) sum[m][n] += a[m * lda + k] * row[n];
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(c + m * ldc + n * kLanes, sum[m][n]);
}

// c[M, columns] (+)= a[M, depth] * b[depth, columns], columns a multiple of kLanes
template <int M>
inline void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                     int64_t columns, bool accumulate) {
  constexpr int kWide = kLanes == 16 ? 4 : 2;  // M * kWide sums must fit the 32 (AVX-512) or 16 registers
  int64_t n = 0;
  for (; n + kWide * kLanes <= columns; n += kWide * kLanes)
    multiply_block<M, kWide>(a, lda, b + n, ldb, c + n, ldc, depth, accumulate);
  if (kWide > 2 && n + 2 * kLanes <= columns) {
    multiply_block<M, 2>(a, lda, b + n, ldb, c + n, ldc, depth, accumulate);
    n += 2 * kLanes;
  }
  if (n < columns) multiply_block<M, 1>(a, lda, b + n, ldb, c + n, ldc, depth, accumulate);
}

// One row of raw scores becomes weights relative to the row's running maximum; what was accumulated before is rescaled
// to that maximum. Keys before `first` and after `last` of the tile are invisible. With the scales of codes, if there
// are any, weights are multiplied.
inline void softmax_row(float* scores, int64_t columns, int64_t first, int64_t last, const float* value_scales,
                        float softcap, float& row_max, float& row_sum, float* acc, int64_t width) {
  if (first > last) {
    std::fill_n(scores, columns, 0.0f);
    return;
  }
  if (softcap > 0)
    for (int64_t j = 0; j < columns; j += kLanes) store(scores + j, softcap * tanh(load(scores + j) / softcap));
  if (first > 0 || last < columns - 1) {
    const Vec hidden = splat(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < columns; j += kLanes) {
      IntVec key = lane_numbers() + static_cast<int32_t>(j);
      IntVec visible = (key >= static_cast<int32_t>(first)) & (key <= static_cast<int32_t>(last));
      store(scores + j, visible ? load(scores + j) : hidden);
    }
  }
  Vec highest = splat(row_max);
  for (int64_t j = 0; j < columns; j += kLanes) highest = max(highest, load(scores + j));
  const float new_max = reduce_max(highest);
  if (new_max > row_max) {
    const float correction = exp(row_max - new_max);
    row_max = new_max;
    row_sum *= correction;
    for (int64_t d = 0; d < width; d += kLanes) store(acc + d, load(acc + d) * correction);
  }
  Vec sum{};
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec weight = exp(load(scores + j) - new_max);
    sum += weight;
    // The scales of unseen keys may be NaN.
    if (value_scales) weight = weight > 0.0f ? weight * load(value_scales + j) : Vec{};
    store(scores + j, weight);
  }
  row_sum += reduce_sum(sum);
}

// What M <= kRowBlock adjacent rows do with a packed tile.
struct RowBlock {
  const float* q;            // [M, k_dim], already scaled
  const int64_t* positions;  // [M] of the queries, not decreasing
  Partial partial;           // of these rows
};

struct Tile {
  const float* keys;          // [k_dim, kTileKeys]: transposed, so that scores of adjacent keys are adjacent
  const float* values;        // [kTileKeys, width]
  const float* value_scales;  // [kTileKeys], if values are codes
  int64_t start, count;       // key positions start .. start + count - 1
};

template <int M>
void attend_block(const RowBlock& rows, const Tile& tile, int64_t k_dim, int64_t width, int64_t window, float softcap) {
  const int64_t depth = std::min(tile.count, rows.positions[M - 1] - tile.start + 1);  // keys some row may see
  const int64_t columns = round_up(depth, kLanes);
  alignas(64) float scores[M * kTileKeys];
  multiply<M>(rows.q, k_dim, tile.keys, kTileKeys, scores, kTileKeys, k_dim, columns, false);
  for (int m = 0; m < M; m++) {
    const int64_t last = std::min(depth - 1, rows.positions[m] - tile.start);
    const int64_t first = window > 0 ? std::max<int64_t>(0, rows.positions[m] - window + 1 - tile.start) : 0;
    softmax_row(scores + m * kTileKeys, columns, first, last, tile.value_scales, softcap, rows.partial.max[m],
                rows.partial.sum[m], rows.partial.acc + m * width, width);
  }
  multiply<M>(scores, kTileKeys, tile.values, width, rows.partial.acc, width, depth, width, true);
}

// Adds a tile to the partial result of `count` <= kRowBlock rows.
inline void attend_rows(int64_t count, const RowBlock& rows, const Tile& tile, int64_t k_dim, int64_t width,
                        int64_t window, float softcap) {
  if (rows.positions[count - 1] < tile.start) return;                               // the whole tile is in the future
  if (window > 0 && rows.positions[0] - window >= tile.start + tile.count - 1) return;  // or out of every window
  switch (count) {
    case 1: return attend_block<1>(rows, tile, k_dim, width, window, softcap);
    case 2: return attend_block<2>(rows, tile, k_dim, width, window, softcap);
    case 3: return attend_block<3>(rows, tile, k_dim, width, window, softcap);
    case 4: return attend_block<4>(rows, tile, k_dim, width, window, softcap);
    case 5: return attend_block<5>(rows, tile, k_dim, width, window, softcap);
    default: return attend_block<6>(rows, tile, k_dim, width, window, softcap);
  }
}

}  // namespace optc
