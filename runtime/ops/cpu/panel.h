// Arithmetic on panels of packed weights: 32 outputs, as two halves of 16 numbers; packed.py describes the layout.
//
// Every output of every row of x is computed with the same operations in the same order whatever rows are computed with
// it, so that a row has the same bits alone or in a batch. What the compiler might contract in one place and not in
// another is spelled out with `fmadd`.
#pragma once

#include <algorithm>

#include "simd.h"

#define OPTC_INLINE inline __attribute__((always_inline))
#define OPTC_LAMBDA __attribute__((always_inline))

namespace optc {

constexpr int kPanel = 32, kHalf = 16;
constexpr int kParts = kHalf / kLanes;             // registers that 16 numbers take
constexpr int kTogether = 2 * kLanes;              // outputs of a panel that are computed together: two registers of them
constexpr int64_t kChunk = 512;                    // columns that are expanded at a time: they stay in the first-level cache
constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 4 : 2;  // of x that are: the sums must fit the registers
constexpr int kFewRows = kLanes == 16 ? 4 : 1;                  // the sums of all units must fit them as well
constexpr int kFewFloatRows = kLanes == 16 ? 8 : 2;             // numbers made of codes must fit beside the sums

inline Vec fmadd(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline IntVec load_ints(const void* p) {
  IntVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline IntVec splat_int(int32_t x) { return IntVec{} + x; }

// acc[i] += sum_j w[4 i + j] * x[4 i + j] of unsigned bytes w and signed bytes x; exact.
inline IntVec dot4(IntVec acc, IntVec w, IntVec x) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
  const __m512i low = _mm512_madd_epi16(_mm512_and_si512((__m512i)w, _mm512_set1_epi16(255)),
                                        _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8));
  const __m512i high = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), _mm512_srai_epi16((__m512i)x, 8));
  return acc + (IntVec)low + (IntVec)high;
#elif defined(__AVX2__)
  const __m256i low = _mm256_madd_epi16(_mm256_and_si256((__m256i)w, _mm256_set1_epi16(255)),
                                        _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8));
  const __m256i high = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), _mm256_srai_epi16((__m256i)x, 8));
  return acc + (IntVec)low + (IntVec)high;
#else
  for (int j = 0; j < 4; j++) acc += (w >> (8 * j) & 255) * ((x << (24 - 8 * j)) >> 24);
  return acc;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
#define OPTC_SHORT_SUMS
// Products of half bytes are summed up in 16 bits for a while, at half the instructions: 8 times two of them, each 15 * 128 at
// most, fit. acc[j] += w[2 j] * x[2 j] + w[2 j + 1] * x[2 j + 1] of bytes w up to 15 and signed bytes x.
inline IntVec dot2_short(IntVec acc, IntVec w, IntVec x) {
#ifdef __AVX512BW__
  return (IntVec)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)w, (__m512i)x));
#else
  return (IntVec)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
#endif
}

// acc[i] += shorts[2 i] + shorts[2 i + 1].
inline IntVec add_shorts(IntVec acc, IntVec shorts) {
#ifdef __AVX512BW__
  return acc + (IntVec)_mm512_madd_epi16((__m512i)shorts, _mm512_set1_epi16(1));
#else
  return acc + (IntVec)_mm256_madd_epi16((__m256i)shorts, _mm256_set1_epi16(1));
#endif
}
#endif

#ifdef __AVX512BF16__
// acc[i] += w[2 i] * x[2 i] + w[2 i + 1] * x[2 i + 1] of bfloat16 numbers.
inline Vec dot2(Vec acc, IntVec w, IntVec x) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
}
#endif

// Two registers for each of M rows. They are members and not an array, which GCC would keep in memory around a loop.
template <int M, typename V>
struct Sums : Sums<M - 1, V> {
  V first, second;

  // Calls f(m, first, second) for every row m.
  template <typename F>
  OPTC_INLINE void each(const F& f) {
    Sums<M - 1, V>::each(f);
    f(M - 1, first, second);
  }

  // Calls f(m, first, second, first of other, second of other).
  template <typename U, typename F>
  OPTC_INLINE void each_with(const Sums<M, U>& other, const F& f) {
    Sums<M - 1, V>::each_with(static_cast<const Sums<M - 1, U>&>(other), f);
    f(M - 1, first, second, other.first, other.second);
  }
};

template <typename V>
struct Sums<0, V> {
  template <typename F>
  OPTC_INLINE void each(const F&) {}
  template <typename U, typename F>
  OPTC_INLINE void each_with(const Sums<0, U>&, const F&) {}
};

