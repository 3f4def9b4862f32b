// A quantized KV cache: codes of 8 bits, and for every token and head a float32 scale of its key and one of its value.
//
// The block_size * (k_dim + v_dim + 8) bytes of a block and head are codes [block_size, k_dim + v_dim], a row a key and
// then its value, and scales f32[2, block_size], of the keys and then of the values. Scales may lie at any address.
#pragma once

#include <limits>
#include <type_traits>

#include "check.h"

namespace optc {

constexpr int64_t kScaleBytes = 4;

template <typename Code>
constexpr bool kIsCode = std::is_same_v<Code, int8_t> || std::is_same_v<Code, Float8>;

template <typename Code>
constexpr float kLargestCode = std::is_same_v<Code, int8_t> ? 127.0f : 448.0f;

inline bool is_quantized(const Tensor& kv_cache) {
  return kv_cache.scalar_type() == ScalarType::Char || kv_cache.scalar_type() == ScalarType::Float8_e4m3fn;
}

// Calls `f` with a value of the C++ type of a quantized cache's codes.
template <typename F>
inline void dispatch_codes(const Tensor& kv_cache, const F& f) {
  check(kv_cache.is_contiguous(), "a quantized kv_cache must be contiguous");
  if (kv_cache.scalar_type() == ScalarType::Char)
    f(int8_t());
  else
    f(Float8());
}

// What the scales of a token add to its row.
inline int64_t scale_elements(const Tensor& kv_cache) { return is_quantized(kv_cache) ? 2 * kScaleBytes : 0; }

inline float load_scale(const void* at) {
  float scale;
  std::memcpy(&scale, at, sizeof scale);
  return scale;
}

// The nearest codes of values that are no larger than the largest code; ties go to the even one. Each in a lane's low byte.
template <typename Code>
inline BitsVec encode(Vec x);

template <>
inline BitsVec encode<int8_t>(Vec x) {
  return (BitsVec)(x + 0x1.8p23f);  // leaves round(x) in the low mantissa bits
}

// E4M3 has 3 mantissa bits and an exponent bias of 7; numbers below 2^-6 are multiples of 2^-9.
template <>
inline BitsVec encode<Float8>(Vec x) {
  BitsVec sign = (BitsVec)x >> 24 & 0x80u, magnitude = (BitsVec)x & 0x7fffffffu;
  BitsVec normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
  BitsVec small = (BitsVec)((Vec)magnitude + 0x1p14f) - (BitsVec)splat(0x1p14f);
  return sign | ((Vec)magnitude < 0x1p-6f ? small : normal);
}

// Codes of a row x [n] and their scale. `x` has room for a multiple of kLanes and is overwritten past n. A row that
// holds NaN or an infinity gets codes of zero and that as its scale.
template <typename Code>
inline void quantize_row(float* x, int64_t n, Code* codes, void* scale_at) {
  const int64_t width = round_up(n, kLanes);
  std::fill(x + n, x + width, 0.0f);
  BitsVec highest{};  // as integers, magnitudes have the order of their values, and NaN is above all
  for (int64_t i = 0; i < width; i += kLanes) {
    BitsVec magnitude = (BitsVec)load(x + i) & 0x7fffffffu;
    highest = magnitude > highest ? magnitude : highest;
  }
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; lane++) bits = std::max<uint32_t>(bits, highest[lane]);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  largest /= kLargestCode<Code>;
  const float scale = largest < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : largest;
  std::memcpy(scale_at, &scale, sizeof scale);
  if (!(scale <= std::numeric_limits<float>::max())) {
    std::memset(codes, 0, n);
    return;
  }
  for (int64_t i = 0; i < width; i += kLanes) {
    ByteVec packed = __builtin_convertvector(encode<Code>(load(x + i) / scale) & 0xffu, ByteVec);
    std::memcpy(codes + i, &packed, std::min<int64_t>(kLanes, n - i));
  }
}

}  // namespace optc
