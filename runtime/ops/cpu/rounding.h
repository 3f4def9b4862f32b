// Rounds activations to codes of 8 bits, and numbers to 16-bit floats.
#pragma once

#include <limits>
#include <type_traits>

#include "simd.h"

namespace optc {

// The nearest integers of numbers that are no larger than 127; ties go to the even one. Writes `n` bytes.
inline void store_codes(int8_t* to, Vec x, int64_t n) {
  const BitsVec codes = (BitsVec)(x + 0x1.8p23f) & 0xffu;  // the sum leaves round(x) in the low mantissa bits
#ifdef __AVX512F__
  if (n >= kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)codes));
#endif
  const ByteVec packed = __builtin_convertvector(codes, ByteVec);
  std::memcpy(to, &packed, n < kLanes ? n : kLanes);
}

// Codes of numbers x [n] with one step for them all: their largest magnitude over 127, or 1 if they are zeros; ties go to
// the even code. NaN and infinities make the step NaN, and with it all that is computed from the codes.
inline float round_group(const float* x, int64_t n, int8_t* codes) {
  BitsVec highest{};  // as integers, magnitudes have the order of their values, and NaN is above all
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const BitsVec magnitude = (BitsVec)load(x + i) & 0x7fffffffu;
    highest = magnitude > highest ? magnitude : highest;
  }
  uint32_t bits = 0;
  for (; i < n; i++) {
    uint32_t magnitude;
    std::memcpy(&magnitude, x + i, sizeof magnitude);
    bits = std::max(bits, magnitude & 0x7fffffffu);
  }
#ifdef __AVX512F__
  bits = std::max<uint32_t>(bits, _mm512_reduce_max_epu32((__m512i)highest));
#else
  for (int lane = 0; lane < kLanes; lane++) bits = std::max<uint32_t>(bits, highest[lane]);
#endif
  if (bits >= 0x7f800000u) {
    std::memset(codes, 0, n);
    return std::numeric_limits<float>::quiet_NaN();
  }
  float step;
  std::memcpy(&step, &bits, sizeof step);
  step /= 127.0f;
  if (!(step > 0)) step = 1.0f;
  for (i = 0; i + kLanes <= n; i += kLanes) store_codes(codes + i, load(x + i) / step, kLanes);
  if (i < n) {
    float rest[kLanes] = {};
    std::memcpy(rest, x + i, (n - i) * sizeof(float));
    store_codes(codes + i, load(rest) / step, n - i);
  }
  return step;
}

// The same with a given step; what is too large becomes the largest code.
inline void round_static(const float* x, int64_t n, float step, int8_t* codes) {
  for (int64_t i = 0; i < n; i += kLanes) {
    float part[kLanes] = {};
    const int64_t count = std::min<int64_t>(kLanes, n - i);
    std::memcpy(part, x + i, count * sizeof(float));
    Vec scaled = load(part) / step;
    scaled = scaled < -127.0f ? splat(-127.0f) : scaled > 127.0f ? splat(127.0f) : scaled;
    store_codes(codes + i, scaled, count);
  }
}

// Rounds `n` numbers to T; writes nothing past them.
template <typename T>
inline void store_row(const float* from, T* to, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (; i + 16 <= n; i += 16) {  // to nearest, ties to even; NaN keeps its sign and becomes quiet
      const BitsVec bits = (BitsVec)load(from + i);
      const BitsVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
      const BitsVec chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16((__m512i)chosen));
    }
  } else if constexpr (std::is_same_v<T, Half>) {
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm512_cvtps_ph((__m512)load(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; i++) to[i] = static_cast<T>(from[i]);
}

}  // namespace optc
