// Stored weights and rounded activations on the CPU. Every number is the one that the reference in quantized.py gets.
#pragma once

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "check.h"

namespace optc {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Elements first .. first + count - 1 of a floating tensor, as float32.
inline void read_floats(const char* name, const Tensor& tensor, int64_t first, int64_t count, float* to) {
  dispatch_float(name, tensor.scalar_type(), [&](auto type) {
    load_row(static_cast<const decltype(type)*>(tensor.data_ptr()) + first, to, count);
  });
}

// A matrix [rows, columns] as the module docstring of quantized.py describes it. The constructor checks every part, so
// that nothing is read outside of a tensor later.
class StoredWeight {
 public:
  StoredWeight(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& zero,
               const std::optional<Tensor>& group_index, int64_t columns, int64_t bits,
               const std::vector<int64_t>& block)
      : weight_(as_contiguous(weight)), scale_(as_contiguous(scale)), columns_(columns), bits_(bits) {
    const ScalarType dtype = weight.scalar_type();
    const bool is_packed = dtype == ScalarType::Int;
    check(is_packed || dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn, "weight has dtype ",
          toString(dtype), ", expected Char, Float8_e4m3fn or Int");
    check(is_packed ? 2 <= bits && bits <= 7 : bits == 8, "weight has dtype ", toString(dtype),
          ", which does not hold codes of ", bits, " bits");
    check_shape("weight", weight, {-1, is_packed ? words(columns) : columns});
    check(columns > 0, "a row of weight must have elements");
    check(block.size() == 2 && block[0] > 0 && block[1] > 0, "block must be two positive numbers");
    rows_ = weight.size(0), block_rows_ = block[0], block_columns_ = block[1];
    groups_ = (columns + block_columns_ - 1) / block_columns_;
    const int64_t row_blocks = (rows_ + block_rows_ - 1) / block_rows_;
    check_shape("scale", scale, {row_blocks, groups_});
    check_floating("scale", scale);
    if (zero) {
      const ScalarType kind = zero->scalar_type();
      check_shape("zero", *zero, {kind == ScalarType::Int ? words(row_blocks) : row_blocks, groups_});
      if (kind != ScalarType::Int && kind != ScalarType::Char) check_floating("zero", *zero);
      zero_ = as_contiguous(*zero);
    }
    if (group_index) {
      check_shape("group_index", *group_index, {columns});
      check_dtype("group_index", *group_index, ScalarType::Int);
      group_index_ = as_contiguous(*group_index);
      const auto* group = static_cast<const int32_t*>(group_index_->data_ptr());
      bool is_inside = true;
      for (int64_t k = 0; k < columns; k++) is_inside &= group[k] >= 0 && group[k] < groups_;
      check(is_inside, "group_index names a group outside 0 to ", groups_ - 1);
    }
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }

  // How many floats `expand` needs to work in.
  int64_t scratch() const { return 2 * groups_; }

  // (code - zero) * scale of a row. `out` has room for the columns rounded up to a multiple of 8.
  void expand(int64_t row, float* out, float* scratch) const {
    decode(row, out);
    float *scales = scratch, *zeros = scratch + groups_;
    read_floats("scale", scale_, row / block_rows_ * groups_, groups_, scales);
    if (zero_) read_zeros(row / block_rows_, zeros); else std::fill_n(zeros, groups_, 0.0f);
    if (group_index_) {
      const auto* group = static_cast<const int32_t*>(group_index_->data_ptr());
      for (int64_t k = 0; k < columns_; k++) out[k] = (out[k] - zeros[group[k]]) * scales[group[k]];
      return;
    }
    for (int64_t g = 0; g < groups_; g++) {
      const int64_t end = std::min(columns_, (g + 1) * block_columns_);
      const float zero = zeros[g], scale = scales[g];
      for (int64_t k = g * block_columns_; k < end; k++) out[k] = (out[k] - zero) * scale;
    }
  }

 private:
  static void check_floating(const char* name, const Tensor& tensor) {
    check(tensor.is_cpu(), name, " must be on the CPU");
    dispatch_float(name, tensor.scalar_type(), [](auto) {});
  }

  // 32-bit words of a packed row.
  int64_t words(int64_t codes) const { return (codes * bits_ + 31) / 32; }

  // The codes of a row as float32.
  void decode(int64_t row, float* out) const {
    const void* data = weight_.data_ptr();
    const int64_t first = row * columns_;
    switch (weight_.scalar_type()) {
      case ScalarType::Char: return load_row(static_cast<const int8_t*>(data) + first, out, columns_);
      case ScalarType::Float8_e4m3fn: return load_row(static_cast<const Float8*>(data) + first, out, columns_);
      default: break;
    }
    switch (bits_) {
      case 2: return decode_packed<2>(row, out);
      case 3: return decode_packed<3>(row, out);
      case 4: return decode_packed<4>(row, out);
      case 5: return decode_packed<5>(row, out);
      case 6: return decode_packed<6>(row, out);
      default: return decode_packed<7>(row, out);
    }
  }

