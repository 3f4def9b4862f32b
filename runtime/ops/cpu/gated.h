// The gate of a gated MLP: activation(gate) * up.
#pragma once

#include "rows.h"

namespace optc {

// x * sigmoid(x). Below -88 the result is under 1e-36, whatever exp makes of it.
struct Silu {
  Vec operator()(Vec x) const {
    const Vec negative = -x < 88.0f ? -x : splat(88.0f);
    return x / (1.0f + exp(negative));
  }
};

struct GeluTanh {
  Vec operator()(Vec x) const {
    const Vec inner = 0x1.988454p-1f * (x + 0.044715f * x * x * x);  // sqrt(2 / pi)
    return 0.5f * x * (1.0f + tanh(inner));
  }
};

// erf after Abramowitz and Stegun 7.1.26, within 1.5e-7.
struct GeluErf {
  Vec operator()(Vec x) const {
    const Vec z = x * 0x1.6a09e6p-1f;  // sqrt(1 / 2)
    const Vec magnitude = (Vec)((BitsVec)z & 0x7fffffffu), t = 1.0f / (1.0f + 0.3275911f * magnitude);
    Vec series = splat(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) series = series * t + c;
    const Vec complement = series * t * exp(-(magnitude * magnitude));  // 1 - erf(|z|)
    return 0.5f * x * (x < 0.0f ? complement : 2.0f - complement);
  }
};

template <typename T, typename Activation>
inline void gated_row(const T* gate, const T* up, int64_t n, const Activation& activation, T* out) {
  for_each_vec(n, [&](int64_t i, auto read, auto write) {
    write(out + i, activation(read(gate + i)) * read(up + i));
  });
}

inline void check_gated(const char* op, const Tensor& gate, const Tensor& up) {
  check(gate.dim() > 0 && gate.sizes() == up.sizes(), op, " expects gate and up of one shape [..., D]");
  check_dtype("gate", gate, gate.scalar_type());
  check_dtype("up", up, gate.scalar_type());
}

}  // namespace optc