// Adds the products of some columns of `kTogether` outputs with M rows of x. The rows are interleaved: of each four bytes
// of a row those of row m are word m of M. Words are four codes, two bfloat16 numbers, or one float32 number.
//
// Of unsigned bytes in runs of four columns:
struct ByteStream {
  static constexpr int kRun = 4;
  static constexpr bool kExpandsForMany = false;
  template <int M>
  static OPTC_INLINE void dot(const uint8_t* w, const int32_t* x, int64_t columns, Sums<M, IntVec>& sums) {
    for (int64_t k = 0; k < columns; k += 4, w += 4 * kPanel, x += M) {
      const IntVec first = load_ints(w), second = load_ints(w + 4 * kLanes);
      sums.each([&](int m, IntVec& a, IntVec& b) OPTC_LAMBDA {
        const IntVec value = splat_int(x[m]);
        a = dot4(a, first, value), b = dot4(b, second, value);
      });
    }
  }
};

// Of half bytes in runs of eight columns. With VNNI the two halves of a byte have sums of their own where there are few rows:
// then the latency of a product counts.
struct NibbleStream {
  static constexpr int kRun = 8;
#ifdef OPTC_SHORT_SUMS
  static constexpr bool kExpandsForMany = false;  // into bytes, which would be too large
  template <int M>
  static OPTC_INLINE void dot(const uint8_t* w, const int32_t* x, int64_t columns, Sums<M, IntVec>& sums) {
    for (int64_t k = 0; k < columns;) {
      Sums<M, IntVec> shorts;
      shorts.each([](int, IntVec& a, IntVec& b) OPTC_LAMBDA { a = b = IntVec{}; });
      for (const int64_t end = std::min(columns, k + 32); k < end; k += 8, w += 4 * kPanel, x += 2 * M) {
        const IntVec one = load_ints(w), two = load_ints(w + 4 * kLanes);
        const IntVec low_one = one & 0x0f0f0f0f, low_two = two & 0x0f0f0f0f;
        const IntVec high_one = (one >> 4) & 0x0f0f0f0f, high_two = (two >> 4) & 0x0f0f0f0f;
        shorts.each([&](int m, IntVec& a, IntVec& b) OPTC_LAMBDA {
          const IntVec value = splat_int(x[m]), next_value = splat_int(x[M + m]);
          a = dot2_short(dot2_short(a, low_one, value), high_one, next_value);
          b = dot2_short(dot2_short(b, low_two, value), high_two, next_value);
        });
      }
      sums.each_with(shorts, [](int, IntVec& a, IntVec& b, IntVec more, IntVec next_more) OPTC_LAMBDA {
        a = add_shorts(a, more), b = add_shorts(b, next_more);
      });
    }
  }
#else
  static constexpr bool kExpandsForMany = true;
  template <int M>
  static OPTC_INLINE void dot(const uint8_t* w, const int32_t* x, int64_t columns, Sums<M, IntVec>& sums) {
    constexpr bool kFew = M <= 2;
    Sums<kFew ? M : 0, IntVec> more;
    more.each([](int, IntVec& a, IntVec& b) OPTC_LAMBDA { a = b = IntVec{}; });
    for (int64_t k = 0; k < columns; k += 8, w += 4 * kPanel, x += 2 * M) {
      const IntVec one = load_ints(w), two = load_ints(w + 4 * kLanes);
      const IntVec low_one = one & 0x0f0f0f0f, low_two = two & 0x0f0f0f0f;
      const IntVec high_one = (one >> 4) & 0x0f0f0f0f, high_two = (two >> 4) & 0x0f0f0f0f;
      sums.each([&](int m, IntVec& a, IntVec& b) OPTC_LAMBDA {
        const IntVec value = splat_int(x[m]);
        a = dot4(a, low_one, value), b = dot4(b, low_two, value);
      });
      auto add_high = [&](int m, IntVec& a, IntVec& b) OPTC_LAMBDA {
        const IntVec value = splat_int(x[M + m]);
        a = dot4(a, high_one, value), b = dot4(b, high_two, value);
      };
      if constexpr (kFew) more.each(add_high); else sums.each(add_high);
    }
    if constexpr (kFew) add(sums, more);
  }

  static OPTC_INLINE void add(Sums<1, IntVec>& to, const Sums<1, IntVec>& from) {
    to.first += from.first, to.second += from.second;
  }
  static OPTC_INLINE void add(Sums<2, IntVec>& to, const Sums<2, IntVec>& from) {
    add(static_cast<Sums<1, IntVec>&>(to), from);
    to.first += from.first, to.second += from.second;
  }
#endif
};

// Of float32 numbers [columns][32]:
struct FloatStream {
  template <int M>
  static OPTC_INLINE void dot(const uint8_t* w, const int32_t* x, int64_t columns, int, Sums<M, Vec>& sums) {
    for (int64_t k = 0; k < columns; k++, w += 4 * kPanel, x += M) {
      const Vec first = (Vec)load_ints(w), second = (Vec)load_ints(w + 4 * kLanes);
      sums.each([&](int m, Vec& a, Vec& b) OPTC_LAMBDA {
        const Vec value = (Vec)splat_int(x[m]);
        a = fmadd(first, value, a), b = fmadd(second, value, b);
      });
    }
  }
};

