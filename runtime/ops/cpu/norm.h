// RMSNorm of rows. A row is read twice, the second time from the first-level cache.
#pragma once

#include "rows.h"

namespace optc {

template <typename T, typename W>
inline void norm_row(const T* x, const W* weight, int64_t n, float eps, float weight_offset, T* out) {
  const float scale = inverse_rms(x, n, eps);
  for_each_vec(n, [&](int64_t i, auto read, auto write) {
    write(out + i, read(x + i) * scale * (read(weight + i) + weight_offset));
  });
}

template <typename T>
inline void add_row(const T* x, const T* y, int64_t n, T* out) {
  for_each_vec(n, [&](int64_t i, auto read, auto write) { write(out + i, read(x + i) + read(y + i)); });
}

// Calls f(T, W) with values of the types of x and of the weight: that of x, or float.
template <typename F>
inline void dispatch_norm(const char* op, const Tensor& x, const Tensor& weight, const F& f) {
  const bool is_float = weight.scalar_type() == ScalarType::Float;
  dispatch_float(op, x.scalar_type(), [&](auto type) {
    if (is_float) f(type, float()); else f(type, type);
  });
}

inline void check_norm(const char* op, const Tensor& x, const Tensor& weight) {
  check(x.dim() > 0, op, " expects x [..., D]");
  check_shape("weight", weight, {x.size(x.dim() - 1)});
  check_dtype("x", x, x.scalar_type());
  check_dtype("weight", weight, weight.scalar_type() == ScalarType::Float ? ScalarType::Float : x.scalar_type());
}

inline void check_sum(const char* op, const Tensor& x, const Tensor& residual) {
  check_dtype("residual", residual, x.scalar_type());
  check(x.sizes() == residual.sizes(), op, ": x and residual have different shapes");
}

}  // namespace optc
