// optc::rms_norm_a8, optc::add_rms_norm_a8, optc::silu_mul_a8 and optc::gelu_mul_a8 on the CPU: a row is made, rounded to its
// dtype and then to codes while it is in the first-level cache.

#include <cstdlib>
#include <string>
#include <vector>

#include "gated.h"
#include "norm.h"
#include "rounding.h"

namespace optc {
namespace {

// Room for a row that stays between calls.
template <typename T>
T* row_memory(int64_t n) {
  static thread_local std::vector<T> memory;
  if (static_cast<int64_t>(memory.size()) < n) memory.resize(n);
  return memory.data();
}

// Codes and steps of all rows; with the activation none, the numbers themselves and ones.
class Codes {
 public:
  Codes(const Tensor& x, const std::string& activation) : columns_(x.size(x.dim() - 1)) {
    is_rounded_ = activation != "none";
    group_ = std::max<int64_t>(1, columns_);
    if (activation.rfind("int8-group", 0) == 0)
      group_ = std::atoll(activation.c_str() + 10);
    else
      check(!is_rounded_ || activation == "int8-token", "unknown activation '", activation,
            "', expected none, int8-token, or int8-group and a number");
    check(group_ > 0, "activation '", activation, "' has groups of no columns");
    groups_ = is_rounded_ ? (columns_ + group_ - 1) / group_ : 1;
    codes = new_like(x, is_rounded_ ? ScalarType::Char : ScalarType::Float);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = groups_;
    steps = new_tensor(shape, ScalarType::Float);
    codes_ = codes.data_ptr();
    steps_ = static_cast<float*>(steps.data_ptr());
  }

  template <typename T>
  void write(int64_t i, const T* row) const {
    if (!is_rounded_) {
      load_row(row, static_cast<float*>(codes_) + i * columns_, columns_);
      steps_[i] = 1.0f;
      return;
    }
    float* wide = row_memory<float>(columns_);
    load_row(row, wide, columns_);
    auto* to = static_cast<int8_t*>(codes_) + i * columns_;
    for (int64_t g = 0, k = 0; g < groups_; g++, k += group_)
      steps_[i * groups_ + g] = round_group(wide + k, std::min(group_, columns_ - k), to + k);
  }

  Tensor codes, steps;

 private:
  bool is_rounded_;
  int64_t columns_, group_, groups_;
  void* codes_;
  float* steps_;
};

std::tuple<Tensor, Tensor> rms_norm_a8(const Tensor& x, const Tensor& weight_in, double eps, double weight_offset,
                                       const std::string& activation) {
  check_norm("rms_norm_a8", x, weight_in);
  const Rows rows(x);
  const Tensor weight = as_contiguous(weight_in);
  const Codes codes(x, activation);
  dispatch_norm("rms_norm_a8", x, weight, [&](auto type, auto weight_type) {
    using T = decltype(type);
    const auto* w = static_cast<const decltype(weight_type)*>(weight.data_ptr());
    const int64_t n = rows.columns();
    for_each_row(rows.count(), 2 * n, [&](int64_t i) {
      T* row = row_memory<T>(n);
      norm_row(rows.row<T>(i), w, n, static_cast<float>(eps), static_cast<float>(weight_offset), row);
      codes.write(i, row);
    });
  });
  return {codes.codes, codes.steps};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_a8(const Tensor& x, const Tensor& residual, const Tensor& weight_in,
                                                   double eps, double weight_offset, const std::string& activation) {
  check_norm("add_rms_norm_a8", x, weight_in);
  check_sum("add_rms_norm_a8", x, residual);
  const Rows rows(x), others(residual);
  const Tensor weight = as_contiguous(weight_in);
  const Codes codes(x, activation);
  Tensor sum = new_like(x);
  dispatch_norm("add_rms_norm_a8", x, weight, [&](auto type, auto weight_type) {
    using T = decltype(type);
    const auto* w = static_cast<const decltype(weight_type)*>(weight.data_ptr());
    auto* sums = static_cast<T*>(sum.data_ptr());
    const int64_t n = rows.columns();
    for_each_row(rows.count(), 2 * n, [&](int64_t i) {
      T* row = row_memory<T>(n);
      add_row(rows.row<T>(i), others.row<T>(i), n, sums + i * n);
      norm_row(sums + i * n, w, n, static_cast<float>(eps), static_cast<float>(weight_offset), row);
      codes.write(i, row);
    });
  });
  return {codes.codes, codes.steps, sum};
}

template <typename Activation>
std::tuple<Tensor, Tensor> gated_a8(const char* op, const Tensor& gate, const Tensor& up, const std::string& name,
                                    const Activation& activation) {
  check_gated(op, gate, up);
  const Rows gates(gate), ups(up);
  const Codes codes(gate, name);
  dispatch_float(op, gate.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t n = gates.columns();
    for_each_row(gates.count(), 4 * n, [&](int64_t i) {
      T* row = row_memory<T>(n);
      gated_row(gates.row<T>(i), ups.row<T>(i), n, activation, row);
      codes.write(i, row);
    });
  });
  return {codes.codes, codes.steps};
}

std::tuple<Tensor, Tensor> silu_mul_a8(const Tensor& gate, const Tensor& up, const std::string& activation) {
  return gated_a8("silu_mul_a8", gate, up, activation, Silu());
}

std::tuple<Tensor, Tensor> gelu_mul_a8(const Tensor& gate, const Tensor& up, bool tanh, const std::string& activation) {
  if (tanh) return gated_a8("gelu_mul_a8", gate, up, activation, GeluTanh());
  return gated_a8("gelu_mul_a8", gate, up, activation, GeluErf());
}

}  // namespace
}  // namespace optc

