// Attention over a split by dot products of pairs or quads (`dot.h`): all scores, then all weights, then all values.
//
// Few rows, as in decode, use keys and values as they come from memory. Many rows share packed ones. Either way a row goes
// through the same operations in the same order, so its results have the same bits.
#pragma once

#include "dot.h"
#include "key_rows.h"
#include "scratch.h"
#include "weigh.h"

#ifdef __AVX512VNNI__

namespace optc {

template <class Dots>
class DotSplit {
 public:
  using T = BFloat16;
  using Key = typename Dots::Key;

  static int64_t width(const Problem<T, Key>& p) { return round_up(p.v_dim, kUnit); }

  DotSplit(const Problem<T, Key>& problem, Carver& memory)
      : p_(problem),
        width_(width(problem)),
        depth_(round_up(p_.k_dim, kPack) / kPack),
        q_row_(round_up(depth_, kLanes) * kParts),
        q_(memory.take<int32_t>(kTileRows * q_row_)),
        offsets_(memory.take<int32_t>(kTileRows)),
        factors_(memory.take<float>(kTileRows)),
        steps_(memory.take<float>(kTileRows)),
        key_scales_(memory.take<float>(kSplitKeys)),
        value_scales_(memory.take<float>(kSplitKeys)),
        scores_(memory.take<float>(kTileRows * kSplitKeys)),
        weights_(memory.take<int32_t>(kTileRows * kWeightRow)),
        keys_(memory.take<int32_t>(kSplitKeys * depth_)),
        values_(memory.take<int32_t>(kTileKeys / kPack * width_)) {}

  void load_queries(const ItemRows<T, Key>& rows) {
    for (int64_t r = 0; r < rows.item.rows; r++) {
      int32_t* to = q_ + r * q_row_;
      std::fill_n(to, q_row_, 0);
      factors_[r] = p_.scale * load_query<Dots>(rows.q(r), p_.k_dim, to, offsets_[r]);
    }
    if (rows.item.rows > kFewRows)  // whole blocks are computed
      for (int64_t r = rows.item.rows; r < round_up(rows.item.rows, kRowBlock); r++) {
        std::fill_n(q_ + r * q_row_, q_row_, 0);
        std::fill_n(weights_ + r * kWeightRow, kWeightRow, 0);
        offsets_[r] = 0;
      }
  }

  // Into `part`, whose memory is that of whole blocks of rows, and meanwhile the rows of `next` into the processor's cache.
  void attend(const Item& item, const int64_t* positions, const KeyRows<Key>& rows, const KeyRows<Key>& next,
              const Partial& part) {
    prefetch_scales(next);
    if constexpr (kIsCode<Key>) load_scales(rows, key_scales_, value_scales_);
    if (item.rows <= kFewRows)
      score_few(item.rows, rows, next);
    else
      score_many(item.rows, positions, rows, next);
    const int64_t block_rows = round_up(item.rows, kRowBlock);
    for (int64_t r = 0; r < item.rows; r++) {
      const Visible visible = visible_keys(positions[r], rows);
      steps_[r] = weigh<Dots>({scores_ + r * kSplitKeys, visible.first, visible.last, round_up(rows.count, kLanes)},
                              {factors_[r], p_.softcap, key_scales_, value_scales_}, weights_ + r * kWeightRow,
                              part.max[r], part.sum[r]);
    }
    std::fill_n(part.acc, (item.rows <= kFewRows ? item.rows : block_rows) * width_, 0.0f);
    if (item.rows <= kFewRows)
      add_few(item.rows, rows, next, part.acc);
    else
      add_many(item.rows, positions, rows, next, part.acc);
    for (int64_t r = 0; r < item.rows; r++) Dots::finish(part.acc + r * width_, width_, steps_[r]);
  }

  // A row of results in its natural order.
  static const float* in_order(const float* acc, float* to, int64_t width) {
    optc::in_order<Dots>(acc, to, width);
    return to;
  }

 private:
  static constexpr int kPack = Dots::kPack, kParts = Dots::kParts;
  static constexpr int64_t kUnit = kLanes * kPack;  // elements of a vector of keys or values
  static constexpr int64_t kWeightRow = kSplitKeys / kPack * kParts;
  static constexpr int64_t kFewRows = 8;
  static constexpr int kWide = 4 / kParts;  // vectors computed together for kRowBlock rows

  struct Visible {
    int64_t first, last;  // none if first > last
  };

  // Of the split's keys, those that the query at `position` sees.
  Visible visible_keys(int64_t position, const KeyRows<Key>& rows) const {
    return {std::max<int64_t>(0, first_visible(position, p_.window) - rows.start),
            std::min(rows.count - 1, position - rows.start)};
  }

  // Those that some row of the block at `row` sees, or more.
  Visible visible_keys(const int64_t* positions, int64_t row, int64_t rows_of_item, const KeyRows<Key>& rows) const {
    const int64_t last_row = std::min(row + kRowBlock, rows_of_item) - 1;
    return {visible_keys(positions[row], rows).first, visible_keys(positions[last_row], rows).last};
  }

