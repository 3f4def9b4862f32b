// Dot products of 16-bit and 8-bit elements, which the processor takes a dword (a pair or a quad of them) at a time.
//
// Scores add up dword by dword of the head dimension, values key by key, in one order whatever is computed beside them.
#pragma once

#include "quantized_cache.h"

#ifdef __AVX512VNNI__

namespace optc {

// `bytes` bytes, at most 64, and zeros after them. Reads nothing else.
inline __m512i load_bytes_or_zero(const void* from, int64_t bytes) {
  if (bytes >= 64) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi8((1ull << std::max<int64_t>(0, bytes)) - 1, from);
}

inline float highest_magnitude(BitsVec magnitudes) {
  const uint32_t bits = _mm512_reduce_max_epu32((__m512i)magnitudes);
  float highest;
  std::memcpy(&highest, &bits, sizeof highest);
  return highest;
}

// Transposes 16 x 16 dwords: within 128-bit blocks first, then the blocks.
inline void transpose(__m512i (&rows)[16]) {
  __m512i quads[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    quads[i] = _mm512_unpacklo_epi64(a, c);
    quads[i + 1] = _mm512_unpackhi_epi64(a, c);
    quads[i + 2] = _mm512_unpacklo_epi64(b, d);
    quads[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // block b of quads[i + 4 r] is column 4 b + i of rows 4 r .. 4 r + 3
    const __m512i even_low = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    rows[i + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    rows[i + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// INT8 keys and values. Queries and weights are integers of 16 bits in two parts, so sums are exact and their order is
// free. A product has one unsigned side: the keys, offset by 128, which a sum makes good at its start; the weights.
struct Quads {
  using Key = int8_t;
  static constexpr int kPack = 4;       // elements of a dword
  static constexpr int kParts = 2;      // dwords of a query or a weight for each of a key or a value
  static constexpr int kValueRows = 3;  // rows of weights whose sums fit the registers
  static constexpr float kLargestQuery = 127 * 256, kLargestWeight = 255 * 256;
  static constexpr int64_t kLargestDim = 512;  // sums of 127 * kLargestQuery fit 32 bits

  struct Sum {
    __m512i high, low;
    __m512i total() const { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
  };

  static Sum start(int32_t offset) { return {_mm512_setzero_si512(), _mm512_set1_epi32(offset)}; }

  // `left` elements of the row from `from` on, or as many as there are in a vector.
  static __m512i load_key(const Key* from, int64_t left) {
    return _mm512_xor_si512(load_value(from, left), _mm512_set1_epi8(-128));
  }
  static __m512i load_value(const Key* from, int64_t left) { return load_bytes_or_zero(from, left); }

  static void add_key(Sum& sum, __m512i keys, const int32_t* query) {
    sum.high = _mm512_dpbusd_epi32(sum.high, keys, _mm512_set1_epi32(query[0]));
    sum.low = _mm512_dpbusd_epi32(sum.low, keys, _mm512_set1_epi32(query[1]));
  }

  struct Weight {
    __m512i high, low;
    explicit Weight(const int32_t* at) : high(_mm512_set1_epi32(at[0])), low(_mm512_set1_epi32(at[1])) {}
  };
  static void add_value(Sum& sum, const Weight& weight, __m512i values) {
    sum.high = _mm512_dpbusd_epi32(sum.high, weight.high, values);
    sum.low = _mm512_dpbusd_epi32(sum.low, weight.low, values);
  }

  static Vec score(const Sum& sum) { return (Vec)_mm512_cvtepi32_ps(sum.total()); }

  // Sums of values between tiles are integers, in the place of the float32 results.
  static Sum resume(const float*) { return start(0); }
  static void pause(float* at, const Sum& sum) {
    _mm512_storeu_si512(at, _mm512_add_epi32(_mm512_loadu_si512(at), sum.total()));
  }

  // The results of a row, from integers to float32.
  static void finish(float* acc, int64_t width, float step) {
    for (int64_t d = 0; d < width; d += kLanes)
      store(acc + d, (Vec)_mm512_cvtepi32_ps(_mm512_loadu_si512(acc + d)) * step);
  }

  // A dword of a result has an element of each of the kPack rows. Within 128-bit blocks only: see `in_order`.
  static void interleave(const __m512i (&rows)[4], __m512i* out) {
    const __m512i a = _mm512_unpacklo_epi8(rows[0], rows[1]), b = _mm512_unpackhi_epi8(rows[0], rows[1]);
    const __m512i c = _mm512_unpacklo_epi8(rows[2], rows[3]), d = _mm512_unpackhi_epi8(rows[2], rows[3]);
    out[0] = _mm512_unpacklo_epi16(a, c);
    out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, d);
    out[3] = _mm512_unpackhi_epi16(b, d);
  }

  // 16 numbers in quads, the parts by turns. Signed parts are the nearest multiple of 256 and the rest.
  static void split(Vec x, bool is_signed, int32_t* to) {
    const __m512i whole = _mm512_cvtps_epi32((__m512)x);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(is_signed ? 128 : 0)), 8);
    const __m128i high_bytes = _mm512_cvtepi32_epi8(high), low_bytes = _mm512_cvtepi32_epi8(whole);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(high_bytes, low_bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4), _mm_unpackhi_epi32(high_bytes, low_bytes));
  }
};

#ifdef __AVX512BF16__

inline __m512i load_pairs(const BFloat16* from, int64_t left) { return load_bytes_or_zero(from, 2 * left); }

// E4M3 has the fields of bfloat16 with fewer bits; only the numbers below 2^-6 differ, and are looked up. NaN, which no
// cache holds, becomes 480.
inline __m512i load_pairs(const Float8* from, int64_t left) {
  const __mmask32 mask = left >= 32 ? ~0u : (1u << std::max<int64_t>(0, left)) - 1;
  const __m512i x = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, from));
  const __m512i small = _mm512_set_epi64(0, 0, 0, 0, 0, 0, 0x3c603c403c203c00, 0x3bc03b803b000000);
  const __m512i fields = _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi16(0x07f0));
  const __m512i normal = _mm512_add_epi16(fields, _mm512_set1_epi16(120 << 7));
  const __mmask32 is_small = _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x78));
  const __m512i magnitude = _mm512_mask_permutexvar_epi16(normal, is_small, x, small);
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16(-0x8000), x, magnitude, 0xca);  // the sign of x
}

