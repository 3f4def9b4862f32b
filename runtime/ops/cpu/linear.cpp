// optc::linear_packed, optc::linear_packed_a8 and optc::embedding_packed on the CPU.
//
// A step of few rows reads each weight once. An output is the sum of the same products in the same order whatever rows and
// outputs are computed beside it, on any number of threads.

#include "panel_product.h"
#include "shim.h"

namespace optc {
namespace {

constexpr int64_t kTile = 20 * kRows;  // rows of x that a panel meets at a time: they stay in the second-level cache
#if defined(OPTC_TILES)
static_assert(kTile % amx::kTileRows == 0, "rows are padded to whole tiles after the last one only");
#endif

// How many panels are worth waking a thread for.
int64_t grain(const PackedWeight& weight, int64_t rows) {
  return std::max<int64_t>(1, (32 << 10) / (weight.columns() * (4 + rows)));
}

// Runs multiply(panel, first row, rows, scales, zeros, c) for every panel and tile of rows, and writes c plus bias. `scales` is
// null where the weight has none, or where they are to be taken as they are stored.
template <typename T, typename F>
void for_panels(const PackedWeight& weight, int64_t rows, bool with_scales, bool with_offset,
                const std::optional<Tensor>& bias, T* out, const F& multiply) {
  const int64_t outputs = weight.outputs(), groups = weight.groups();
  parallel_for(0, weight.panels(), grain(weight, rows), [&](int64_t begin, int64_t end) {
    float* c = scratch<float, 0>((kTile + 2 * groups + 1) * kPanel);
    float *scales = c + kTile * kPanel, *zeros = scales + groups * kPanel, *addend = zeros + groups * kPanel;
    for (int64_t first = 0; first < rows; first += kTile) {
      const int64_t count = std::min(kTile, rows - first);
      for (int64_t panel = begin; panel < end; panel++) {
        const int64_t start = panel * kPanel, width = std::min<int64_t>(kPanel, outputs - start);
        if (with_scales) weight.read_scales(panel, scales);
        if (weight.has_zero()) weight.read_zeros(panel, zeros);
        if (weight.has_zero() && !with_offset)
          for (int64_t i = 0; i < groups * kPanel; i++) zeros[i] /= static_cast<float>(weight.offset());
        if (with_offset && weight.is_integer()) {
          if (!weight.has_zero()) std::fill_n(zeros, groups * kPanel, 0.0f);
          for (int64_t i = 0; i < groups * kPanel; i++) zeros[i] += static_cast<float>(weight.offset());
        }
        const bool has_zeros = weight.has_zero() || (with_offset && weight.is_integer());
        multiply(panel, first, count, with_scales ? scales : nullptr, has_zeros ? zeros : nullptr, c);
        if (bias) {
          read_floats("bias", *bias, start, width, addend);
          for (int64_t m = 0; m < count; m++)
            for (int64_t n = 0; n < width; n++) c[m * kPanel + n] += addend[n];
        }
        for (int64_t m = 0; m < count; m++) store_row(c + m * kPanel, out + (first + m) * outputs + start, width);
      }
    }
  }, weight.reads());
}

template <typename Stream, typename T>
void multiply_codes(const PackedWeight& weight, const RoundedRows& x, int64_t rows, const std::optional<Tensor>& bias,
                    T* out) {
  if (rows > kFewRows)
    return for_panels(weight, rows, true, false, bias, out,
                      [&](int64_t panel, int64_t first, int64_t count, const float* scales, const float* zeros, float* c) {
                        integer_panel<Stream>(weight, panel, x, first, count, scales, zeros, c);
                      });
  dispatch_float("scale", weight.scale_dtype(), [&](auto type) {
    with_rows<kFewRows>(rows, [&](auto m) {
      for_panels(weight, rows, false, false, bias, out,
                 [&](int64_t panel, int64_t first, int64_t, const float*, const float* zeros, float* c) {
                   integer_panel_of_few<Stream, decltype(m)::value>(
                       weight, panel, x, first, weight.scales<decltype(type)>(panel), zeros, c);
                 });
    });
  });
}

template <typename T>
void multiply_codes(const PackedWeight& weight, const RoundedRows& x, int64_t rows, const std::optional<Tensor>& bias,
                    T* out) {
  if (weight.store() == Store::kNibbles)
    multiply_codes<NibbleStream>(weight, x, rows, bias, out);
  else
    multiply_codes<ByteStream>(weight, x, rows, bias, out);
}

template <typename Stream, typename T>
void multiply_floats(const PackedWeight& weight, const InterleavedRows& x, int64_t rows,
                     const std::optional<Tensor>& bias, T* out) {
  const int64_t columns = weight.columns();
  const int64_t unit = unit_of(columns, weight.has_codes() ? weight.group() : columns, columns);
  for_panels(weight, rows, weight.has_codes(), true, bias, out,
             [&](int64_t panel, int64_t first, int64_t count, const float* scales, const float* zeros, float* c) {
               float_panel<Stream>(weight, panel, x, first, count, unit, scales, zeros, c);
             });
}

// Of few rows with codes: make(offsets of a group) makes numbers of them.
template <typename Make, typename T>
void multiply_few_floats(const PackedWeight& weight, const InterleavedRows& x, int64_t columns_a_word, int64_t rows,
                         const std::optional<Tensor>& bias, const Make& make, T* out) {
  const int64_t unit = unit_of(weight.columns(), weight.group(), weight.columns());
  with_rows<kFewFloatRows>(rows, [&](auto m) {
    for_panels(weight, rows, true, true, bias, out,
               [&](int64_t panel, int64_t first, int64_t, const float* scales, const float* zeros, float* c) {
                 float_panel_of_few<decltype(m)::value>(weight, panel, x, first, unit, columns_a_word, scales, zeros, make, c);
               });
  });
}

template <template <Store> typename Codes, typename T>
void multiply_few_codes(const PackedWeight& weight, const InterleavedRows& x, int64_t columns_a_word, int64_t rows,
                        const std::optional<Tensor>& bias, T* out) {
  with_codes(weight.store(), [&](auto codes) {
    const auto make = [](const float* offset) { return Codes<decltype(codes)::store>{offset}; };
    multiply_few_floats(weight, x, columns_a_word, rows, bias, make, out);
  });
}

// For each row, on several threads if it is worth it.
template <typename F>
void for_rows(int64_t rows, int64_t columns, const F& f) {
  parallel_for(0, rows, std::max<int64_t>(1, (16 << 10) / columns), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) f(m);
  });
}

