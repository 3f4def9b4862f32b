// The operands of a packed linear layer: its weight, and x rounded to codes. The constructors check every part, so that
// nothing is read outside of a tensor later.
#pragma once

#include <optional>
#include <string>

#include "panel.h"
#include "quantized.h"
#include "rounding.h"
#include "scratch.h"

namespace optc {

// A weight [outputs, columns] as the module docstring of packed.py describes it.
class PackedWeight {
 public:
  PackedWeight(const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& zero,
               int64_t outputs, int64_t columns, int64_t bits, int64_t group)
      : outputs_(outputs), columns_(columns), store_(store_of(weight, bits)) {
    check(outputs > 0 && columns > 0, "a packed weight must have rows and columns");
    panels_ = (outputs + kPanel - 1) / kPanel;
    const int64_t run = run_of(store_), runs = (columns + run - 1) / run;
    check_shape("weight", weight, {panels_, runs, store_ == Store::kNibbles ? 128 : run * kPanel});
    check(weight.is_cpu() && weight.is_contiguous(), "weight must be contiguous and on the CPU");
    panel_bytes_ = runs * run_bytes(store_);
    check(scale.has_value() == has_codes(), "codes need a scale, and other weights have none");
    data_ = static_cast<const uint8_t*>(weight.data_ptr());
    if (!scale) return;
    check(group > 0, "group must be positive");
    group_ = std::min(group, columns);
    groups_ = (columns + group_ - 1) / group_;
    check(groups_ == 1 || group_ % 8 == 0, "groups of ", group_, " columns, expected a multiple of 8");
    scale_ = groups_of("scale", *scale);
    check(scale_.dtype != ScalarType::Char, "scale must be floating");
    if (zero) zero_ = groups_of("zero", *zero);
  }

  int64_t outputs() const { return outputs_; }
  int64_t columns() const { return columns_; }
  int64_t panels() const { return panels_; }
  int64_t group() const { return group_; }
  int64_t groups() const { return groups_; }
  Store store() const { return store_; }
  bool has_codes() const { return is_integer() || store_ == Store::kFloat8; }
  bool is_integer() const { return store_ == Store::kNibbles || store_ == Store::kBytes; }
  bool has_zero() const { return zero_.data != nullptr; }
  bool has_integer_zero() const { return has_zero() && zero_.dtype == ScalarType::Char; }

  // What is added to a code where it is stored.
  int32_t offset() const { return store_ == Store::kNibbles ? 8 : store_ == Store::kBytes ? 128 : 0; }

  const uint8_t* panel(int64_t i) const { return data_ + i * panel_bytes_; }
  Reads reads() const { return {data_, panel_bytes_}; }

  // Where column k, the first of a run, lies in a panel.
  int64_t position(int64_t k) const { return k / run_of(store_) * run_bytes(store_); }

  void read_scales(int64_t panel, float* to) const { read_groups(scale_, panel, to); }
  ScalarType scale_dtype() const { return scale_.dtype; }

  // The scales of a panel as they are stored, [groups, kPanel]; those of the next one are fetched.
  template <typename Scale>
  const Scale* scales(int64_t panel) const {
    const int64_t count = groups_ * kPanel;
    const auto* from = reinterpret_cast<const Scale*>(scale_.data) + panel * count;
    fetch(from + count, count * static_cast<int64_t>(sizeof(Scale)));
    return from;
  }

  void read_zeros(int64_t panel, float* to) const { read_groups(zero_, panel, to); }

 private:
  static Store store_of(const Tensor& weight, int64_t bits) {
    switch (weight.scalar_type()) {
      case ScalarType::Byte:
        check(bits == 4 || bits == 8, "packed codes of ", bits, " bits, expected 4 or 8");
        return bits == 4 ? Store::kNibbles : Store::kBytes;
      case ScalarType::Float8_e4m3fn: return Store::kFloat8;
      case ScalarType::BFloat16: return Store::kBFloat16;
      case ScalarType::Half: return Store::kHalf;
      case ScalarType::Float: return Store::kFloat;
      default: break;
    }
    check(false, "a packed weight has dtype ", toString(weight.scalar_type()));
    return Store::kFloat;
  }

