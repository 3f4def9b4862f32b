// optc::linear_quantized, optc::grouped_mm_quantized and optc::embedding_quantized on the CPU.
//
// Weights are read once per panel of x rows: four rows of codes at a time become float32 in a thread's own memory and
// meet all rows of the panel there. An output is the sum of the same products in the same order whatever rows of x and
// of the weight are computed beside it, on any number of threads.

#include "quantized.h"
#include "shim.h"

namespace optc {
namespace {

constexpr int kWeightRows = 4;                    // expanded together
constexpr int kRows = kLanes == 16 ? 4 : 2;       // of x, multiplied together: their sums must fit the registers
constexpr int64_t kPanelFloats = 1 << 18;         // of x at one time: they stay in the second-level cache
constexpr int64_t kPadding = std::max(kLanes, 8);  // rows are padded with zeros to a multiple of this

// out[m][n] = x[m] . w[n]
template <int M>
void dot(const float* x, const float* w, int64_t width, float (*out)[kWeightRows]) {
  Vec sum[M][kWeightRows] = {};
  for (int64_t k = 0; k < width; k += kLanes) {
    Vec weight[kWeightRows];
    for (int n = 0; n < kWeightRows; n++) weight[n] = load(w + n * width + k);
    for (int m = 0; m < M; m++) {
      const Vec value = load(x + m * width + k);
      for (int n = 0; n < kWeightRows; n++) sum[m][n] += value * weight[n];
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < kWeightRows; n++) out[m][n] = reduce_sum(sum[m][n]);
}

void dot(int64_t rows, const float* x, const float* w, int64_t width, float (*out)[kWeightRows]) {
  if (rows == 1) return dot<1>(x, w, width, out);
  if (kRows == 2 || rows == 2) return dot<2>(x, w, width, out);
  if (rows == 3) return dot<3>(x, w, width, out);
  dot<4>(x, w, width, out);
}

// How many pieces of so many multiplications are worth waking a thread for.
int64_t grain(int64_t work) { return std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, work)); }

// out[rows, outputs] = x[rows, width] times the transposed rows start .. start + outputs - 1 of the weight, plus bias.
template <typename T>
void multiply_panel(const float* x, int64_t rows, int64_t width, const StoredWeight& weight, int64_t start,
                    int64_t outputs, const float* bias, T* out) {
  const int64_t tiles = (outputs + kWeightRows - 1) / kWeightRows;
  parallel_for(0, tiles, grain(kWeightRows * width * (rows + 4)), [&](int64_t begin, int64_t end) {
    std::vector<float> w(kWeightRows * width), scratch(weight.scratch());
    for (int64_t first = begin * kWeightRows; first < std::min(outputs, end * kWeightRows); first += kWeightRows) {
      const int64_t count = std::min<int64_t>(kWeightRows, outputs - first);
      for (int64_t n = 0; n < count; n++) {
        float* row = w.data() + n * width;
        weight.expand(start + first + n, row, scratch.data());
        std::fill(row + weight.columns(), row + width, 0.0f);
      }
      for (int64_t m = 0; m < rows; m += kRows) {
        float sums[kRows][kWeightRows];
        const int64_t together = std::min<int64_t>(kRows, rows - m);
        dot(together, x + m * width, w.data(), width, sums);
        for (int64_t i = 0; i < together; i++)
          for (int64_t n = 0; n < count; n++)
            out[(m + i) * outputs + first + n] = static_cast<T>(sums[i][n] + bias[first + n]);
      }
    }
  });
}

// Rows of x become float32, rounded as `activation` says, with zeros after the last column.
template <typename T>
void read_panel(const T* x, int64_t rows, int64_t columns, int64_t width, const Activation& activation, float* to) {
  parallel_for(0, rows, grain(4 * columns), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      float* row = to + m * width;
      load_row(x + m * columns, row, columns);
      std::fill(row + columns, row + width, 0.0f);
      activation.round(row, columns);
    }
  });
}

// out[rows, outputs] = x[rows, columns], rounded as `activation` says, times the same rows of the weight, plus bias.
template <typename T>
void multiply(const T* x, int64_t rows, const Activation& activation, const StoredWeight& weight, int64_t start,
              int64_t outputs, const float* bias, T* out) {
  const int64_t columns = weight.columns(), width = round_up(columns, kPadding);
  const int64_t together = std::min(rows, std::max<int64_t>(16, kPanelFloats / width));
  std::vector<float> panel(together * width);
  for (int64_t first = 0; first < rows; first += together) {
    const int64_t count = std::min(together, rows - first);
    read_panel(x + first * columns, count, columns, width, activation, panel.data());
    multiply_panel(panel.data(), count, width, weight, start, outputs, bias, out + first * outputs);
  }
}

