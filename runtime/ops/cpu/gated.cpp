// optc::silu_mul and optc::gelu_mul on the CPU.

#include "gated.h"

namespace optc {
namespace {

template <typename Activation>
Tensor gated(const char* op, const Tensor& gate, const Tensor& up, const Activation& activation) {
  check_gated(op, gate, up);
  const Rows gates(gate), ups(up);
  Tensor out = new_like(gate);
  dispatch_float(op, gate.scalar_type(), [&](auto type) {
    using T = decltype(type);
    auto* to = static_cast<T*>(out.data_ptr());
    const int64_t n = gates.columns();
    // An exponential takes as long as several other operations.
    for_each_row(gates.count(), 4 * n, [&](int64_t i) {
      gated_row(gates.row<T>(i), ups.row<T>(i), n, activation, to + i * n);
    });
  });
  return out;
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) { return gated("silu_mul", gate, up, Silu()); }

Tensor gelu_mul(const Tensor& gate, const Tensor& up, bool tanh) {
  return tanh ? gated("gelu_mul", gate, up, GeluTanh()) : gated("gelu_mul", gate, up, GeluErf());
}

}  // namespace
}  // namespace optc

STABLE_TORCH_LIBRARY_IMPL(optc, CPU, m) {
  m.impl("silu_mul", OPTC_BOX(optc::silu_mul));
  m.impl("gelu_mul", OPTC_BOX(optc::gelu_mul));
}

using optc::shim::borrow;

OPTC_SHIM aoti_torch_cpu_silu_mul(AtenTensorHandle gate, AtenTensorHandle up, AtenTensorHandle* out) {
  return optc::shim::guarded("silu_mul", [&] { optc::shim::give(optc::silu_mul(borrow(gate), borrow(up)), out); });
}

OPTC_SHIM aoti_torch_cpu_gelu_mul(AtenTensorHandle gate, AtenTensorHandle up, int32_t tanh, AtenTensorHandle* out) {
  return optc::shim::guarded("gelu_mul", [&] { optc::shim::give(optc::gelu_mul(borrow(gate), borrow(up), tanh), out); });
}