struct ActivationKind {
  bool rounds = false, is_static = false;
  int64_t step_columns = 0;

  ActivationKind(const std::string& name, int64_t columns) : step_columns(columns) {
    if (name == "none") return;
    rounds = true, is_static = name == "int8-static";
    if (name.rfind("int8-group", 0) == 0) step_columns = std::min<int64_t>(columns, std::atoll(name.c_str() + 10));
    check(is_static || name == "int8-token" || (step_columns > 0 && name.rfind("int8-group", 0) == 0),
          "unknown activation '", name, "', expected none, int8-token, int8-static or int8-group and a number");
  }

  int64_t steps_per_row(int64_t columns) const { return (columns + step_columns - 1) / step_columns; }
};

// Memory for rows of codes that are being rounded or brought in, and what the kernels need to know of them.
struct RowsOfCodes {
  int64_t rows, columns, words;
  RoundedRows found;
  int32_t *to, *starts, offset;

  RowsOfCodes(const PackedWeight& weight, int64_t rows, const ActivationKind& kind, const float* steps)
      : rows(rows), columns(weight.columns()), words(round_up(columns, 8) / 4), offset(weight.offset()) {
    const int64_t unit = unit_of(columns, weight.group(), kind.step_columns), units = (columns + unit - 1) / unit;
    const int64_t tile_step = amx::available() && rows > kRows ? amx::step_of(unit, columns) : 0;
    const int64_t room = tile_step ? round_up(rows, amx::kTileRows) : rows;
    to = scratch<int32_t, 2>(room * words);
    std::fill(to + rows * words, to + room * words, 0);
    starts = scratch<int32_t, 1>(rows * units);
    auto* tables = scratch<int32_t, 6>(2 * units);
    for (int64_t u = 0; u < units; u++) {
      tables[u] = static_cast<int32_t>(u * unit / kind.step_columns);
      tables[units + u] = static_cast<int32_t>(u * unit / weight.group());
    }
    const InterleavedRows interleaved{to, words, tile_step ? 1 : kRows};
    found = {interleaved, steps, kind.steps_per_row(columns), starts, unit, units, tables, tables + units, tile_step};
  }