// Keys and values that bfloat16 holds exactly, products and sums in float32.
template <typename K>
struct Pairs {
  using Key = K;
  static constexpr int kPack = 2;
  static constexpr int kParts = 1;
  static constexpr int kValueRows = 4;
  static constexpr int64_t kLargestDim = 1 << 30;

  using Sum = __m512;

  static Sum start(int32_t) { return _mm512_setzero_ps(); }

  static __m512i load_key(const Key* from, int64_t left) { return load_pairs(from, left); }
  static __m512i load_value(const Key* from, int64_t left) { return load_pairs(from, left); }

  static void add_key(Sum& sum, __m512i keys, const int32_t* query) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)keys, (__m512bh)_mm512_set1_epi32(query[0]));
  }

  struct Weight {
    __m512i pair;
    explicit Weight(const int32_t* at) : pair(_mm512_set1_epi32(at[0])) {}
  };
  static void add_value(Sum& sum, const Weight& weight, __m512i values) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)values, (__m512bh)weight.pair);
  }

  static Vec score(const Sum& sum) { return (Vec)sum; }

  static Sum resume(const float* at) { return _mm512_loadu_ps(at); }
  static void pause(float* at, const Sum& sum) { _mm512_storeu_ps(at, sum); }
  static void finish(float*, int64_t, float) {}

  // 16 numbers in pairs, and what they were rounded to.
  static Vec round(Vec x, int32_t* to) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
    return widen<BFloat16>((BitsVec)_mm512_cvtepu16_epi32(rounded));
  }

  static void interleave(const __m512i (&rows)[2], __m512i* out) {
    out[0] = _mm512_unpacklo_epi16(rows[0], rows[1]);
    out[1] = _mm512_unpackhi_epi16(rows[0], rows[1]);
  }
};

#endif  // __AVX512BF16__

// Results of interleaved values lie in the order of `interleave`; this is their natural one.
template <class Dots>
inline void in_order(const float* acc, float* to, int64_t width) {
  constexpr int kVectors = Dots::kPack;
  for (int64_t d = 0; d < width; d += kVectors * kLanes)
    for (int block = 0; block < 4; block++)
      for (int n = 0; n < kVectors; n++)
        std::memcpy(to + d + (block * kVectors + n) * 4, acc + d + n * kLanes + block * 4, 4 * sizeof(float));
}

}  // namespace optc

#endif  // __AVX512VNNI__
