// Argument checks: a message without file and line, because the reader is a user of the op.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace optc {

// Raises RuntimeError in Python unless `condition` holds.
template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (__builtin_expect(condition, 1)) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// `shape` is what `tensor` must look like; -1 stands for any size.
inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (auto size = shape.begin(); same && size != shape.end(); size++, dim++)
    same = *size == -1 || *size == tensor.size(dim);
  if (same) return;
  std::ostringstream message;
  message << name << " has shape [";
  for (int64_t d = 0; d < tensor.dim(); d++) message << (d ? ", " : "") << tensor.size(d);
  message << "], expected [";
  const char* separator = "";
  for (int64_t size : shape) {
    message << separator;
    separator = ", ";
    if (size == -1) message << "*"; else message << size;
  }
  check(false, message.str(), "]");
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  check(tensor.is_cpu(), name, " must be on the CPU");
  check(tensor.scalar_type() == dtype, name, " has dtype ", toString(tensor.scalar_type()), ", expected ",
        toString(dtype));
}

inline Tensor contiguous_copy(const Tensor& tensor) {
  return Tensor::owning(Tensor(torch::stable::contiguous(torch::stable::Tensor(tensor.share())).get()).share());
}

inline Tensor as_contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : contiguous_copy(tensor); }

// The tensor itself when the elements of its last dimension are adjacent, else a contiguous copy.
inline Tensor with_adjacent_elements(const Tensor& tensor) {
  int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : as_contiguous(tensor);
}

// Calls `f` with a value of the C++ type of `dtype`.
template <typename F>
inline void dispatch_float(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float());
    case ScalarType::BFloat16: return f(BFloat16());
    case ScalarType::Half: return f(Half());
    default: check(false, op, " supports float32, bfloat16 and float16 on the CPU, not ", toString(dtype));
  }
}

inline void check_float(const char* op, ScalarType dtype) {
  dispatch_float(op, dtype, [](auto) {});
}

}  // namespace optc
