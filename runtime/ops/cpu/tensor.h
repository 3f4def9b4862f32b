// A tensor as kernels see it: what it looks like is asked for once, and a handle of somebody else's is not copied.
//
// torch::stable::Tensor allocates for every handle and crosses into the library for every question, which in a decode step
// of one token costs more than the small ops themselves.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>

namespace optc {

using torch::headeronly::ScalarType;

class Tensor {
 public:
  Tensor() = default;

  // The handle stays the caller's, who keeps it while this is used.
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    int64_t *sizes, *strides;
    int32_t device = 0;
    const bool known = aoti_torch_get_dim(handle, &dim_) == AOTI_TORCH_SUCCESS &&
                       aoti_torch_get_sizes(handle, &sizes) == AOTI_TORCH_SUCCESS &&
                       aoti_torch_get_strides(handle, &strides) == AOTI_TORCH_SUCCESS &&
                       aoti_torch_get_dtype(handle, &dtype_) == AOTI_TORCH_SUCCESS &&
                       aoti_torch_get_device_type(handle, &device) == AOTI_TORCH_SUCCESS &&
                       aoti_torch_get_data_ptr(handle, &data_) == AOTI_TORCH_SUCCESS;
    if (!known) throw std::runtime_error("a tensor without sizes and data");
    sizes_ = sizes, strides_ = strides, is_cpu_ = device == aoti_torch_device_type_cpu();
  }

  // Takes the handle over.
  static Tensor owning(AtenTensorHandle handle) {
    std::shared_ptr<AtenTensorOpaque> owner(handle, [](AtenTensorHandle own) { aoti_torch_delete_tensor_object(own); });
    Tensor tensor(handle);
    tensor.owner_ = std::move(owner);
    return tensor;
  }

  // A handle of the same tensor, which the caller owns.
  AtenTensorHandle share() const {
    AtenTensorHandle handle;
    if (aoti_torch_new_tensor_handle(handle_, &handle) != AOTI_TORCH_SUCCESS) throw std::runtime_error("out of memory");
    return handle;
  }

  AtenTensorHandle get() const { return handle_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  torch::headeronly::IntHeaderOnlyArrayRef sizes() const { return {sizes_, static_cast<size_t>(dim_)}; }
  torch::headeronly::IntHeaderOnlyArrayRef strides() const { return {strides_, static_cast<size_t>(dim_)}; }
  bool is_cpu() const { return is_cpu_; }
  void* data_ptr() const { return data_; }
  size_t element_size() const { return aoti_torch_dtype_element_size(dtype_); }

  ScalarType scalar_type() const {
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype_));
  }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dim_; d++) count *= sizes_[d];
    return count;
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim_ - 1; d >= 0; d--) {
      if (sizes_[d] == 0) return true;
      if (sizes_[d] != 1 && strides_[d] != expected) return false;
      expected *= sizes_[d];
    }
    return true;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
  std::shared_ptr<AtenTensorOpaque> owner_;  // of the handle; empty where that is the caller
  void* data_ = nullptr;
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;
  int64_t dim_ = 0;
  int32_t dtype_ = 0;
  bool is_cpu_ = false;
};

// What PyTorch's dispatcher passes, and what it gets back, for each type of ours.
template <typename T>
struct Boxed {
  using type = T;
  static const T& from(const T& value) { return value; }
  static const T& to(const T& value) { return value; }
};

template <>
struct Boxed<Tensor> {
  using type = torch::stable::Tensor;
  static Tensor from(const type& tensor) { return Tensor(tensor.get()); }
  static type to(const Tensor& tensor) { return type(tensor.share()); }
};

template <>
struct Boxed<std::optional<Tensor>> {
  using type = std::optional<torch::stable::Tensor>;
  static std::optional<Tensor> from(const type& tensor) {
    return tensor ? std::optional<Tensor>(Tensor(tensor->get())) : std::nullopt;
  }
};

template <typename... T>
struct Boxed<std::tuple<T...>> {
  using type = std::tuple<typename Boxed<T>::type...>;
  static type to(const std::tuple<T...>& values) {
    return std::apply([](const T&... value) { return type(Boxed<T>::to(value)...); }, values);
  }
};

// A kernel as PyTorch's dispatcher calls it.
template <auto kernel>
struct Boxer;

template <typename Result, typename... Args, Result (*kernel)(Args...)>
struct Boxer<kernel> {
  template <typename T>
  using Plain = std::remove_cv_t<std::remove_reference_t<T>>;

  static auto call(typename Boxed<Plain<Args>>::type... args) {
    if constexpr (std::is_void_v<Result>)
      kernel(Boxed<Plain<Args>>::from(args)...);
    else
      return Boxed<Result>::to(kernel(Boxed<Plain<Args>>::from(args)...));
  }
};

}  // namespace optc

#define OPTC_BOX(kernel) TORCH_BOX((&optc::Boxer<&kernel>::call))
