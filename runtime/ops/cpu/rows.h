// What the fused ops share: rows of floating-point numbers, where they lie and how they are read and rounded.
#pragma once

#include <tuple>

#include "check.h"
#include "shim.h"

namespace optc {

// Rounds to nearest, ties to even, as PyTorch does.
inline void store_as(float* p, Vec v) { store(p, v); }

inline void store_as(BFloat16* p, Vec v) {
  const BitsVec bits = (BitsVec)v;
  const BitsVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const HalfBitsVec narrow = __builtin_convertvector(v == v ? rounded : BitsVec{} + 0x7fc0u, HalfBitsVec);
  std::memcpy(p, &narrow, sizeof narrow);
}

inline void store_as(Half* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; i++) p[i] = static_cast<Half>(v[i]);
#endif
}

// The first n < kLanes elements, then zeros; nothing past them is read.
template <typename T>
inline Vec load_some(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <typename T>
inline void store_some(T* p, Vec v, int64_t n) {
  T lanes[kLanes];
  store_as(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

// Calls f(i, load, store) for the starts i of whole vectors and then of what is left of a row of n: load(p) and store(p, v) read
// and write no more than that.
template <typename F>
inline void for_each_vec(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    f(i, [](auto* p) { return load(p); }, [](auto* p, Vec v) { store_as(p, v); });
  if (i < n)
    f(i, [n = n - i](auto* p) { return load_some(p, n); }, [n = n - i](auto* p, Vec v) { store_some(p, v, n); });
}

// `v` rounded to T and back.
template <typename T>
inline Vec rounded_to(Vec v) {
  T lanes[kLanes];
  store_as(lanes, v);
  return load(lanes);
}

template <>
inline Vec rounded_to<float>(Vec v) { return v; }

// The rows of a tensor: its last dimension, whose elements are adjacent. A copy is made only where the dimensions before it do
// not lie as two do at most; a slice of every row, or of every head of every token, is read where it lies.
class Rows {
 public:
  explicit Rows(const Tensor& tensor) : tensor_(tensor) {
    if (describe()) return;
    tensor_ = contiguous_copy(tensor);
    describe();
  }

  int64_t count() const { return count_; }
  int64_t columns() const { return columns_; }

  template <typename T>
  const T* row(int64_t i) const {
    const T* data = static_cast<const T*>(data_);
    return inner_ == count_ ? data + i * inner_stride_ : data + i / inner_ * outer_stride_ + i % inner_ * inner_stride_;
  }

 private:
  bool describe() {
    const auto sizes = tensor_.sizes(), strides = tensor_.strides();
    const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
    data_ = tensor_.data_ptr();
    columns_ = sizes[last];
    count_ = inner_ = 1, inner_stride_ = columns_, outer_stride_ = 0;
    int64_t outer = 1;
    if (columns_ > 1 && strides[last] != 1) return false;
    for (int64_t d = last - 1; d >= 0; d--) {
      const int64_t size = sizes[d];
      count_ *= size;
      if (size == 1) continue;
      if (inner_ == 1) {
        inner_ = size, inner_stride_ = strides[d];
      } else if (outer == 1 && strides[d] == inner_ * inner_stride_) {
        inner_ *= size;
      } else if (outer == 1) {
        outer = size, outer_stride_ = strides[d];
      } else if (strides[d] == outer * outer_stride_) {
        outer *= size;
      } else {
        return false;
      }
    }
    return true;
  }

  Tensor tensor_;
  const void* data_;
  int64_t count_, columns_, inner_, inner_stride_, outer_stride_;
};

// An empty tensor of x's shape.
inline Tensor new_like(const Tensor& x, ScalarType dtype) {
  const auto sizes = x.sizes();
  return new_tensor({sizes.begin(), sizes.end()}, dtype);
}

inline Tensor new_like(const Tensor& x) { return new_like(x, x.scalar_type()); }

// Calls f(i) for every row. A thread is worth waking for about 32 Ki elements.
template <typename F>
inline void for_each_row(int64_t count, int64_t columns, const F& f) {
  const int64_t grain = std::max<int64_t>(1, (32 << 10) / std::max<int64_t>(1, columns));
  if (count <= grain) {
    for (int64_t i = 0; i < count; i++) f(i);
    return;
  }
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

// Four sums, so that additions do not wait for one another. Which numbers meet is decided by their place in the row alone.
template <typename T>
inline float sum_of_squares(const T* x, int64_t n) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; j++) {
      const Vec v = load(x + i + j * kLanes);
      sums[j] += v * v;
    }
  for_each_vec(n - i, [&](int64_t j, auto read, auto) {
    const Vec v = read(x + i + j);
    sums[0] += v * v;
  });
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// What an RMSNorm multiplies a row by, before the weight.
template <typename T>
inline float inverse_rms(const T* x, int64_t n, float eps) {
  return 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + eps);
}

}  // namespace optc

namespace optc::shim {

// Several results, each with the handle that takes it.
template <typename... Tensors, typename... Handles>
inline void give(const std::tuple<Tensors...>& tensors, Handles... handles) {
  std::apply([&](const auto&... tensor) { (give(tensor, handles), ...); }, tensors);
}

}  // namespace optc::shim