  // A number for each group of columns and output: [panels, groups, kPanel].
  struct Groups {
    const char* data = nullptr;
    ScalarType dtype = ScalarType::Float;
    int64_t element_bytes = 0;
  };

  Groups groups_of(const char* name, const Tensor& tensor) const {
    check_shape(name, tensor, {panels_, groups_, kPanel});
    check(tensor.is_cpu() && tensor.is_contiguous(), name, " must be contiguous and on the CPU");
    const ScalarType dtype = tensor.scalar_type();
    if (dtype != ScalarType::Char) check_float(name, dtype);
    return {static_cast<const char*>(tensor.data_ptr()), dtype, static_cast<int64_t>(tensor.element_size())};
  }

  // Those of a panel; those of the next one are fetched.
  void read_groups(const Groups& numbers, int64_t panel, float* to) const {
    const int64_t count = groups_ * kPanel, bytes = count * numbers.element_bytes;
    const char* from = numbers.data + panel * bytes;
    fetch(from + bytes, bytes);
    if (numbers.dtype == ScalarType::Char) return load_row(reinterpret_cast<const int8_t*>(from), to, count);
    dispatch_float("scale", numbers.dtype,
                   [&](auto type) { load_row(reinterpret_cast<const decltype(type)*>(from), to, count); });
  }

  int64_t outputs_, columns_, panels_ = 0, panel_bytes_ = 0, group_ = 0, groups_ = 0;
  Store store_;
  const uint8_t* data_ = nullptr;
  Groups scale_, zero_;
};

// Columns that are summed up at a time: none of them lie in different groups of `group` or of `step` columns. They depend
// on the layer alone, so that every row is computed in the same way.
inline int64_t unit_of(int64_t columns, int64_t group, int64_t step) {
  int64_t unit = columns;
  for (int64_t size : {group, step})
    if (size < columns) {
      check(size > 0 && size % 8 == 0 && (unit == columns || unit % size == 0 || size % unit == 0), "groups of ", group,
            " columns with activations in groups of ", step);
      unit = std::min(unit, size);
    }
  if (unit == columns) return std::min(kChunk, columns);
  int64_t divisor = std::min(unit, kChunk);
  while (unit % divisor || divisor % 8) divisor -= 1;
  return divisor;
}

// Rows of x as words of four bytes, interleaved in blocks of `together` rows, kRows of them, or one where AMX takes them: word
// i of row m of a block of M rows lies at i * M + m. The last block has as many rows as are left.
struct InterleavedRows {
  const int32_t* words;
  int64_t words_per_row;
  int64_t together = kRows;

  // `row` is the first of a block.
  const int32_t* block(int64_t row) const { return words + row * words_per_row; }

  // Writes a row of `rows` to where it belongs in `to`.
  void put(const int32_t* row_words, int64_t row, int64_t rows, int32_t* to) const {
    const int64_t first = row / together * together, count = std::min<int64_t>(together, rows - first);
    int32_t* at = to + first * words_per_row + (row - first);
    if (count == 1) return static_cast<void>(std::copy_n(row_words, words_per_row, at));
    for (int64_t i = 0; i < words_per_row; i++) at[i * count] = row_words[i];
  }
};

// Rows of x as codes.
struct RoundedRows {
  InterleavedRows rows;  // zeros after the last column up to a multiple of 8
  const float* steps;    // [rows, steps_per_row]
  int64_t steps_per_row;
  const int32_t* starts;  // [rows, units]: the sum of the codes of each unit, times less the weight's offset
  int64_t unit, units;
  const int32_t* step_of;   // [units]: which step of a row it takes; a table, as divisions would cost as much as its products
  const int32_t* group_of;  // [units]: which group of the weight it is in
  int64_t tile_step;        // columns that AMX takes at a time; 0 where it is not used
};

// The sum of `n` codes.
inline int32_t sum_codes(const int8_t* codes, int64_t n) {
  IntVec sum{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) sum = dot4(sum, splat_int(0x01010101), load_ints(codes + i));
  int32_t total = 0;
  for (; i < n; i++) total += codes[i];
  for (int lane = 0; lane < kLanes; lane++) total += sum[lane];
  return total;
}

}  // namespace optc