STABLE_TORCH_LIBRARY_IMPL(optc, CPU, m) {
  m.impl("rms_norm_a8", OPTC_BOX(optc::rms_norm_a8));
  m.impl("add_rms_norm_a8", OPTC_BOX(optc::add_rms_norm_a8));
  m.impl("silu_mul_a8", OPTC_BOX(optc::silu_mul_a8));
  m.impl("gelu_mul_a8", OPTC_BOX(optc::gelu_mul_a8));
}

using optc::shim::borrow;

OPTC_SHIM aoti_torch_cpu_rms_norm_a8(AtenTensorHandle x, AtenTensorHandle weight, double eps, double weight_offset,
                                     const char* activation, AtenTensorHandle* codes, AtenTensorHandle* steps) {
  return optc::shim::guarded("rms_norm_a8", [&] {
    optc::shim::give(optc::rms_norm_a8(borrow(x), borrow(weight), eps, weight_offset, activation), codes, steps);
  });
}

OPTC_SHIM aoti_torch_cpu_add_rms_norm_a8(AtenTensorHandle x, AtenTensorHandle residual, AtenTensorHandle weight,
                                         double eps, double weight_offset, const char* activation,
                                         AtenTensorHandle* codes, AtenTensorHandle* steps, AtenTensorHandle* sum) {
  return optc::shim::guarded("add_rms_norm_a8", [&] {
    optc::shim::give(optc::add_rms_norm_a8(borrow(x), borrow(residual), borrow(weight), eps, weight_offset, activation),
                     codes, steps, sum);
  });
}

OPTC_SHIM aoti_torch_cpu_silu_mul_a8(AtenTensorHandle gate, AtenTensorHandle up, const char* activation,
                                     AtenTensorHandle* codes, AtenTensorHandle* steps) {
  return optc::shim::guarded("silu_mul_a8", [&] {
    optc::shim::give(optc::silu_mul_a8(borrow(gate), borrow(up), activation), codes, steps);
  });
}

OPTC_SHIM aoti_torch_cpu_gelu_mul_a8(AtenTensorHandle gate, AtenTensorHandle up, int32_t tanh, const char* activation,
                                     AtenTensorHandle* codes, AtenTensorHandle* steps) {
  return optc::shim::guarded("gelu_mul_a8", [&] {
    optc::shim::give(optc::gelu_mul_a8(borrow(gate), borrow(up), tanh, activation), codes, steps);
  });
}
