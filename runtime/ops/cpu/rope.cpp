// optc::rope and optc::rope_kv_write on the CPU. A head is read once, worked on as float32, and stored where it goes.

#include <optional>

#include "quantized_cache.h"
#include "rounding.h"
#include "rows.h"

namespace optc {
namespace {

constexpr int64_t kMaxHead = 1024;  // what a head may have: it lies on the stack

// What is done to every head of a token.
template <typename T>
class Heads {
 public:
  template <typename C>
  Heads(const C* cos, const C* sin, int64_t rotary, int64_t dim) : rotary_(rotary), dim_(dim) {
    load_row(cos, cos_, rotary);
    load_row(sin, sin_, rotary);
  }

  // x [dim], normed if there is a weight, and rotated, as float32 numbers of T's precision.
  void load(const T* x, const float* weight, float eps, float weight_offset, float* row) const {
    if (weight) norm(x, weight, eps, weight_offset, row); else load_row(x, row, dim_);
    rotate(row);
  }

  // Not inlined, so that it rounds alike wherever it is called.
  __attribute__((noinline)) void rotate(float* row) const {
    const int64_t half = rotary_ / 2;
    float* __restrict second = row + half;
    for (int64_t i = 0; i < half; i++) {
      const float a = row[i], b = second[i];
      row[i] = a * cos_[i] - b * sin_[i];
      second[i] = b * cos_[half + i] + a * sin_[half + i];
    }
  }

 private:
  void norm(const T* x, const float* weight, float eps, float weight_offset, float* row) const {
    const float scale = inverse_rms(x, dim_, eps);
    for_each_vec(dim_, [&](int64_t i, auto read, auto write) {
      write(row + i, rounded_to<T>(read(x + i) * scale * (read(weight + i) + weight_offset)));
    });
  }

  int64_t rotary_, dim_;
  float cos_[kMaxHead], sin_[kMaxHead];
};

// Calls f(T, C) with values of the types of x and of the cosines: that of x, or float.
template <typename F>
void dispatch_rope(const char* op, const Tensor& x, const Tensor& cos, const F& f) {
  const bool is_float = cos.scalar_type() == ScalarType::Float;
  dispatch_float(op, x.scalar_type(), [&](auto type) {
    if (is_float) f(type, float()); else f(type, type);
  });
}

void check_angles(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t dim) {
  const int64_t rotary = cos.size(cos.dim() - 1);
  check(rotary % 2 == 0 && rotary <= dim && dim <= kMaxHead, "heads of ", dim, " numbers of which ", rotary,
        " are rotated: expected an even number of them, and at most ", kMaxHead);
  check_dtype("cos", cos, cos.scalar_type() == ScalarType::Float ? ScalarType::Float : x.scalar_type());
  check_dtype("sin", sin, cos.scalar_type());
}

std::tuple<Tensor, Tensor> rope(const Tensor& q_in, const Tensor& k_in, const Tensor& cos_in, const Tensor& sin_in) {
  check(q_in.dim() == 4 && k_in.dim() == 4 && cos_in.dim() == 3,
        "rope expects q [B, H, T, D], k [B, KV, T, D], cos and sin [B, T, R]");
  const int64_t batch = q_in.size(0), tokens = q_in.size(2), dim = q_in.size(3), rotary = cos_in.size(2);
  check_shape("k", k_in, {batch, -1, tokens, dim});
  check_shape("cos", cos_in, {batch, tokens, -1});
  check_shape("sin", sin_in, {batch, tokens, rotary});
  check_dtype("q", q_in, q_in.scalar_type());
  check_dtype("k", k_in, q_in.scalar_type());
  check_angles(q_in, cos_in, sin_in, dim);
  const Tensor q = with_adjacent_elements(q_in), k = with_adjacent_elements(k_in);
  const Tensor cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  Tensor q_out = new_like(q), k_out = new_like(k);

  dispatch_rope("rope", q, cos, [&](auto type, auto angle_type) {
    using T = decltype(type);
    const auto* cosines = static_cast<const decltype(angle_type)*>(cos.data_ptr());
    const auto* sines = static_cast<const decltype(angle_type)*>(sin.data_ptr());
    const Tensor* from[] = {&q, &k};
    const Tensor* to[] = {&q_out, &k_out};
    for_each_row(batch * tokens, (q.size(1) + k.size(1)) * dim, [&](int64_t i) {
      const int64_t b = i / tokens, t = i % tokens;
      const Heads<T> heads(cosines + i * rotary, sines + i * rotary, rotary, dim);
      float row[kMaxHead];
      for (int which = 0; which < 2; which++) {
        const Tensor &x = *from[which], &out = *to[which];
        const int64_t count = x.size(1), head_stride = x.stride(1);
        const T* data = static_cast<const T*>(x.data_ptr()) + b * x.stride(0) + t * x.stride(2);
        T* result = static_cast<T*>(out.data_ptr()) + (b * count * tokens + t) * dim;
        for (int64_t h = 0; h < count; h++) {
          heads.load(data + h * head_stride, nullptr, 0, 0, row);
          store_row(row, result + h * tokens * dim, dim);
        }
      }
    });
  });
  return {q_out, k_out};
}

// Where the keys and values of a cache go.
template <typename T, typename Code>
class CacheWriter {
 public:
  CacheWriter(const Tensor& kv_cache, int64_t k_dim, int64_t v_dim)
      : data_(static_cast<Code*>(kv_cache.data_ptr())),
        block_stride_(kv_cache.stride(0)),
        head_stride_(kv_cache.stride(1)),
        row_stride_(kIsCode<Code> ? k_dim + v_dim : kv_cache.stride(2)),
        block_size_(kv_cache.size(2)),
        k_dim_(k_dim),
        v_dim_(v_dim) {}