  // 16 keys as dwords: out[i] has dword `dword` + i of each.
  void load_square(const Key* const* keys, int64_t dword, __m512i (&square)[kLanes]) const {
    const int64_t d = dword * kPack, left = p_.k_dim - d;
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; j++) square[j] = Dots::load_key(keys[j] + d, left);
    transpose(square);
  }

  void prefetch_keys(const KeyRows<Key>& next, int64_t first) const {
    for (int64_t j = first; j < std::min(first + kLanes, next.count); j++)
      fetch(next.keys[j], p_.k_dim * sizeof(Key));
  }

  void prefetch_values(const KeyRows<Key>& next, int64_t first, int64_t count) const {
    for (int64_t j = first; j < std::min(first + count, next.count); j++)
      fetch(next.values[j], p_.v_dim * sizeof(Key));
  }

  template <int M>
  void score_rows(const KeyRows<Key>& rows, const KeyRows<Key>& next) {
    for (int64_t first = 0; first < rows.count; first += kLanes) {
      prefetch_keys(next, first);
      typename Dots::Sum sum[M];
      for (int m = 0; m < M; m++) sum[m] = Dots::start(offsets_[m]);
      for (int64_t dword = 0; dword < depth_; dword += kLanes) {  // queries are zero past depth_
        __m512i square[kLanes];
        load_square(rows.keys + first, dword, square);
        const int32_t* q = q_ + dword * kParts;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++)
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) Dots::add_key(sum[m], square[i], q + m * q_row_ + i * kParts);
      }
      for (int m = 0; m < M; m++) store(scores_ + m * kSplitKeys + first, Dots::score(sum[m]));
    }
  }

  void score_few(int64_t count, const KeyRows<Key>& rows, const KeyRows<Key>& next) {
    switch (count) {
      case 1: return score_rows<1>(rows, next);
      case 2: return score_rows<2>(rows, next);
      case 3: return score_rows<3>(rows, next);
      case 4: return score_rows<4>(rows, next);
      case 5: return score_rows<5>(rows, next);
      case 6: return score_rows<6>(rows, next);
      case 7: return score_rows<7>(rows, next);
      default: return score_rows<8>(rows, next);
    }
  }

  template <int N>
  void score_block(int64_t row, int64_t group) {
    typename Dots::Sum sum[kRowBlock][N];
    const int32_t *q = q_ + row * q_row_, *keys = keys_ + group * depth_ * kLanes;
    for (int m = 0; m < kRowBlock; m++)
      for (int n = 0; n < N; n++) sum[m][n] = Dots::start(offsets_[row + m]);
    for (int64_t dword = 0; dword < depth_; dword++) {
      __m512i key[N];
      for (int n = 0; n < N; n++) key[n] = _mm512_loadu_si512(keys + (n * depth_ + dword) * kLanes);
#pragma GCC unroll 6
      for (int m = 0; m < kRowBlock; m++)
        for (int n = 0; n < N; n++) Dots::add_key(sum[m][n], key[n], q + m * q_row_ + dword * kParts);
    }
    for (int m = 0; m < kRowBlock; m++)
      for (int n = 0; n < N; n++)
        store(scores_ + (row + m) * kSplitKeys + (group + n) * kLanes, Dots::score(sum[m][n]));
  }

  void score_many(int64_t count, const int64_t* positions, const KeyRows<Key>& rows, const KeyRows<Key>& next) {
    const int64_t groups = round_up(rows.count, kLanes) / kLanes;
    for (int64_t group = 0; group < groups; group++) {
      prefetch_keys(next, group * kLanes);
      for (int64_t dword = 0; dword < depth_; dword += kLanes) {
        __m512i square[kLanes];
        load_square(rows.keys + group * kLanes, dword, square);
        int32_t* to = keys_ + (group * depth_ + dword) * kLanes;
        const int64_t dwords = std::min<int64_t>(kLanes, depth_ - dword);
        for (int64_t i = 0; i < dwords; i++) _mm512_storeu_si512(to + i * kLanes, square[i]);
      }
    }
    for (int64_t group = 0; group < groups;) {
      const int64_t wide = group + kWide <= groups ? kWide : 1;
      for (int64_t row = 0; row < count; row += kRowBlock) {
        const Visible visible = visible_keys(positions, row, count, rows);
        if (visible.last < group * kLanes || visible.first >= (group + wide) * kLanes) continue;
        if (wide == kWide)
          score_block<kWide>(row, group);
        else
          score_block<1>(row, group);
      }
      group += wide;
    }
  }

  // acc[M, U vectors of values] += weights[M, steps] values[steps, U vectors]
  template <int M, int U>
  void add_rows(const KeyRows<Key>& rows, const KeyRows<Key>* next, int64_t row, int64_t d, float* acc) {
    typename Dots::Sum sum[M][U * kPack];
    float* to = acc + row * width_ + d;
    for (int m = 0; m < M; m++)
      for (int n = 0; n < U * kPack; n++) sum[m][n] = Dots::resume(to + m * width_ + n * kLanes);
    const int32_t* weights = weights_ + row * kWeightRow;
    for (int64_t j = 0; j < rows.count; j += kPack, weights += kParts) {
      if (next) prefetch_values(*next, j, kPack);
      __m512i values[U * kPack];
      for (int u = 0; u < U; u++) {
        __m512i loaded[kPack];
        for (int i = 0; i < kPack; i++)
          loaded[i] = Dots::load_value(rows.values[j + i] + d + u * kUnit, p_.v_dim - d - u * kUnit);
        Dots::interleave(loaded, values + u * kPack);
      }
      for (int m = 0; m < M; m++) {
        const typename Dots::Weight weight(weights + m * kWeightRow);
        for (int n = 0; n < U * kPack; n++) Dots::add_value(sum[m][n], weight, values[n]);
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < U * kPack; n++) Dots::pause(to + m * width_ + n * kLanes, sum[m][n]);
  }

  template <int M>
  void add_rows(const KeyRows<Key>& rows, const KeyRows<Key>& next, int64_t row, float* acc) {
    constexpr int kUnits = kParts == 1 ? 2 : 1;
    for (int64_t d = 0; d < width_;) {
      const auto* to_prefetch = row == 0 && d == 0 ? &next : nullptr;
      if (d + kUnits * kUnit <= width_) {
        add_rows<M, kUnits>(rows, to_prefetch, row, d, acc);
        d += kUnits * kUnit;
      } else {
        add_rows<M, 1>(rows, to_prefetch, row, d, acc);
        d += kUnit;
      }
    }
  }

  void add_few(int64_t count, const KeyRows<Key>& rows, const KeyRows<Key>& next, float* acc) {
    for (int64_t row = 0, some; row < count; row += some) {
      some = std::min<int64_t>(count - row, Dots::kValueRows);
      switch (some) {
        case 1: add_rows<1>(rows, next, row, acc); break;
        case 2: add_rows<2>(rows, next, row, acc); break;
        case 3: add_rows<3>(rows, next, row, acc); break;
        default: add_rows<Dots::kValueRows>(rows, next, row, acc);
      }
    }
  }

  template <int N>
  void add_block(int64_t row, int64_t first_step, int64_t end_step, const int32_t* values, float* acc) {
    typename Dots::Sum sum[kRowBlock][N];
    for (int m = 0; m < kRowBlock; m++)
      for (int n = 0; n < N; n++) sum[m][n] = Dots::resume(acc + m * width_ + n * kLanes);
    const int32_t* weights = weights_ + row * kWeightRow;
    for (int64_t step = first_step; step < end_step; step++, values += width_) {
      __m512i value[N];
      for (int n = 0; n < N; n++) value[n] = _mm512_loadu_si512(values + n * kLanes);
#pragma GCC unroll 6
      for (int m = 0; m < kRowBlock; m++) {
        const typename Dots::Weight weight(weights + m * kWeightRow + step * kParts);
        for (int n = 0; n < N; n++) Dots::add_value(sum[m][n], weight, value[n]);
      }
    }
    for (int m = 0; m < kRowBlock; m++)
      for (int n = 0; n < N; n++) Dots::pause(acc + m * width_ + n * kLanes, sum[m][n]);
  }

  void pack_values(const Key* const* rows, int64_t steps) {
    for (int64_t step = 0; step < steps; step++)
      for (int64_t d = 0; d < width_; d += kUnit) {
        __m512i loaded[kPack], values[kPack];
        for (int i = 0; i < kPack; i++) loaded[i] = Dots::load_value(rows[step * kPack + i] + d, p_.v_dim - d);
        Dots::interleave(loaded, values);
        for (int n = 0; n < kPack; n++) _mm512_storeu_si512(values_ + step * width_ + d + n * kLanes, values[n]);
      }
  }

  void add_many(int64_t count, const int64_t* positions, const KeyRows<Key>& rows, const KeyRows<Key>& next,
                float* acc) {
    for (int64_t first = 0; first < rows.count; first += kTileKeys) {
      prefetch_values(next, first, kTileKeys);
      const int64_t keys = std::min(kTileKeys, rows.count - first);
      pack_values(rows.values + first, (keys + kPack - 1) / kPack);
      for (int64_t row = 0; row < count; row += kRowBlock) {
        const Visible visible = visible_keys(positions, row, count, rows);
        const int64_t end = std::min(keys, visible.last + 1 - first);
        if (end <= 0 || visible.first >= first + keys) continue;
        const int64_t first_step = first / kPack, end_step = first_step + (end + kPack - 1) / kPack;
        for (int64_t d = 0; d < width_;) {
          float* to = acc + row * width_ + d;
          if (d + kWide * kLanes <= width_) {
            add_block<kWide>(row, first_step, end_step, values_ + d, to);
            d += kWide * kLanes;
          } else {
            add_block<2>(row, first_step, end_step, values_ + d, to);
            d += 2 * kLanes;
          }
        }
      }
    }
  }

  const Problem<T, Key>& p_;
  const int64_t width_, depth_, q_row_;
  int32_t *q_, *offsets_;
  float *factors_, *steps_, *key_scales_, *value_scales_, *scores_;
  int32_t *weights_, *keys_, *values_;
};

}  // namespace optc

#endif  // __AVX512VNNI__
