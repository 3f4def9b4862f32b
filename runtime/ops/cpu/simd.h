// One SIMD vocabulary for every instruction set: GCC vector extensions, as wide as the compiler's target allows.
//
// A kernel written with `Vec` and `kLanes` is compiled once per instruction set from the same source.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace optc {

using BFloat16 = torch::headeronly::BFloat16;
using Float8 = torch::headeronly::Float8_e4m3fn;
using Half = torch::headeronly::Half;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitsVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBitsVec __attribute__((vector_size(kLanes * 2)));
typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

// Memory that is needed soon, into the second-level cache: what is on its way to the first holds the entries that loads
// of the meantime need.
inline void fetch(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i, 0, 2);
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline Vec splat(float x) { return x - Vec{}; }  // not Vec{} + x, which would turn -0 into 0

inline IntVec lane_numbers() {
  IntVec lanes;
  for (int i = 0; i < kLanes; i++) lanes[i] = i;
  return lanes;
}

// Unaligned loads, widened to float32.

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline BitsVec load_half_bits(const void* p) {
#ifdef __AVX512F__  // GCC 12 makes four instructions of the conversion below
  return (BitsVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#else
  HalfBitsVec v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, BitsVec);
#endif
}

// The float32 values of 16-bit floats that are zero-extended to 32 bits.
template <typename T>
inline Vec widen(BitsVec bits);

template <>
inline Vec widen<BFloat16>(BitsVec bits) {
  return (Vec)(bits << 16);
}

// float16 puts exponent and mantissa 13 bits lower than float32 does; 2^112 corrects the exponent bias, exactly also for
// subnormals. Infinity and NaN keep an exponent of all ones.
template <>
inline Vec widen<Half>(BitsVec bits) {
  BitsVec magnitude = (bits & 0x7fffu) << 13;
  Vec finite = (Vec)magnitude * 0x1p112f;
  BitsVec special = magnitude | 0x7f800000u;
  BitsVec value = (bits & 0x7c00u) == 0x7c00u ? special : (BitsVec)finite;
  return (Vec)(value | (bits & 0x8000u) << 16);
}

inline Vec load(const BFloat16* p) { return widen<BFloat16>(load_half_bits(p)); }
inline Vec load(const Half* p) { return widen<Half>(load_half_bits(p)); }

inline BitsVec load_bytes(const void* p) {
#ifdef __AVX512F__
  return (BitsVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#elif defined(__AVX2__)  // nor of this one
  return (BitsVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
#else
  ByteVec v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, BitsVec);
#endif
}

inline Vec load(const int8_t* p) {
  return __builtin_convertvector((IntVec)(load_bytes(p) << 24) >> 24, Vec);  // the shift back extends the sign
}

// As for float16: exponent and mantissa lie 20 bits lower than in float32, and 2^120 corrects the exponent bias.
// All ones are NaN; there is no infinity.
inline Vec load(const Float8* p) {
  BitsVec bits = load_bytes(p);
  Vec magnitude = (Vec)((bits & 0x7fu) << 20) * 0x1p120f;
  BitsVec nan = (BitsVec)((bits & 0x7fu) == 0x7fu) & 0x7fc00000u;
  return (Vec)((BitsVec)magnitude | nan | (bits & 0x80u) << 24);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Converts `n` elements to float32; reads and writes nothing past them.
template <typename T>
inline void load_row(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = static_cast<float>(from[i]);
}

template <int... Lane>
inline Vec shuffle(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Lane...);
#else
  return __builtin_shuffle(a, b, IntVec{Lane...});
#endif
}

// Lanes `first`, first + 1, ... of a and b by turns.
template <int First, int... Lane>
inline Vec interleave(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
  return shuffle(a, b, std::integer_sequence<int, (First + Lane / 2 + (Lane % 2) * kLanes)...>());
}

template <int Distance, int... Lane>
inline Vec rotate(Vec v, std::integer_sequence<int, Lane...>) {
  return shuffle(v, v, std::integer_sequence<int, ((Lane + Distance) % kLanes)...>());
}

using Lanes = std::make_integer_sequence<int, kLanes>;

// Transposes kLanes x kLanes in registers. A round interleaves row i with row i + kLanes / 2, which moves the top bit of
// the row number to the bottom of the lane number; after log2(kLanes) rounds the two numbers have changed places.
inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++) {
      next[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], Lanes());
      next[2 * i + 1] = interleave<kLanes / 2>(rows[i], rows[i + kLanes / 2], Lanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) rows[i] = next[i];
  }
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

template <int Distance = kLanes / 2>
inline float reduce_max(Vec v) {
  if constexpr (Distance == 0) {
    return v[0];
  } else {
    return reduce_max<Distance / 2>(max(v, rotate<Distance>(v, Lanes())));
  }
}

template <int Distance = kLanes / 2>
inline float reduce_sum(Vec v) {
  if constexpr (Distance == 0) {
    return v[0];
  } else {
    return reduce_sum<Distance / 2>(v + rotate<Distance>(v, Lanes()));
  }
}

// exp(x) for x <= 88, within 2 units in the last place; 0 where the result would be subnormal, NaN stays NaN.
// x = n ln2 + r with |r| <= ln2 / 2, and exp(r) is its Taylor series (the first term left out is below 1e-8).
inline Vec exp(Vec x) {
  const float kRound = 0x1.8p23f;  // adding it leaves round(x) in the low mantissa bits
  Vec shifted = x * 0x1.715476p0f + kRound;
  Vec n = shifted - kRound;
  Vec r = x - n * 0x1.62e4p-1f;  // ln2 in two parts: n times the first is exact
  r = r - n * 0x1.7f7d1cp-20f;
  Vec p = splat(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  Vec result = (Vec)((BitsVec)p + ((BitsVec)shifted << 23));
  return x < -87.3f ? Vec{} : result;
}

inline float exp(float x) { return exp(splat(x))[0]; }

// Near zero (1 - e) / (1 + e) cancels, so there the odd Taylor series takes over.
inline Vec tanh(Vec x) {
  Vec magnitude = (Vec)((BitsVec)x & 0x7fffffffu), square = x * x;
  Vec e = exp(-2.0f * magnitude);
  Vec far = (1.0f - e) / (1.0f + e);
  Vec near = splat(62.0f / 2835);
  for (float c : {-17.0f / 315, 2.0f / 15, -1.0f / 3, 1.0f}) near = near * square + c;
  far = (Vec)((BitsVec)far | ((BitsVec)x & 0x80000000u));
  return magnitude < 0.25f ? near * x : far;
}

}  // namespace optc
