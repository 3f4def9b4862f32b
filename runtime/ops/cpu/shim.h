// C functions that a compiled step program calls directly, past PyTorch's dispatcher.
//
// AOTInductor derives the name and the arguments from the op: aoti_torch_cpu_NAME(arguments..., results...), where a
// tensor is an AtenTensorHandle, an optional one a pointer to it or null, a string a char pointer, a dtype an int32_t.
// `optimizer/lowering/shims.py` declares them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdio>
#include <optional>
#include <vector>

#include "check.h"

#define OPTC_SHIM extern "C" __attribute__((visibility("default"))) AOTITorchError

namespace optc {

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Char: return aoti_torch_dtype_int8();
    default: check(false, "no tensors of ", toString(dtype), " are made here");
  }
  return -1;
}

// A contiguous tensor on the CPU, its memory as it comes. new_empty would ask the dispatcher, at ten times the cost.
inline Tensor new_tensor(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, shape[d]);
  AtenTensorHandle handle;
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype_code(dtype),
                               aoti_torch_device_type_cpu(), 0, &handle);
  check(error == AOTI_TORCH_SUCCESS, "cannot make a tensor: out of memory");
  return Tensor::owning(handle);
}

}  // namespace optc

namespace optc::shim {

// The dtype of a code that a compiled program passes.
inline ScalarType dtype_of(int32_t code) {
  for (ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half})
    if (dtype_code(dtype) == code) return dtype;
  check(false, "unknown dtype code ", code);
  return ScalarType::Float;
}

inline Tensor borrow(AtenTensorHandle handle) { return Tensor(handle); }

inline std::optional<Tensor> borrow(const AtenTensorHandle* handle) {
  return handle ? std::optional<Tensor>(Tensor(*handle)) : std::nullopt;
}

// A handle that the caller owns.
inline void give(const Tensor& tensor, AtenTensorHandle* handle) { *handle = tensor.share(); }

// Exceptions must not leave a C function. What is wrong is printed: an error code is all the caller gets.
template <typename F>
inline AOTITorchError guarded(const char* op, const F& f) {
  try {
    f();
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "optc::%s: %s\n", op, error.what());
  } catch (...) {
    std::fprintf(stderr, "optc::%s: failed\n", op);
  }
  return AOTI_TORCH_FAILURE;
}

}  // namespace optc::shim