Tensor linear_quantized(const Tensor& x_in, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
                        const std::optional<Tensor>& group_index, const std::optional<Tensor>& input_scale,
                        const std::optional<Tensor>& bias_in, int64_t bits, const std::vector<int64_t>& block,
                        const std::string& activation_name) {
  check(x_in.dim() > 0, "linear_quantized expects x [..., K]");
  const Tensor x = as_contiguous(x_in);
  const int64_t columns = x.size(x.dim() - 1);
  const StoredWeight weight(codes, scale, zero, group_index, columns, bits, block);
  const Activation activation(activation_name, input_scale, columns);
  std::vector<float> bias(weight.rows());
  if (bias_in) {
    check_shape("bias", *bias_in, {weight.rows()});
    read_floats("bias", as_contiguous(*bias_in), 0, weight.rows(), bias.data());
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.rows();
  check_float("linear_quantized", x.scalar_type());
  Tensor out = new_tensor(shape, x.scalar_type());

  dispatch_float("linear_quantized", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    multiply(static_cast<const T*>(x.data_ptr()), x.numel() / columns, activation, weight, 0, weight.rows(),
             bias.data(), static_cast<T*>(out.data_ptr()));
  });
  return out;
}

Tensor grouped_mm_quantized(const Tensor& x_in, const Tensor& codes, const Tensor& scale,
                            const std::optional<Tensor>& zero, const std::optional<Tensor>& group_index,
                            const std::optional<Tensor>& input_scale, const Tensor& offsets_in, int64_t bits,
                            const std::vector<int64_t>& block, const std::string& activation_name) {
  check_shape("x", x_in, {-1, -1});
  const Tensor x = as_contiguous(x_in), offsets = as_contiguous(offsets_in);
  const int64_t rows = x.size(0), columns = x.size(1);
  const StoredWeight weight(codes, scale, zero, group_index, columns, bits, block);
  const Activation activation(activation_name, input_scale, columns);
  check_dtype("offsets", offsets, ScalarType::Int);
  check_shape("offsets", offsets, {-1});
  const int64_t experts = offsets.size(0);
  check(experts > 0 && weight.rows() % experts == 0, weight.rows(), " rows of weight for ", experts,
        " experts, expected a multiple");
  const int64_t outputs = weight.rows() / experts;
  const auto* ends = static_cast<const int32_t*>(offsets.data_ptr());
  for (int64_t i = 0; i < experts; i++)
    check((i ? ends[i - 1] : 0) <= ends[i] && ends[i] <= rows, "offsets must rise from 0 to at most ", rows);
  const std::vector<float> bias(outputs);
  check_float("grouped_mm_quantized", x.scalar_type());
  Tensor out = new_tensor({rows, outputs}, x.scalar_type());

  dispatch_float("grouped_mm_quantized", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(x.data_ptr());
    auto* to = static_cast<T*>(out.data_ptr());
    int64_t start = 0;
    for (int64_t i = 0; i < experts; i++) {
      const int64_t end = ends[i];
      if (end > start)
        multiply(from + start * columns, end - start, activation, weight, i * outputs, outputs, bias.data(),
                 to + start * outputs);
      start = end;
    }
    std::fill(to + start * outputs, to + rows * outputs, static_cast<T>(0.0f));
  });
  return out;
}

Tensor embedding_quantized(const Tensor& ids_in, const Tensor& codes, const Tensor& scale,
                           const std::optional<Tensor>& zero, const std::optional<Tensor>& group_index, int64_t columns,
                           int64_t bits, const std::vector<int64_t>& block, ScalarType dtype) {
  const StoredWeight weight(codes, scale, zero, group_index, columns, bits, block);
  check_dtype("ids", ids_in, ScalarType::Long);
  const Tensor ids = as_contiguous(ids_in);
  const auto* id = static_cast<const int64_t*>(ids.data_ptr());
  const int64_t count = ids.numel();
  for (int64_t i = 0; i < count; i++)
    check(0 <= id[i] && id[i] < weight.rows(), "id ", id[i], " is outside of a table of ", weight.rows(), " rows");
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(columns);
  check_float("embedding_quantized", dtype);
  Tensor out = new_tensor(shape, dtype);

  dispatch_float("embedding_quantized", dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(out.data_ptr());
    parallel_for(0, count, grain(4 * columns), [&](int64_t begin, int64_t end) {
      std::vector<float> row(round_up(columns, 8)), scratch(weight.scratch());
      for (int64_t i = begin; i < end; i++) {
        weight.expand(id[i], row.data(), scratch.data());
        for (int64_t k = 0; k < columns; k++) to[i * columns + k] = static_cast<decltype(type)>(row[k]);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace optc

STABLE_TORCH_LIBRARY_IMPL(optc, CPU, m) {
  m.impl("linear_quantized", OPTC_BOX(optc::linear_quantized));
  m.impl("grouped_mm_quantized", OPTC_BOX(optc::grouped_mm_quantized));
  m.impl("embedding_quantized", OPTC_BOX(optc::embedding_quantized));
}