  // `codes` has zeros up to 4 * words.
  void put(int64_t row, const int32_t* codes) const {
    const auto* bytes = reinterpret_cast<const int8_t*>(codes);
    for (int64_t u = 0; u < found.units; u++)
      starts[row * found.units + u] =
          -offset * sum_codes(bytes + u * found.unit, std::min(found.unit, columns - u * found.unit));
    found.rows.put(codes, row, rows, to);
  }
};

template <typename T>
void round_and_multiply(const PackedWeight& weight, const T* x, int64_t rows, const ActivationKind& kind,
                        const std::optional<Tensor>& input_scale, const std::optional<Tensor>& bias, T* out) {
  const int64_t columns = weight.columns(), step = kind.step_columns, per_row = kind.steps_per_row(columns);
  auto* steps = scratch<float, 3>(rows * per_row);
  const RowsOfCodes into(weight, rows, kind, steps);
  float given = 0;
  if (kind.is_static) {
    check(input_scale.has_value() && input_scale->numel() == 1, "activation 'int8-static' needs an input_scale of one number");
    read_floats("input_scale", *input_scale, 0, 1, &given);
  }
  for_rows(rows, columns, [&](int64_t m) {
    auto* values = scratch<float, 4>(columns);
    auto* words = scratch<int32_t, 5>(into.words);
    auto* codes = reinterpret_cast<int8_t*>(words);
    load_row(x + m * columns, values, columns);
    words[into.words - 1] = words[into.words - 2] = 0;
    for (int64_t g = 0; g < per_row; g++) {
      const int64_t first = g * step, count = std::min(step, columns - first);
      if (kind.is_static)
        round_static(values + first, count, given, codes + first), steps[m * per_row + g] = given;
      else
        steps[m * per_row + g] = round_group(values + first, count, codes + first);
    }
    into.put(m, words);
  });
  multiply_codes(weight, into.found, rows, bias, out);
}

// Rows of x as numbers of type To, interleaved; zeros up to a multiple of 8 columns.
template <typename To, typename T>
InterleavedRows interleaved(const T* x, int64_t rows, int64_t columns) {
  const int64_t words = round_up(columns, 8) * static_cast<int64_t>(sizeof(To)) / 4;
  auto* to = scratch<int32_t, 2>(rows * words);
  const InterleavedRows found{to, words};
  for_rows(rows, columns, [&](int64_t m) {
    auto* row = scratch<int32_t, 5>(words);
    std::fill(row + std::max<int64_t>(0, words - 8), row + words, 0);
    if constexpr (std::is_same_v<To, T>)
      std::memcpy(row, x + m * columns, columns * sizeof(T));
    else
      load_row(x + m * columns, reinterpret_cast<float*>(row), columns);
    found.put(row, m, rows, to);
  });
  return found;
}

template <typename T>
void multiply_as_they_are(const PackedWeight& weight, const T* x, int64_t rows, const std::optional<Tensor>& bias,
                          T* out) {
  const int64_t columns = weight.columns();
  const bool few_codes = rows <= kFewFloatRows && weight.has_codes();
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, BFloat16>) {
    const bool codes_fit = weight.has_codes() && (!weight.has_zero() || weight.has_integer_zero());
    if (weight.store() == Store::kBFloat16 || codes_fit) {
      const InterleavedRows pairs = interleaved<BFloat16>(x, rows, columns);
      if (few_codes && weight.store() == Store::kNibbles && !weight.has_zero()) {
        const SignedNibblesAsPairs signed_codes;
        return multiply_few_floats(weight, pairs, 2, rows, bias, [&](const float*) { return signed_codes; }, out);
      }
      if (few_codes) return multiply_few_codes<CodesAsPairs>(weight, pairs, 2, rows, bias, out);
      return multiply_floats<PairStream>(weight, pairs, rows, bias, out);
    }
  }
#endif
  const InterleavedRows floats = interleaved<float>(x, rows, columns);
  if (few_codes) return multiply_few_codes<CodesAsFloats>(weight, floats, 1, rows, bias, out);
  multiply_floats<FloatStream>(weight, floats, rows, bias, out);
}