  // A key as float32 numbers of T's precision, with room for whole vectors, and a value.
  void write(int64_t slot, int64_t head, float* key, const T* value) const {
    Code* block = data_ + slot / block_size_ * block_stride_ + head * head_stride_;
    const int64_t offset = slot % block_size_;
    Code* row = block + offset * row_stride_;
    if constexpr (kIsCode<Code>) {
      Code* scales = block + block_size_ * row_stride_ + offset * kScaleBytes;
      quantize_row(key, k_dim_, row, scales);
      float wide[kMaxHead];
      load_row(value, wide, v_dim_);
      quantize_row(wide, v_dim_, row + k_dim_, scales + block_size_ * kScaleBytes);
    } else {
      store_row(key, row, k_dim_);
      std::memcpy(row + k_dim_, value, v_dim_ * sizeof(T));
    }
  }

 private:
  Code* data_;
  int64_t block_stride_, head_stride_, row_stride_, block_size_, k_dim_, v_dim_;
};

// The weight of a norm over heads as float32, if there is one.
const float* read_weight(const char* name, const std::optional<Tensor>& weight, int64_t dim, float* to) {
  if (!weight) return nullptr;
  check_shape(name, *weight, {dim});
  check(weight->is_cpu(), name, " must be on the CPU");
  const Tensor adjacent = as_contiguous(*weight);
  dispatch_float(name, weight->scalar_type(), [&](auto type) {
    load_row(static_cast<const decltype(type)*>(adjacent.data_ptr()), to, dim);
  });
  return to;
}

Tensor rope_kv_write(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cos_in,
                     const Tensor& sin_in, const std::optional<Tensor>& q_weight_in,
                     const std::optional<Tensor>& k_weight_in, double eps_in, double weight_offset_in, Tensor kv_cache,
                     const Tensor& slot_mapping_in) {
  check(q_in.dim() == 3 && k_in.dim() == 3 && v_in.dim() == 3 && cos_in.dim() == 2 && kv_cache.dim() == 4,
        "rope_kv_write expects q [T, H, D], k [T, KV, D], v [T, KV, Dv], cos and sin [T, R] and kv_cache ",
        "[num_blocks, KV, block_size, D + Dv]");
  const int64_t tokens = q_in.size(0), heads = q_in.size(1), dim = q_in.size(2), rotary = cos_in.size(1);
  const int64_t kv_heads = k_in.size(1), v_dim = v_in.size(2);
  check_shape("k", k_in, {tokens, kv_heads, dim});
  check_shape("v", v_in, {tokens, kv_heads, -1});
  check_shape("cos", cos_in, {tokens, -1});
  check_shape("sin", sin_in, {tokens, rotary});
  check_shape("kv_cache", kv_cache, {-1, kv_heads, -1, dim + v_dim + scale_elements(kv_cache)});
  check_shape("slot_mapping", slot_mapping_in, {tokens});
  const ScalarType dtype = q_in.scalar_type();
  check_dtype("q", q_in, dtype);
  check_dtype("k", k_in, dtype);
  check_dtype("v", v_in, dtype);
  check_dtype("kv_cache", kv_cache, is_quantized(kv_cache) ? kv_cache.scalar_type() : dtype);
  check_dtype("slot_mapping", slot_mapping_in, ScalarType::Long);
  check_angles(q_in, cos_in, sin_in, dim);
  check(v_dim <= kMaxHead, "values of ", v_dim, " numbers, expected at most ", kMaxHead);
  check(kv_cache.stride(3) == 1 || kv_cache.size(3) <= 1, "the elements of a kv_cache row must be adjacent");

  const Tensor q = with_adjacent_elements(q_in), k = with_adjacent_elements(k_in), v = with_adjacent_elements(v_in);
  const Tensor cos = as_contiguous(cos_in), sin = as_contiguous(sin_in), slot_mapping = as_contiguous(slot_mapping_in);
  const auto* slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  const int64_t num_slots = kv_cache.size(0) * kv_cache.size(2);
  for (int64_t t = 0; t < tokens; t++)
    check(slots[t] < num_slots, "slot_mapping[", t, "] is ", slots[t], ", but kv_cache has ", num_slots, " slots");
  float q_buffer[kMaxHead], k_buffer[kMaxHead];
  const float* q_weight = read_weight("q_weight", q_weight_in, dim, q_buffer);
  const float* k_weight = read_weight("k_weight", k_weight_in, dim, k_buffer);
  const float eps = static_cast<float>(eps_in), weight_offset = static_cast<float>(weight_offset_in);
  Tensor out = new_like(q);

  dispatch_rope("rope_kv_write", q, cos, [&](auto type, auto angle_type) {
    using T = decltype(type);
    const auto* cosines = static_cast<const decltype(angle_type)*>(cos.data_ptr());
    const auto* sines = static_cast<const decltype(angle_type)*>(sin.data_ptr());
    const T *q_data = static_cast<const T*>(q.data_ptr()), *k_data = static_cast<const T*>(k.data_ptr());
    const T* v_data = static_cast<const T*>(v.data_ptr());
    T* result = static_cast<T*>(out.data_ptr());
    const int64_t q_token = q.stride(0), q_head = q.stride(1), k_token = k.stride(0), k_head = k.stride(1);
    const int64_t v_token = v.stride(0), v_head = v.stride(1);
    const auto run = [&](auto code) {
      const CacheWriter<T, decltype(code)> cache(kv_cache, dim, v_dim);
      for_each_row(tokens, (heads + 2 * kv_heads) * dim, [&](int64_t t) {
        const Heads<T> head(cosines + t * rotary, sines + t * rotary, rotary, dim);
        float row[kMaxHead];
        for (int64_t h = 0; h < heads; h++) {
          head.load(q_data + t * q_token + h * q_head, q_weight, eps, weight_offset, row);
          store_row(row, result + (t * heads + h) * dim, dim);
        }
        if (slots[t] < 0) return;  // padding
        for (int64_t h = 0; h < kv_heads; h++) {
          head.load(k_data + t * k_token + h * k_head, k_weight, eps, weight_offset, row);
          if constexpr (kIsCode<decltype(code)>)
            for (int64_t i = 0; i < dim; i += kLanes) store(row + i, rounded_to<T>(optc::load(row + i)));
          cache.write(slots[t], h, row, v_data + t * v_token + h * v_head);
        }
      });
    };
    if (is_quantized(kv_cache)) dispatch_codes(kv_cache, run); else run(type);
  });
  return out;
}

}  // namespace
}  // namespace optc

