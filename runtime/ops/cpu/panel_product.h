// A panel of a packed weight times rows of x.
//
// Few rows of x meet the weights as they come from memory; for many rows a chunk of a panel is expanded into the
// first-level cache, and all rows meet it there. Integer codes with integer activations are summed up exactly, unit by
// unit, and only the sums are scaled. A unit's columns and the order of units depend on the layer alone.
#pragma once

#include "amx.h"
#include "operand.h"

namespace optc {

template <int M, typename F>
void with_rows(int64_t count, const F& f) {
  if constexpr (M > 1)
    if (count < M) return with_rows<M - 1>(count, f);
  f(std::integral_constant<int, M>());
}

// How far ahead weights are fetched where three or more rows meet them. One row or two leave the processor's own prefetcher
// enough time, and nothing was gained there.
constexpr int64_t kAhead = 6144, kRowsToFetch = 3;

// to + (sum + zero * start) * scale, the sum of a unit's products, where `zero` is null or the zero points divided by the offset
// of codes.
OPTC_INLINE Vec add_scaled(Vec to, IntVec sum, const float* zero, int32_t start, Vec scale) {
  Vec value = __builtin_convertvector(sum, Vec);
  if (zero) value = fmadd(load(zero), splat(static_cast<float>(start)), value);
  return fmadd(value, scale, to);
}

// c[M, 32] += the products of one unit of codes with rows row .. row + M - 1.
template <typename Stream, int M>
void integer_unit(const uint8_t* w, const RoundedRows& x, int64_t row, int64_t unit, int64_t columns,
                  const float* scales, const float* zeros, float* c) {
  const int32_t *start = x.starts + row * x.units + unit, *words = x.rows.block(row) + unit * x.unit / 4 * M;
  const float* steps = x.steps + row * x.steps_per_row + x.step_of[unit];
  for (int n = 0; n < kPanel; n += kTogether) {
    Sums<M, IntVec> sums;
    sums.each([&](int m, IntVec& a, IntVec& b) OPTC_LAMBDA { a = b = splat_int(start[m * x.units]); });
    Stream::template dot<M>(w + 4 * n, words, columns, sums);
    const Vec scale = load(scales + n), next_scale = load(scales + n + kLanes);
    const float *zero = zeros ? zeros + n : nullptr, *next_zero = zeros ? zero + kLanes : nullptr;
    sums.each([&](int m, IntVec& a, IntVec& b) OPTC_LAMBDA {
      const Vec step = splat(steps[m * x.steps_per_row]);
      float* to = c + m * kPanel + n;
      store(to, add_scaled(load(to), a, zero, start[m * x.units], scale * step));
      store(to + kLanes, add_scaled(load(to + kLanes), b, next_zero, start[m * x.units], next_scale * step));
    });
  }
}

// c[M, 32] = the products of rows row .. row + M - 1 of x with a panel: as by `integer_unit`, but the sums of all units stay in
// registers. `scales` are as they are stored.
template <typename Stream, int M, typename Scale>
void integer_panel_of_few(const PackedWeight& weight, int64_t panel, const RoundedRows& x, int64_t row, const Scale* scales,
                          const float* zeros, float* c) {
  const int64_t columns = weight.columns(), unit_bytes = weight.position(x.unit);
  for (int n = 0; n < kPanel; n += kTogether) {
    const uint8_t* w = weight.panel(panel) + 4 * n;
    const int32_t *start = x.starts + row * x.units, *words = x.rows.block(row);
    const float* steps = x.steps + row * x.steps_per_row;
    Sums<M, Vec> totals;
    totals.each([](int, Vec& a, Vec& b) OPTC_LAMBDA { a = b = Vec{}; });
    for (int64_t u = 0; u < x.units; u++, w += unit_bytes, words += x.unit / 4 * M, start++) {
      if (M >= kRowsToFetch) fetch(w + kAhead, unit_bytes);
      Sums<M, IntVec> sums;
      sums.each([&](int m, IntVec& a, IntVec& b) OPTC_LAMBDA { a = b = splat_int(start[m * x.units]); });
      Stream::template dot<M>(w, words, round_up(std::min(x.unit, columns - u * x.unit), Stream::kRun), sums);
      const int64_t at = x.group_of[u] * kPanel + n;
      const float *zero = zeros ? zeros + at : nullptr, *next_zero = zeros ? zero + kLanes : nullptr;
      const Vec scale = load(scales + at), next_scale = load(scales + at + kLanes);
      totals.each_with(sums, [&](int m, Vec& to, Vec& next_to, IntVec a, IntVec b) OPTC_LAMBDA {
        const Vec step = splat(steps[m * x.steps_per_row + x.step_of[u]]);
        to = add_scaled(to, a, zero, start[m * x.units], scale * step);
        next_to = add_scaled(next_to, b, next_zero, start[m * x.units], next_scale * step);
      });
    }
    totals.each([&](int m, Vec& a, Vec& b) OPTC_LAMBDA {
      store(c + m * kPanel + n, a), store(c + m * kPanel + n + kLanes, b);
    });
  }
}

#if defined(OPTC_TILES)
// c[rows, 32] += the products of units u0 .. u1 - 1 of a panel of bytes with rows first .. first + rows - 1 of x, by AMX: as by
// `integer_unit`.
inline void integer_tiles(const uint8_t* w, int64_t columns, const RoundedRows& x, int64_t first, int64_t rows, int64_t u0,
                          int64_t u1, const float* scales, const float* zeros, float* c) {
  alignas(64) int32_t sums[amx::kBlock * kPanel];
  const int64_t stride = 4 * x.rows.words_per_row;
  amx::begin(amx::shapes(x.tile_step));
  for (int64_t row = 0; row < rows; row += amx::kBlock) {
    const int64_t count = std::min<int64_t>(amx::kBlock, rows - row);
    for (int64_t u = u0; u < u1; u++) {
      const auto* codes = reinterpret_cast<const int8_t*>(x.rows.block(first + row)) + u * x.unit;
      const int64_t unit = std::min(x.unit, columns - u * x.unit);
      amx::unit(w + (u - u0) * x.unit * kPanel, codes, stride, count, unit, x.tile_step, sums);
      const int64_t at = x.group_of[u] * kPanel;
      for (int64_t m = 0; m < count; m++) {
        const int64_t line = first + row + m;
        const int32_t start = x.starts[line * x.units + u];
        const Vec step = splat(x.steps[line * x.steps_per_row + x.step_of[u]]);
        for (int n = 0; n < kPanel; n += kLanes) {
          float* to = c + (row + m) * kPanel + n;
          const IntVec sum = load_ints(sums + m * kPanel + n) + start;
          store(to, add_scaled(load(to), sum, zeros ? zeros + at + n : nullptr, start, load(scales + at + n) * step));
        }
      }
    }
  }
  amx::end();
}
#endif

// c[rows, 32] = the products of rows first .. first + rows - 1 of x with a panel. Up to kRows meet the weights as they come from
// memory; for more, a chunk of the panel is expanded and meets all of them.
template <typename Stream>
void integer_panel(const PackedWeight& weight, int64_t panel, const RoundedRows& x, int64_t first, int64_t rows,
                   const float* scales, const float* zeros, float* c) {
  const uint8_t* w = weight.panel(panel);
  const int64_t columns = weight.columns();
  std::fill_n(c, rows * kPanel, 0.0f);
  auto run_unit = [&](auto stream, auto m, const uint8_t* from, int64_t row, int64_t unit) {
    const int64_t k = unit * x.unit, count = round_up(std::min(x.unit, columns - k), decltype(stream)::kRun);
    const int64_t at = x.group_of[unit] * kPanel;
    integer_unit<decltype(stream), decltype(m)::value>(from, x, first + row, unit, count, scales + at,
                                                       zeros ? zeros + at : nullptr, c + row * kPanel);
  };
  if (rows <= kRows && !x.tile_step) {
    with_rows<kRows>(rows, [&](auto m) {
      for (int64_t u = 0; u < x.units; u++) {
        const uint8_t* from = w + weight.position(u * x.unit);
        fetch(from + kAhead, weight.position(x.unit));
        run_unit(Stream(), m, from, 0, u);
      }
    });
    return;
  }
  using Chunk = std::conditional_t<Stream::kExpandsForMany, ByteStream, Stream>;
  alignas(64) uint8_t bytes[Stream::kExpandsForMany ? kChunk * kPanel : 1];
  const int64_t together = std::max<int64_t>(1, kChunk / x.unit);
  const int64_t unit_bytes = Stream::kExpandsForMany ? x.unit * kPanel : weight.position(x.unit);
  for (int64_t u0 = 0; u0 < x.units; u0 += together) {
    const int64_t u1 = std::min(x.units, u0 + together), k = u0 * x.unit;
    const uint8_t* from = w + weight.position(k);
    if constexpr (Stream::kExpandsForMany) {
      expand_nibbles(from, round_up(std::min(u1 * x.unit, columns) - k, 8), bytes);
      from = bytes;
    }
    fetch(w + weight.position(u1 * x.unit), weight.position(together * x.unit));
#if defined(OPTC_TILES)
    if (x.tile_step) {
      integer_tiles(from, columns, x, first, rows, u0, u1, scales, zeros, c);
      continue;
    }
#endif
    for (int64_t row = 0; row < rows; row += kRows)
      with_rows<kRows>(std::min<int64_t>(kRows, rows - row), [&](auto m) {
        for (int64_t u = u0; u < u1; u++) run_unit(Chunk(), m, from + (u - u0) * unit_bytes, row, u);
      });
  }
}

// c[M, 32] += the products of one unit, times `scales` if there are any.
template <int M, typename Stream>
void float_unit(const Stream& stream, const uint8_t* w, const int32_t* x, int64_t columns, const float* scales, float* c) {
  for (int n = 0; n < kPanel; n += kTogether) {
    Sums<M, Vec> sums;
    sums.each([&](int m, Vec& a, Vec& b) OPTC_LAMBDA {
      const float* from = c + m * kPanel + n;
      a = scales ? Vec{} : load(from), b = scales ? Vec{} : load(from + kLanes);
    });
    stream.template dot<M>(w + 4 * n, x, columns, n, sums);
    sums.each([&](int m, Vec& a, Vec& b) OPTC_LAMBDA {
      float* to = c + m * kPanel + n;
      store(to, scales ? fmadd(a, load(scales + n), load(to)) : a);
      store(to + kLanes, scales ? fmadd(b, load(scales + n + kLanes), load(to + kLanes)) : b);
    });
  }
}

// Columns k .. k + count - 1 of a panel as float32 [count][32].
inline void expand_floats(const PackedWeight& weight, const uint8_t* w, int64_t count, const float* offset, uint8_t* to) {
  const int64_t run = run_of(weight.store());
  for (int64_t k = 0; k < count; k += run, w += run_bytes(weight.store()))
    for (int h = 0; h < 2; h++)
      expand_run(weight.store(), w, h, offset ? offset + kHalf * h : nullptr,
                 reinterpret_cast<float*>(to) + k * kPanel + kHalf * h, kPanel);
}

// The same as pairs of bfloat16.
inline void expand_pairs(const PackedWeight& weight, const uint8_t* w, int64_t count, const float* offset, uint8_t* to) {
#ifdef __AVX512BF16__
  if (weight.store() == Store::kNibbles && !weight.has_zero()) {
    const NibbleTable table;
    for (int64_t k = 0; k < count; k += 8, w += 4 * kPanel, to += 16 * kPanel)
      for (int i = 0; i < kPanel; i += kLanes) {
        IntVec pairs[4];
        table.pairs(load_ints(w + 4 * i), pairs);
        for (int j = 0; j < 4; j++) std::memcpy(to + j * 4 * kPanel + 4 * i, &pairs[j], sizeof pairs[j]);
      }
    return;
  }
#endif
  with_codes(weight.store(), [&](auto codes) {
    constexpr Store kStore = decltype(codes)::store;
    for (int64_t k = 0; k < count; k += run_of(kStore), w += run_bytes(kStore), to += run_of(kStore) * 2 * kPanel)
      for (int i = 0; i < kPanel; i += kLanes) {
        const BitsVec run = (BitsVec)load_ints(w + 4 * i);
        const Vec less = offset ? load(offset + i) : Vec{};
        for (int j = 0; j < run_of(kStore); j += 2) {
          const IntVec pair = code_pair<kStore>(run, j, less);
          std::memcpy(to + j * 2 * kPanel + 4 * i, &pair, sizeof pair);
        }
      }
  });
}

// c[M, 32] = the products of rows first_row .. first_row + M - 1 with a panel of codes: as by `float_panel`, but nothing is
// expanded in memory. make(offsets of a group) is the stream of numbers.
template <int M, typename Make>
void float_panel_of_few(const PackedWeight& weight, int64_t panel, const InterleavedRows& x, int64_t first_row, int64_t unit,
                        int64_t columns_a_word, const float* scales, const float* offsets, const Make& make, float* c) {
  const int64_t columns = weight.columns();
  std::fill_n(c, M * kPanel, 0.0f);
  for (int64_t k = 0; k < columns; k += unit) {
    const int64_t at = k / weight.group() * kPanel;
    const int32_t* words = x.block(first_row) + k / columns_a_word * M;
    float_unit<M>(make(offsets ? offsets + at : nullptr), weight.panel(panel) + weight.position(k), words,
                  std::min(unit, columns - k), scales + at, c);
  }
}

// c[rows, 32] = the products of rows of x with a panel. `offsets` are the zero points plus what codes are stored with, of
// each group.
template <typename Stream>
void float_panel(const PackedWeight& weight, int64_t panel, const InterleavedRows& x, int64_t first_row, int64_t rows,
                 int64_t unit, const float* scales, const float* offsets, float* c) {
  constexpr bool kPairs = !std::is_same_v<Stream, FloatStream>;
  const bool as_stored = weight.store() == (kPairs ? Store::kBFloat16 : Store::kFloat);
  const int64_t columns = weight.columns(), column_bytes = kPairs ? 2 * kPanel : 4 * kPanel;
  alignas(64) uint8_t expanded[kChunk * kPanel * 4];
  std::fill_n(c, rows * kPanel, 0.0f);
  const int64_t together = std::max<int64_t>(1, kChunk / unit) * unit;
  for (int64_t k = 0; k < columns; k += together) {
    const int64_t end = std::min(columns, k + together);
    const uint8_t* from = weight.panel(panel) + weight.position(k);
    if (!as_stored) {
      for (int64_t first = k; first < end; first += unit) {
        const uint8_t* w = weight.panel(panel) + weight.position(first);
        const int64_t count = round_up(std::min(unit, end - first), run_of(weight.store()));
        const float* offset = offsets ? offsets + first / weight.group() * kPanel : nullptr;
        uint8_t* to = expanded + (first - k) * column_bytes;
        kPairs ? expand_pairs(weight, w, count, offset, to) : expand_floats(weight, w, count, offset, to);
      }
      from = expanded;
    }
    for (int64_t row = 0; row < rows; row += kRows)
      with_rows<kRows>(std::min<int64_t>(kRows, rows - row), [&](auto m) {
        for (int64_t first = k; first < end; first += unit) {
          constexpr int kRowsNow = decltype(m)::value;
          const int64_t count = std::min(unit, end - first);
          float_unit<kRowsNow>(Stream(), from + (first - k) * column_bytes,
                               x.block(first_row + row) + first / (kPairs ? 2 : 1) * kRowsNow,
                               kPairs ? round_up(count, 2) : count,
                               scales ? scales + first / weight.group() * kPanel : nullptr, c + row * kPanel);
        }
      });
  }
}

}  // namespace optc