  // Eight codes are as many bytes as a code has bits. They fit one 32-bit word, or two take four each. A code that is
  // shifted to the top of its lane and back has its sign extended; the stored 2^(bits - 1) turns the sign bit over.
  template <uint32_t kBits>
  void decode_packed(int64_t row, float* out) const {
    typedef uint32_t Words __attribute__((vector_size(32)));
    typedef int32_t Codes __attribute__((vector_size(32)));
    typedef float Values __attribute__((vector_size(32)));
    constexpr uint32_t kTop = 32 - kBits, kSecond = kBits <= 4 ? kTop - 4 * kBits : kTop;
    const Words shifts{kTop,    kTop - kBits,    kTop - 2 * kBits,    kTop - 3 * kBits,
                       kSecond, kSecond - kBits, kSecond - 2 * kBits, kSecond - 3 * kBits};
    const int64_t bytes = 4 * words(columns_);
    const auto* from = static_cast<const uint8_t*>(weight_.data_ptr()) + row * bytes;
    for (int64_t k = 0, at = 0; k < columns_; k += 8, at += kBits) {
      uint64_t bits = 0;
      if (at + 8 <= bytes) std::memcpy(&bits, from + at, 8); else std::memcpy(&bits, from + at, bytes - at);
      const uint32_t a = bits, b = kBits <= 4 ? bits : bits >> (4 * kBits);
      const Words top = (Words{a, a, a, a, b, b, b, b} << shifts) ^ 0x80000000u;
      const Values values = __builtin_convertvector((Codes)top >> kTop, Values);
      std::memcpy(out + k, &values, sizeof values);
    }
  }

  void read_zeros(int64_t row, float* to) const {
    if (zero_->scalar_type() == ScalarType::Char) {
      const auto* from = static_cast<const int8_t*>(zero_->data_ptr()) + row * groups_;
      for (int64_t g = 0; g < groups_; g++) to[g] = static_cast<float>(from[g]);
    } else if (zero_->scalar_type() == ScalarType::Int) {
      const int64_t bit = row * bits_, shift = bit % 32;
      const auto* from = static_cast<const uint32_t*>(zero_->data_ptr()) + bit / 32 * groups_;
      const bool straddles = shift + bits_ > 32;
      for (int64_t g = 0; g < groups_; g++) {
        const uint64_t both = from[g] | (straddles ? static_cast<uint64_t>(from[g + groups_]) << 32 : 0);
        to[g] = static_cast<float>(static_cast<int32_t>(both >> shift & ((1u << bits_) - 1)) - (1 << (bits_ - 1)));
      }
    } else {
      read_floats("zero", *zero_, row * groups_, groups_, to);
    }
  }

  Tensor weight_, scale_;
  std::optional<Tensor> zero_, group_index_;
  int64_t rows_, columns_, bits_, block_rows_, block_columns_, groups_;
};

// Rounds activations to 8 bits and back, as `quantize_activations` in quantized.py does.
class Activation {
 public:
  Activation(const std::string& name, const std::optional<Tensor>& input_scale, int64_t columns) {
    if (name == "none") return;
    const size_t dash = name.find('-');
    const std::string kind = name.substr(0, dash), how = dash == std::string::npos ? "" : name.substr(dash + 1);
    largest_ = kind == "int8" ? 127.0f : kind == "fp8" ? 448.0f : 0.0f;
    group_ = how == "token" || how == "static" ? columns : how.rfind("group", 0) == 0 ? std::atoll(how.c_str() + 5) : 0;
    check(largest_ > 0 && group_ > 0, "unknown activation '", name, "', expected none, or int8 or fp8 and -token, ",
          "-static or -group and a number");
    if (how != "static") return;
    check(input_scale.has_value() && input_scale->numel() == 1, "activation '", name,
          "' needs an input_scale of one number");
    step_.emplace();
    read_floats("input_scale", *input_scale, 0, 1, &*step_);
  }

  void round(float* row, int64_t columns) const {
    if (largest_ == 0) return;
    for (int64_t first = 0; first < columns; first += group_) {
      float* part = row + first;
      const int64_t count = std::min(group_, columns - first);
      const float step = step_ ? *step_ : step_of(part, count);
      for (int64_t k = 0; k < count; k++) {
        float scaled = part[k] / step;
        scaled = scaled < -largest_ ? -largest_ : scaled > largest_ ? largest_ : scaled;
        part[k] = (largest_ == 127.0f ? round_to_integer(scaled) : round_to_e4m3(scaled)) * step;
      }
    }
  }

 private:
  float step_of(const float* row, int64_t count) const {
    float top = 0;
    for (int64_t k = 0; k < count; k++) {
      const float magnitude = from_bits(to_bits(row[k]) & 0x7fffffffu);
      top = magnitude > top ? magnitude : top;  // NaN is left out here, and stays NaN in its row
    }
    const float step = top / largest_;
    return step > 0 ? step : 1.0f;
  }

  // Ties to even: the sum has no bits below the one to round to.
  static float round_to_integer(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

  // The last of E4M3's three mantissa bits stands for 2^(exponent - 3), and for 2^-9 below the smallest normal 2^-6.
  static float round_to_e4m3(float x) {
    const uint32_t bits = to_bits(x), sign = bits & 0x80000000u, exponent = bits & 0x7f800000u;
    const uint32_t smallest = (127u - 6) << 23;
    const float shift = from_bits((exponent > smallest ? exponent : smallest) + (20u << 23));
    return from_bits(sign | to_bits((from_bits(bits ^ sign) + shift) - shift));
  }

  float largest_ = 0;          // 0: activations stay as they are
  int64_t group_ = 0;          // columns that share a step
  std::optional<float> step_;  // static
};

}  // namespace optc
