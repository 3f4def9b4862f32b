// optc::attention and optc::paged_attention on the CPU: arguments are checked here, before any thread starts.

#include "flash.h"
#include "shim.h"

namespace optc {
namespace {

Strides strides(const Tensor& t, int64_t token, int64_t head, int64_t block = -1) {
  return {t.stride(token), t.stride(head), block < 0 ? 0 : t.stride(block)};
}

std::vector<float> read_sinks(const std::optional<Tensor>& sinks, int64_t heads) {
  std::vector<float> values;
  if (!sinks) return values;
  check_shape("sinks", *sinks, {heads});
  values.resize(heads);
  const Tensor adjacent = as_contiguous(*sinks);
  dispatch_float("sinks", sinks->scalar_type(), [&](auto type) {
    load_row(static_cast<const decltype(type)*>(adjacent.data_ptr()), values.data(), heads);
  });
  return values;
}

void check_heads(int64_t heads, int64_t kv_heads) {
  check(kv_heads > 0 && heads % kv_heads == 0, heads, " query heads cannot share ", kv_heads, " KV heads evenly");
}

Tensor attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, double scale, int64_t window,
                 double softcap, const std::optional<Tensor>& sinks, int64_t /*layer*/) {
  check(q_in.dim() == 4 && k_in.dim() == 4 && v_in.dim() == 4,
        "attention expects q [B, H, T, Dk], k [B, KV, T, Dk] and v [B, KV, T, Dv]");
  const int64_t batch = q_in.size(0), heads = q_in.size(1), tokens = q_in.size(2), k_dim = q_in.size(3);
  const int64_t kv_heads = k_in.size(1), v_dim = v_in.size(3);
  check_heads(heads, kv_heads);
  check_shape("k", k_in, {batch, kv_heads, tokens, k_dim});
  check_shape("v", v_in, {batch, kv_heads, tokens, v_dim});
  const ScalarType dtype = q_in.scalar_type();
  check_float("attention", dtype);
  check_dtype("k", k_in, dtype);
  check_dtype("v", v_in, dtype);
  const Tensor q = with_adjacent_elements(q_in), k = with_adjacent_elements(k_in), v = with_adjacent_elements(v_in);
  Tensor out = new_tensor({batch, tokens, heads, v_dim}, dtype);
  const int32_t only_block = 0;

  dispatch_float("attention", dtype, [&](auto type) {
    using T = decltype(type);
    Problem<T> problem{static_cast<const T*>(q.data_ptr()),
                       static_cast<const T*>(k.data_ptr()),
                       static_cast<const T*>(v.data_ptr()),
                       static_cast<T*>(out.data_ptr()),
                       strides(q, 2, 1),
                       strides(k, 2, 1),
                       strides(v, 2, 1),
                       strides(out, 1, 2),
                       heads,
                       kv_heads,
                       k_dim,
                       v_dim,
                       tokens,
                       window,
                       static_cast<float>(scale),
                       static_cast<float>(softcap),
                       read_sinks(sinks, heads),
                       {}};
    for (int64_t b = 0; b < batch && tokens > 0; b++)
      problem.sequences.push_back({b * q.stride(0), b * out.stride(0), b * k.stride(0), b * v.stride(0), &only_block,
                                   tokens, tokens});
    flash_attention(problem);
  });
  return out;
}

// Checks the batch against the cache and lists the sequences that have tokens in it.
std::vector<Sequence> read_batch(const Tensor& block_table, const Tensor& query_start_loc, const Tensor& seq_lens,
                                 int64_t tokens, int64_t num_blocks, int64_t block_size, int64_t window,
                                 int64_t q_stride, int64_t out_stride) {
  const auto* blocks = static_cast<const int32_t*>(block_table.data_ptr());
  const auto* starts = static_cast<const int32_t*>(query_start_loc.data_ptr());
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  const int64_t batch = seq_lens.size(0), row_blocks = block_table.size(1);
  check(0 <= starts[0] && starts[0] <= tokens, "query_start_loc[0] is ", starts[0], ", but q has ", tokens, " tokens");
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < batch; b++, blocks += row_blocks) {
    const int64_t start = starts[b], end = starts[b + 1], length = lengths[b];
    check(start <= end && end <= tokens, "query_start_loc[", b, ":", b + 2, "] is [", start, ", ", end,
          "], but q has ", tokens, " tokens");
    if (start == end) continue;
    check(end - start <= length && length <= row_blocks * block_size, "seq_lens[", b, "] is ", length,
          ", expected at least its ", end - start, " query tokens and at most the ", row_blocks * block_size,
          " slots of its row of block_table");
    // Blocks that slid out of the window may have been given back: their entries mean nothing.
    const int64_t first_key = first_visible(length - (end - start), window);
    for (int64_t i = first_key / block_size; i * block_size < length; i++)
      check(0 <= blocks[i] && blocks[i] < num_blocks, "block_table[", b, ", ", i, "] is ", blocks[i],
            ", but kv_cache has ", num_blocks, " blocks");
    sequences.push_back({start * q_stride, start * out_stride, 0, 0, blocks, end - start, length});
  }
  return sequences;
}