STABLE_TORCH_LIBRARY_IMPL(optc, CPU, m) {
  m.impl("rope", OPTC_BOX(optc::rope));
  m.impl("rope_kv_write", OPTC_BOX(optc::rope_kv_write));
}

using optc::shim::borrow;

OPTC_SHIM aoti_torch_cpu_rope(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle cos, AtenTensorHandle sin,
                              AtenTensorHandle* q_out, AtenTensorHandle* k_out) {
  return optc::shim::guarded("rope", [&] {
    optc::shim::give(optc::rope(borrow(q), borrow(k), borrow(cos), borrow(sin)), q_out, k_out);
  });
}

OPTC_SHIM aoti_torch_cpu_rope_kv_write(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle cos,
                                       AtenTensorHandle sin, AtenTensorHandle* q_weight, AtenTensorHandle* k_weight,
                                       double eps, double weight_offset, AtenTensorHandle kv_cache,
                                       AtenTensorHandle slot_mapping, AtenTensorHandle* out) {
  return optc::shim::guarded("rope_kv_write", [&] {
    optc::shim::give(optc::rope_kv_write(borrow(q), borrow(k), borrow(v), borrow(cos), borrow(sin), borrow(q_weight),
                                         borrow(k_weight), eps, weight_offset, borrow(kv_cache), borrow(slot_mapping)),
                     out);
  });
}
