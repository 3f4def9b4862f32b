// optc::rms_norm and optc::add_rms_norm on the CPU.

#include "norm.h"

namespace optc {
namespace {

Tensor rms_norm(const Tensor& x, const Tensor& weight_in, double eps, double weight_offset) {
  check_norm("rms_norm", x, weight_in);
  const Rows rows(x);
  const Tensor weight = as_contiguous(weight_in);
  Tensor out = new_like(x);
  dispatch_norm("rms_norm", x, weight, [&](auto type, auto weight_type) {
    using T = decltype(type);
    const auto* w = static_cast<const decltype(weight_type)*>(weight.data_ptr());
    auto* to = static_cast<T*>(out.data_ptr());
    const int64_t n = rows.columns();
    for_each_row(rows.count(), n, [&](int64_t i) {
      norm_row(rows.row<T>(i), w, n, static_cast<float>(eps), static_cast<float>(weight_offset), to + i * n);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight_in, double eps,
                                        double weight_offset) {
  check_norm("add_rms_norm", x, weight_in);
  check_sum("add_rms_norm", x, residual);
  const Rows rows(x), others(residual);
  const Tensor weight = as_contiguous(weight_in);
  Tensor out = new_like(x), sum = new_like(x);
  dispatch_norm("add_rms_norm", x, weight, [&](auto type, auto weight_type) {
    using T = decltype(type);
    const auto* w = static_cast<const decltype(weight_type)*>(weight.data_ptr());
    T *to = static_cast<T*>(out.data_ptr()), *sums = static_cast<T*>(sum.data_ptr());
    const int64_t n = rows.columns();
    for_each_row(rows.count(), n, [&](int64_t i) {
      add_row(rows.row<T>(i), others.row<T>(i), n, sums + i * n);
      norm_row(sums + i * n, w, n, static_cast<float>(eps), static_cast<float>(weight_offset), to + i * n);
    });
  });
  return {out, sum};
}

}  // namespace
}  // namespace optc

STABLE_TORCH_LIBRARY_IMPL(optc, CPU, m) {
  m.impl("rms_norm", OPTC_BOX(optc::rms_norm));
  m.impl("add_rms_norm", OPTC_BOX(optc::add_rms_norm));
}

using optc::shim::borrow;

OPTC_SHIM aoti_torch_cpu_rms_norm(AtenTensorHandle x, AtenTensorHandle weight, double eps, double weight_offset,
                                  AtenTensorHandle* out) {
  return optc::shim::guarded("rms_norm", [&] {
    optc::shim::give(optc::rms_norm(borrow(x), borrow(weight), eps, weight_offset), out);
  });
}

OPTC_SHIM aoti_torch_cpu_add_rms_norm(AtenTensorHandle x, AtenTensorHandle residual, AtenTensorHandle weight, double eps,
                                      double weight_offset, AtenTensorHandle* normed, AtenTensorHandle* sum) {
  return optc::shim::guarded("add_rms_norm", [&] {
    optc::shim::give(optc::add_rms_norm(borrow(x), borrow(residual), borrow(weight), eps, weight_offset), normed, sum);
  });
}