Tensor paged_attention(const Tensor& q_in, const Tensor& kv_cache, const Tensor& block_table_in,
                       const Tensor& query_start_loc_in, const Tensor& seq_lens_in, int64_t v_dim, double scale,
                       int64_t window, double softcap, const std::optional<Tensor>& sinks) {
  check(q_in.dim() == 3 && kv_cache.dim() == 4,
        "paged_attention expects q [T, H, Dk] and kv_cache [num_blocks, KV, block_size, Dk + Dv]");
  const int64_t tokens = q_in.size(0), heads = q_in.size(1), k_dim = q_in.size(2);
  const int64_t kv_heads = kv_cache.size(1), block_size = kv_cache.size(2);
  check(seq_lens_in.dim() == 1, "seq_lens must be one-dimensional");
  const int64_t batch = seq_lens_in.size(0);
  check_heads(heads, kv_heads);
  check(v_dim > 0, "v_dim must be positive");
  check_shape("kv_cache", kv_cache, {-1, kv_heads, block_size, k_dim + v_dim + scale_elements(kv_cache)});
  check_shape("block_table", block_table_in, {batch, -1});
  check_shape("query_start_loc", query_start_loc_in, {batch + 1});
  const ScalarType dtype = q_in.scalar_type();
  check_float("paged_attention", dtype);
  check_dtype("kv_cache", kv_cache, is_quantized(kv_cache) ? kv_cache.scalar_type() : dtype);
  check_dtype("block_table", block_table_in, ScalarType::Int);
  check_dtype("query_start_loc", query_start_loc_in, ScalarType::Int);
  check_dtype("seq_lens", seq_lens_in, ScalarType::Int);
  check(kv_cache.stride(3) == 1, "the elements of a kv_cache row must be adjacent");

  const Tensor q = with_adjacent_elements(q_in);
  const Tensor block_table = as_contiguous(block_table_in);
  const Tensor query_start_loc = as_contiguous(query_start_loc_in);
  const Tensor seq_lens = as_contiguous(seq_lens_in);
  Tensor out = new_tensor({tokens, heads, v_dim}, dtype);

  dispatch_float("paged_attention", dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto key) {
      using Key = decltype(key);
      const Key* cache = static_cast<const Key*>(kv_cache.data_ptr());
      Strides cache_stride = strides(kv_cache, 2, 1, 0);
      if (kIsCode<Key>) cache_stride.token = k_dim + v_dim;
      Problem<T, Key> problem{static_cast<const T*>(q.data_ptr()),
                              cache,
                              cache + k_dim,
                              static_cast<T*>(out.data_ptr()),
                              strides(q, 0, 1),
                              cache_stride,
                              cache_stride,
                              strides(out, 0, 1),
                              heads,
                              kv_heads,
                              k_dim,
                              v_dim,
                              block_size,
                              window,
                              static_cast<float>(scale),
                              static_cast<float>(softcap),
                              read_sinks(sinks, heads),
                              read_batch(block_table, query_start_loc, seq_lens, tokens, kv_cache.size(0), block_size,
                                         window, q.stride(0), out.stride(0))};
      problem.k_scales = cache + block_size * (k_dim + v_dim);
      problem.v_scales = problem.k_scales + block_size * kScaleBytes;
      // Tokens of no sequence are padding.
      const auto* starts = static_cast<const int32_t*>(query_start_loc.data_ptr());
      const int64_t row = heads * v_dim;
      std::fill_n(problem.out, starts[0] * row, T(0.0f));
      std::fill(problem.out + starts[batch] * row, problem.out + tokens * row, T(0.0f));
      flash_attention(problem);
    };
    if (is_quantized(kv_cache))
      dispatch_codes(kv_cache, run);
    else
      run(type);
  });
  return out;
}

}  // namespace
}  // namespace optc

STABLE_TORCH_LIBRARY_IMPL(optc, CPU, m) {
  m.impl("attention", OPTC_BOX(optc::attention));
  m.impl("paged_attention", OPTC_BOX(optc::paged_attention));
}

OPTC_SHIM aoti_torch_cpu_paged_attention(AtenTensorHandle q, AtenTensorHandle kv_cache, AtenTensorHandle block_table,
                                         AtenTensorHandle query_start_loc, AtenTensorHandle seq_lens, int64_t v_dim,
                                         double scale, int64_t window, double softcap, AtenTensorHandle* sinks,
                                         AtenTensorHandle* out) {
  using optc::shim::borrow;
  return optc::shim::guarded("paged_attention", [&] {
    optc::shim::give(optc::paged_attention(borrow(q), borrow(kv_cache), borrow(block_table), borrow(query_start_loc),
                                           borrow(seq_lens), v_dim, scale, window, softcap, borrow(sinks)),
                     out);
  });
}