void check_bias(const std::optional<Tensor>& bias, int64_t outputs) {
  if (!bias) return;
  check_shape("bias", *bias, {outputs});
  check(bias->is_cpu() && bias->is_contiguous(), "bias must be contiguous and on the CPU");
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return shape;
}

Tensor linear_packed(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& zero, const std::optional<Tensor>& input_scale,
                     const std::optional<Tensor>& bias, int64_t outputs, int64_t bits, int64_t group,
                     const std::string& activation) {
  check(x_in.dim() > 0 && x_in.is_cpu(), "linear_packed expects x [..., K] on the CPU");
  const Tensor x = as_contiguous(x_in);
  const int64_t columns = x.size(x.dim() - 1);
  const PackedWeight weight(weight_in, scale, zero, outputs, columns, bits, group);
  const ActivationKind kind(activation, columns);
  check(!kind.rounds || weight.is_integer(), "activation '", activation, "' needs integer codes");
  check_bias(bias, outputs);
  dispatch_float("linear_packed", x.scalar_type(), [](auto) {});
  Tensor out = new_tensor(with_last(x, outputs), x.scalar_type());
  const int64_t rows = x.numel() / columns;
  dispatch_float("linear_packed", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* from = static_cast<const T*>(x.data_ptr());
    auto* to = static_cast<T*>(out.data_ptr());
    if (rows == 0) return;
    if (kind.rounds)
      round_and_multiply(weight, from, rows, kind, input_scale, bias, to);
    else
      multiply_as_they_are(weight, from, rows, bias, to);
  });
  return out;
}

Tensor linear_packed_a8(const Tensor& codes_in, const Tensor& steps_in, const Tensor& weight_in, const Tensor& scale_in,
                        const std::optional<Tensor>& zero, const std::optional<Tensor>& bias, int64_t outputs,
                        int64_t bits, int64_t group, ScalarType dtype, const std::string& activation) {
  if (activation == "none") {  // the numeric check of passes, in which nothing is rounded
    check_dtype("codes", codes_in, dtype);
    return linear_packed(codes_in, weight_in, scale_in, zero, std::nullopt, bias, outputs, bits, group, activation);
  }
  check_dtype("codes", codes_in, ScalarType::Char);
  check_dtype("steps", steps_in, ScalarType::Float);
  check(codes_in.dim() > 0 && steps_in.dim() == codes_in.dim(), "linear_packed_a8 expects codes [..., K] and steps [..., G]");
  const Tensor codes = as_contiguous(codes_in), steps = as_contiguous(steps_in);
  const int64_t columns = codes.size(codes.dim() - 1);
  const std::optional<Tensor> scale = scale_in;
  const PackedWeight weight(weight_in, scale, zero, outputs, columns, bits, group);
  const int64_t rows = codes.numel() / columns;
  const ActivationKind kind(activation, columns);
  check(kind.rounds && weight.is_integer(), "linear_packed_a8 needs integer codes and activations");
  const int64_t expected = rows * kind.steps_per_row(columns);
  check(steps.numel() == expected, "steps has ", steps.numel(), " elements, expected ", expected);
  check_bias(bias, outputs);
  Tensor out = new_tensor(with_last(codes, outputs), dtype);
  if (rows == 0) return out;
  const auto* data = static_cast<const int8_t*>(codes.data_ptr());
  const RowsOfCodes into(weight, rows, kind, static_cast<const float*>(steps.data_ptr()));
  for_rows(rows, columns, [&](int64_t m) {
    auto* words = scratch<int32_t, 5>(into.words);
    words[into.words - 1] = words[into.words - 2] = 0;
    std::memcpy(words, data + m * columns, columns);
    into.put(m, words);
  });
  dispatch_float("linear_packed_a8", dtype, [&](auto type) {
    multiply_codes(weight, into.found, rows, bias, static_cast<decltype(type)*>(out.data_ptr()));
  });
  return out;
}