#ifdef __AVX512BF16__
// Adds the products of two columns, as pairs of bfloat16 of the outputs of both registers, with the words x[M].
template <int M>
OPTC_INLINE void add_pairs(IntVec one, IntVec two, const int32_t* x, Sums<M, Vec>& sums) {
  sums.each([&](int m, Vec& a, Vec& b) OPTC_LAMBDA {
    const IntVec value = splat_int(x[m]);
    a = dot2(a, one, value), b = dot2(b, two, value);
  });
}

// Of bfloat16 numbers in runs of two columns:
struct PairStream {
  template <int M>
  static OPTC_INLINE void dot(const uint8_t* w, const int32_t* x, int64_t columns, int, Sums<M, Vec>& sums) {
    for (int64_t k = 0; k < columns; k += 2, w += 4 * kPanel, x += M)
      add_pairs<M>(load_ints(w), load_ints(w + 4 * kLanes), x, sums);
  }
};
#endif

// Half bytes [columns / 8] runs -> bytes [columns / 4] runs.
inline void expand_nibbles(const uint8_t* from, int64_t columns, uint8_t* to) {
  for (int64_t k = 0; k < columns; k += 8, from += 4 * kPanel, to += 8 * kPanel)
    for (int i = 0; i < 4 * kPanel; i += 4 * kLanes) {
      const IntVec both = load_ints(from + i), low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
      std::memcpy(to + i, &low, sizeof low);
      std::memcpy(to + 4 * kPanel + i, &high, sizeof high);
    }
}

// What a panel's numbers are stored as.
enum class Store { kNibbles, kBytes, kFloat8, kBFloat16, kHalf, kFloat };

constexpr int64_t run_of(Store store) {
  switch (store) {
    case Store::kNibbles: return 8;
    case Store::kBytes: case Store::kFloat8: return 4;
    case Store::kBFloat16: return 2;
    default: return 1;
  }
}

constexpr int64_t run_bytes(Store store) { return store == Store::kHalf ? 2 * kPanel : 4 * kPanel; }

// E4M3 in the low byte of each lane -> float32; see load(const Float8*) in simd.h.
inline Vec widen_float8(BitsVec bits) {
  const Vec magnitude = (Vec)((bits & 0x7fu) << 20) * 0x1p120f;
  const BitsVec nan = (BitsVec)((bits & 0x7fu) == 0x7fu) & 0x7fc00000u;
  return (Vec)((BitsVec)magnitude | nan | (bits & 0x80u) << 24);
}

// Column j of a run of codes as float32; integer codes as they are stored, less `offset`.
template <Store store>
OPTC_INLINE Vec code_value(BitsVec run, int j, Vec offset) {
  if constexpr (store == Store::kFloat8) return widen_float8(run >> (8 * j) & 0xffu);
  const BitsVec code = store == Store::kBytes ? run >> (8 * j) & 0xffu : run >> (j < 4 ? 8 * j : 8 * j - 28) & 0xfu;
  return __builtin_convertvector((IntVec)code, Vec) - offset;
}

// Columns j and j + 1 as a pair of bfloat16, which holds codes of 8 bits exactly.
template <Store store>
OPTC_INLINE IntVec code_pair(BitsVec run, int j, Vec offset) {
  const BitsVec low = (BitsVec)code_value<store>(run, j, offset), high = (BitsVec)code_value<store>(run, j + 1, offset);
  return (IntVec)(low >> 16 | (high & 0xffff0000u));
}

// Calls f with the type of the codes.
template <Store value>
struct StoreOf {
  static constexpr Store store = value;
};

template <typename F>
inline void with_codes(Store store, const F& f) {
  if (store == Store::kNibbles) return f(StoreOf<Store::kNibbles>());
  if (store == Store::kBytes) return f(StoreOf<Store::kBytes>());
  f(StoreOf<Store::kFloat8>());
}

// Of codes that become float32 as they come, or pairs of bfloat16. `offset` [32] is subtracted from them, if it is given.
template <Store store>
struct CodesAsFloats {
  const float* offset;
  static constexpr int kRun = run_of(store);

