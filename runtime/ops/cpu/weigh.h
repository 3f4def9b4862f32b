// From queries to what dot products take, and from scores to weights.
//
// Rows are handled one at a time by code that exists once (noinline), lest the compiler contract products and sums
// differently for different callers.
#pragma once

#include "dot.h"
#include "partial.h"

#ifdef __AVX512VNNI__

namespace optc {

// Writes a query as dwords, with zeros up to the next vector of them already there. Returns what its products are to be
// multiplied by.
template <class Dots>
__attribute__((noinline)) float load_query(const BFloat16* from, int64_t n, int32_t* to, int32_t& offset) {
  offset = 0;
  if constexpr (Dots::kParts == 1) {
    std::memcpy(to, from, n * sizeof(BFloat16));
    return 1;
  } else {
    Vec parts[round_up(Dots::kLargestDim, kLanes) / kLanes];
    BitsVec highest{};  // as integers, magnitudes have the order of their values, and NaN is above all
    int64_t count = 0;
    for (int64_t d = 0; d < n; d += kLanes, count++) {
      const __m512i bits = load_bytes_or_zero(from + d, std::min<int64_t>(2 * (n - d), 32));
      parts[count] = widen<BFloat16>((BitsVec)_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)));
      const BitsVec magnitude = (BitsVec)parts[count] & 0x7fffffffu;
      highest = magnitude > highest ? magnitude : highest;
    }
    const float largest = highest_magnitude(highest);
    const float inverse = largest > 1e-30f ? Dots::kLargestQuery / largest : 0;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i++) {
      const Vec scaled = parts[i] * inverse;
      sum = _mm512_add_epi32(sum, _mm512_cvtps_epi32((__m512)scaled));
      Dots::split(scaled, true, to + i * kLanes / Dots::kPack * Dots::kParts);
    }
    uint32_t total = 0;  // of codes that are no numbers if the query holds NaN: it wraps around
    for (int lane = 0; lane < kLanes; lane++) total += ((BitsVec)sum)[lane];
    offset = static_cast<int32_t>(total * -128u);
    return largest / Dots::kLargestQuery;
  }
}

// The raw scores [columns] of a row, of which it sees `first` to `last`; columns is a multiple of kLanes.
struct ScoreRow {
  float* scores;
  int64_t first, last, columns;
};

struct ScoreOptions {
  float factor, softcap;
  const float *key_scales, *value_scales;  // of codes
};

// Scores become weights, relative to their maximum and with the scales of the values in them; unseen keys get zero.
// Returns what products with the weights are to be multiplied by.
template <class Dots>
__attribute__((noinline)) float weigh(const ScoreRow& row, const ScoreOptions& options, int32_t* weights,
                                      float& row_max, float& row_sum) {
  constexpr bool kCodes = kIsCode<typename Dots::Key>;
  const Vec hidden = splat(-std::numeric_limits<float>::infinity());
  row_max = hidden[0];
  row_sum = 0;
  const auto weights_of = [&](int64_t column) { return weights + column / Dots::kPack * Dots::kParts; };
  const int64_t begin = std::min(row.columns, row.first / kLanes * kLanes);
  const int64_t end = row.last < row.first ? begin : round_up(row.last + 1, kLanes);
  std::fill(weights, weights_of(begin), 0);
  std::fill(weights_of(end), weights_of(row.columns), 0);
  if (begin == end) return 0;

  Vec highest = hidden;
  for (int64_t j = begin; j < end; j += kLanes) {
    Vec score = load(row.scores + j) * options.factor;
    if constexpr (kCodes) score *= load(options.key_scales + j);
    if (options.softcap > 0) score = options.softcap * tanh(score / options.softcap);
    if (j < row.first || j + kLanes - 1 > row.last) {
      const IntVec key = lane_numbers() + static_cast<int32_t>(j);
      const IntVec visible = (key >= static_cast<int32_t>(row.first)) & (key <= static_cast<int32_t>(row.last));
      score = visible ? score : hidden;
    }
    store(row.scores + j, score);
    highest = max(highest, score);
  }
  row_max = reduce_max(highest);

  Vec sum{};
  BitsVec largest{};  // NaN is above all
  for (int64_t j = begin; j < end; j += kLanes) {
    Vec weight = exp(load(row.scores + j) - row_max);
    if constexpr (!kCodes) {
      sum += Dots::round(weight, weights_of(j));
    } else {
      sum += weight;
      weight = weight > 0.0f ? weight * load(options.value_scales + j) : Vec{};  // the scales of unseen keys may be NaN
      if constexpr (Dots::kParts == 1) {
        Dots::round(weight, weights_of(j));
      } else {
        store(row.scores + j, weight);
        const BitsVec magnitude = (BitsVec)weight & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
    }
  }
  row_sum = reduce_sum(sum);
  if constexpr (Dots::kParts == 1) {
    return 1;
  } else {
    const float most = highest_magnitude(largest);
    const float inverse = most > 1e-30f ? Dots::kLargestWeight / most : 0;
    for (int64_t j = begin; j < end; j += kLanes) Dots::split(load(row.scores + j) * inverse, false, weights_of(j));
    return most / Dots::kLargestWeight;
  }
}

}  // namespace optc

#endif  // __AVX512VNNI__
