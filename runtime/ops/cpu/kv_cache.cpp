// optc::kv_cache_write: stores each token's key and value in its slot of the paged cache.

#include <vector>

#include "quantized_cache.h"

namespace optc {
namespace {

// Keys [T, KV, Dk], or values, as codes: `codes` and `scales` are where those of slot 0 are.
template <typename T, typename Code>
void write_codes(const Tensor& x, const Tensor& kv_cache, const int64_t* slots, Code* codes, Code* scales) {
  const int64_t tokens = x.size(0), heads = x.size(1), dim = x.size(2), block_size = kv_cache.size(2);
  const int64_t block_stride = kv_cache.stride(0), head_stride = kv_cache.stride(1);
  const int64_t row_stride = kv_cache.size(3) - 2 * kScaleBytes;
  const T* data = static_cast<const T*>(x.data_ptr());
  const int64_t token_stride = x.stride(0), x_head_stride = x.stride(1);
  // A thread is worth waking for about 16 Ki elements.
  const int64_t grain = std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, heads * dim));
  parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(round_up(dim, kLanes));
    for (int64_t t = begin; t < end; t++) {
      if (slots[t] < 0) continue;  // padding
      const int64_t block = slots[t] / block_size * block_stride, offset = slots[t] % block_size;
      for (int64_t h = 0; h < heads; h++) {
        load_row(data + t * token_stride + h * x_head_stride, row.data(), dim);
        const int64_t base = block + h * head_stride;
        quantize_row(row.data(), dim, codes + base + offset * row_stride, scales + base + offset * kScaleBytes);
      }
    }
  });
}

void write_quantized(const Tensor& k, const Tensor& v, const Tensor& kv_cache, const int64_t* slots) {
  const int64_t k_dim = k.size(2), block_size = kv_cache.size(2);
  const int64_t codes_size = block_size * (k_dim + v.size(2));
  dispatch_float("kv_cache_write", k.scalar_type(), [&](auto type) {
    using T = decltype(type);
    dispatch_codes(kv_cache, [&](auto code) {
      using Code = decltype(code);
      auto* cache = static_cast<Code*>(kv_cache.data_ptr());
      write_codes<T>(k, kv_cache, slots, cache, cache + codes_size);
      write_codes<T>(v, kv_cache, slots, cache + k_dim, cache + codes_size + block_size * kScaleBytes);
    });
  });
}

void kv_cache_write(const Tensor& k_in, const Tensor& v_in, Tensor kv_cache, const Tensor& slot_mapping_in) {
  check(k_in.dim() == 3 && v_in.dim() == 3 && kv_cache.dim() == 4,
        "kv_cache_write expects k [T, KV, Dk], v [T, KV, Dv] and kv_cache [num_blocks, KV, block_size, Dk + Dv]");
  const int64_t tokens = k_in.size(0), heads = k_in.size(1), k_dim = k_in.size(2), v_dim = v_in.size(2);
  check_shape("v", v_in, {tokens, heads, -1});
  check_shape("kv_cache", kv_cache, {-1, heads, -1, k_dim + v_dim + scale_elements(kv_cache)});
  check_shape("slot_mapping", slot_mapping_in, {tokens});
  const ScalarType dtype = is_quantized(kv_cache) ? k_in.scalar_type() : kv_cache.scalar_type();
  check_dtype("k", k_in, dtype);
  check_dtype("v", v_in, dtype);
  check_dtype("kv_cache", kv_cache, kv_cache.scalar_type());
  check_dtype("slot_mapping", slot_mapping_in, ScalarType::Long);
  if (tokens == 0 || heads == 0) return;
  check(kv_cache.stride(3) == 1 || kv_cache.size(3) <= 1, "the elements of a kv_cache row must be adjacent");

  const Tensor k = with_adjacent_elements(k_in), v = with_adjacent_elements(v_in);
  const Tensor slot_mapping = as_contiguous(slot_mapping_in);
  const auto* slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  const int64_t block_size = kv_cache.size(2), num_slots = kv_cache.size(0) * block_size;
  for (int64_t t = 0; t < tokens; t++)
    check(slots[t] < num_slots, "slot_mapping[", t, "] is ", slots[t], ", but kv_cache has ", num_slots, " slots");

  if (is_quantized(kv_cache)) return write_quantized(k, v, kv_cache, slots);

  const int64_t size = static_cast<int64_t>(kv_cache.element_size());
  const auto* k_data = static_cast<const char*>(k.data_ptr());
  const auto* v_data = static_cast<const char*>(v.data_ptr());
  auto* cache = static_cast<char*>(kv_cache.data_ptr());
  const int64_t k_token = k.stride(0) * size, k_head = k.stride(1) * size;
  const int64_t v_token = v.stride(0) * size, v_head = v.stride(1) * size;
  const int64_t block_stride = kv_cache.stride(0) * size, head_stride = kv_cache.stride(1) * size;
  const int64_t row_stride = kv_cache.stride(2) * size, k_bytes = k_dim * size, v_bytes = v_dim * size;

  // A thread is worth waking for about 64 KiB.
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, heads * (k_bytes + v_bytes)));
  parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      if (slots[t] < 0) continue;  // padding
      char* row = cache + slots[t] / block_size * block_stride + slots[t] % block_size * row_stride;
      for (int64_t h = 0; h < heads; h++, row += head_stride) {
        std::memcpy(row, k_data + t * k_token + h * k_head, k_bytes);
        std::memcpy(row + k_bytes, v_data + t * v_token + h * v_head, v_bytes);
      }
    }
  });
}

}  // namespace
}  // namespace optc

STABLE_TORCH_LIBRARY_IMPL(optc, CPU, m) { m.impl("kv_cache_write", OPTC_BOX(optc::kv_cache_write)); }