  template <int M>
  OPTC_INLINE void dot(const uint8_t* w, const int32_t* x, int64_t columns, int n, Sums<M, Vec>& sums) const {
    const Vec less = offset ? load(offset + n) : Vec{}, next_less = offset ? load(offset + n + kLanes) : Vec{};
    for (int64_t k = 0; k < columns; k += kRun, w += run_bytes(store), x += kRun * M) {
      const BitsVec first = (BitsVec)load_ints(w), second = (BitsVec)load_ints(w + 4 * kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kRun; j++) {
        const Vec one = code_value<store>(first, j, less), two = code_value<store>(second, j, next_less);
        sums.each([&](int m, Vec& a, Vec& b) OPTC_LAMBDA {
          const Vec value = (Vec)splat_int(x[j * M + m]);
          a = fmadd(one, value, a), b = fmadd(two, value, b);
        });
      }
    }
  }
};

#ifdef __AVX512BF16__
template <Store store>
struct CodesAsPairs {
  const float* offset;
  static constexpr int kRun = run_of(store);

  template <int M>
  OPTC_INLINE void dot(const uint8_t* w, const int32_t* x, int64_t columns, int n, Sums<M, Vec>& sums) const {
    const Vec less = offset ? load(offset + n) : Vec{}, next_less = offset ? load(offset + n + kLanes) : Vec{};
    for (int64_t k = 0; k < columns; k += kRun, w += run_bytes(store), x += kRun / 2 * M) {
      const BitsVec first = (BitsVec)load_ints(w), second = (BitsVec)load_ints(w + 4 * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kRun; j += 2)
        add_pairs<M>(code_pair<store>(first, j, less), code_pair<store>(second, j, next_less), x + j / 2 * M, sums);
    }
  }
};

// Half bytes without zero points as pairs of bfloat16, by a table.
class NibbleTable {
 public:
  NibbleTable() {
    alignas(64) BFloat16 values[32];
    for (int i = 0; i < 32; i++) values[i] = BFloat16(static_cast<float>(i % 16 - 8));  // the fifth bit of an index does not count
    table_ = _mm512_load_si512(values);
  }

  // The four pairs of a run: columns 0 and 1, 2 and 3, 4 and 5, 6 and 7.
  OPTC_INLINE void pairs(IntVec run, IntVec (&out)[4]) const {
    const __m512i swap = _mm512_set1_epi32(0x03010200);  // bytes 0 2 1 3 of each four: those of columns 0 and 1 start words
    const __m512i offsets = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    const __m512i words = _mm512_shuffle_epi8((__m512i)run, _mm512_add_epi8(swap, offsets));
    out[0] = (IntVec)_mm512_permutexvar_epi16(words, table_);
    out[1] = (IntVec)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table_);
    out[2] = (IntVec)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table_);
    out[3] = (IntVec)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table_);
  }

 private:
  __m512i table_;
};

struct SignedNibblesAsPairs {
  NibbleTable table;
  static constexpr int kRun = 8;

  template <int M>
  OPTC_INLINE void dot(const uint8_t* w, const int32_t* x, int64_t columns, int, Sums<M, Vec>& sums) const {
    for (int64_t k = 0; k < columns; k += 8, w += 4 * kPanel, x += 4 * M) {
      IntVec one[4], two[4];
      table.pairs(load_ints(w), one), table.pairs(load_ints(w + 4 * kLanes), two);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) add_pairs<M>(one[j], two[j], x + j * M, sums);
    }
  }
};
#endif

// Columns k .. k + run - 1 of the 16 outputs of half `h`, as float32 [run][16]; integer codes as they are stored, less
// `zero` [16].
inline void expand_run(Store store, const uint8_t* run, int h, const float* zero, float* to, int64_t stride) {
  for (int p = 0; p < kParts; p++) {
    const uint8_t* from = run + (store == Store::kHalf ? 32 : 64) * h + (store == Store::kHalf ? 2 : 4) * kLanes * p;
    float* out = to + kLanes * p;
    if (store == Store::kHalf) {
      ::optc::store(out, load(reinterpret_cast<const Half*>(from)));
      continue;
    }
    const BitsVec bits = (BitsVec)load_ints(from);
    const Vec offset = zero ? load(zero + kLanes * p) : Vec{};
    switch (store) {
      case Store::kFloat: ::optc::store(out, (Vec)bits); break;
      case Store::kBFloat16:
        ::optc::store(out, (Vec)(bits << 16));
        ::optc::store(out + stride, (Vec)(bits & 0xffff0000u));
        break;
      case Store::kFloat8:
        for (int j = 0; j < 4; j++) ::optc::store(out + j * stride, code_value<Store::kFloat8>(bits, j, offset));
        break;
      case Store::kBytes:
        for (int j = 0; j < 4; j++) ::optc::store(out + j * stride, code_value<Store::kBytes>(bits, j, offset));
        break;
      case Store::kNibbles:
        for (int j = 0; j < 8; j++) ::optc::store(out + j * stride, code_value<Store::kNibbles>(bits, j, offset));
        break;
      default: break;
    }
  }
}

}  // namespace optc