Tensor embedding_packed(const Tensor& ids_in, const Tensor& weight_in, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& zero, int64_t outputs, int64_t columns, int64_t bits, int64_t group,
                        ScalarType dtype) {
  const PackedWeight weight(weight_in, scale, zero, outputs, columns, bits, group);
  check_dtype("ids", ids_in, ScalarType::Long);
  const Tensor ids = as_contiguous(ids_in);
  const auto* id = static_cast<const int64_t*>(ids.data_ptr());
  const int64_t count = ids.numel(), groups = weight.groups(), run = run_of(weight.store());
  for (int64_t i = 0; i < count; i++)
    check(0 <= id[i] && id[i] < outputs, "id ", id[i], " is outside of a table of ", outputs, " rows");
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(columns);
  Tensor out = new_tensor(shape, dtype);
  dispatch_float("embedding_packed", dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(out.data_ptr());
    for_rows(count, 32 * columns, [&](int64_t i) {
      const int64_t panel = id[i] / kPanel, lane = id[i] % kPanel, h = lane / kHalf;
      auto* scales = scratch<float, 0>(2 * groups * kPanel + round_up(columns, 8));
      float *zeros = scales + groups * kPanel, *row = zeros + groups * kPanel;
      if (weight.has_codes()) weight.read_scales(panel, scales);
      std::fill_n(zeros, groups * kPanel, 0.0f);
      if (weight.has_zero()) weight.read_zeros(panel, zeros);
      for (int64_t k = 0; k < columns; k += run) {
        float values[8 * kHalf];
        expand_run(weight.store(), weight.panel(panel) + weight.position(k), h, nullptr, values, kHalf);
        for (int64_t j = 0; j < std::min(run, columns - k); j++) {
          const float value = values[j * kHalf + lane % kHalf];
          const int64_t at = weight.has_codes() ? (k + j) / weight.group() * kPanel + lane : 0;
          const float code = value - static_cast<float>(weight.offset());
          row[k + j] = weight.has_codes() ? (code - zeros[at]) * scales[at] : value;
        }
      }
      store_row(row, to + i * columns, columns);
    });
  });
  return out;
}

}  // namespace
}  // namespace optc

STABLE_TORCH_LIBRARY_IMPL(optc, CPU, m) {
  m.impl("linear_packed", OPTC_BOX(optc::linear_packed));
  m.impl("linear_packed_a8", OPTC_BOX(optc::linear_packed_a8));
  m.impl("embedding_packed", OPTC_BOX(optc::embedding_packed));
}

using optc::shim::borrow;

OPTC_SHIM aoti_torch_cpu_linear_packed(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* scale,
                                       AtenTensorHandle* zero, AtenTensorHandle* input_scale, AtenTensorHandle* bias,
                                       int64_t outputs, int64_t bits, int64_t group, const char* activation,
                                       AtenTensorHandle* out) {
  return optc::shim::guarded("linear_packed", [&] {
    optc::shim::give(optc::linear_packed(borrow(x), borrow(weight), borrow(scale), borrow(zero), borrow(input_scale),
                                         borrow(bias), outputs, bits, group, activation),
                     out);
  });
}

OPTC_SHIM aoti_torch_cpu_linear_packed_a8(AtenTensorHandle codes, AtenTensorHandle steps, AtenTensorHandle weight,
                                          AtenTensorHandle scale, AtenTensorHandle* zero, AtenTensorHandle* bias,
                                          int64_t outputs, int64_t bits, int64_t group, int32_t dtype,
                                          const char* activation, AtenTensorHandle* out) {
  return optc::shim::guarded("linear_packed_a8", [&] {
    optc::shim::give(optc::linear_packed_a8(borrow(codes), borrow(steps), borrow(weight), borrow(scale), borrow(zero),
                                            borrow(bias), outputs, bits, group, optc::shim::dtype_of(dtype), activation),
                     out);
  });
}

OPTC_SHIM aoti_torch_cpu_embedding_packed(AtenTensorHandle ids, AtenTensorHandle weight, AtenTensorHandle* scale,
                                          AtenTensorHandle* zero, int64_t outputs, int64_t columns, int64_t bits,
                                          int64_t group, int32_t dtype, AtenTensorHandle* out) {
  return optc::shim::guarded("embedding_packed", [&] {
    optc::shim::give(optc::embedding_packed(borrow(ids), borrow(weight), borrow(scale), borrow(zero), outputs, columns,
                                            bits, group, optc::shim::dtype_of(dtype)),
                     out);
  });
}
