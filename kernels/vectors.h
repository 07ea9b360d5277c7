// What the kernels share: vectors of 16 floats, and products of a few rows with many.
// The vectors are the compiler's own, so that everything compiles for any machine.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <c10/util/BFloat16.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using bf16 = c10::BFloat16;

constexpr int64_t BLOCK = 64;  // rows (slots, or of a weight) whose products are held at a time: they stay in the first cache

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef int8_t vb __attribute__((vector_size(16)));

inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, 64);
  return x;
}
inline vf load(const bf16* p) {
  vh x;
  std::memcpy(&x, p, 32);
  return (vf)(__builtin_convertvector(x, vu) << 16);
}
inline vf load(const int8_t* p) {
  vb x;
  std::memcpy(&x, p, 16);
  return __builtin_convertvector(x, vf);
}
inline void store(float* p, vf x) { std::memcpy(p, &x, 64); }
inline void store(bf16* p, vf x) {  // rounded to nearest, ties to even
  vu u = (vu)x;
  u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vh h = __builtin_convertvector(u, vh);
  std::memcpy(p, &h, 32);
}
inline void store(bf16* p, vf low, vf high) {  // 32 numbers, rounded the same way
#ifdef __AVX512BF16__
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  std::memcpy(p, &both, 64);
#else
  store(p, low), store(p + 16, high);
#endif
}
inline vf all(float x) { return vf{} + x; }
inline bool any(vi x) {  // whether some comparison holds
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#else
  for (int i = 0; i < 16; i++)
    if (x[i]) return true;
  return false;
#endif
}
inline vf larger(vf x, vf y) { return x > y ? x : y; }
template <class F>
inline float fold(vf x, F f) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), b = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  v8 c = f(a, b);
  v4 d = f(__builtin_shufflevector(c, c, 0, 1, 2, 3), __builtin_shufflevector(c, c, 4, 5, 6, 7));
  v4 e = f(d, __builtin_shufflevector(d, d, 2, 3, 0, 1));
  v4 g = f(e, __builtin_shufflevector(e, e, 1, 0, 3, 2));
  return g[0];
}
inline float sum(vf x) {
  return fold(x, [](auto a, auto b) { return a + b; });
}
inline void sums(const vf x[4], float* to) {  // of four vectors, together
  vf a = __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(x[0], x[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  vf b = __builtin_shufflevector(x[2], x[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(x[2], x[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  vf c = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  c += __builtin_shufflevector(c, c, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  c += __builtin_shufflevector(c, c, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  for (int i = 0; i < 4; i++) to[i] = c[4 * i];
}
inline float top(vf x) {
  return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

template <class Q, class K, int N>
void score(const Q* q, const K* k, int64_t row, int64_t D, float* out) {  // N rows of q (N, D) with 4 keys: out (N, BLOCK)
  vf acc[N][4] = {};
  int64_t d = 0;
#ifdef __AVX512BF16__
  if constexpr (sizeof(K) == 2)  // products of pairs, exact, and their sum at once
    for (; d + 32 <= D; d += 32)
      for (int i = 0; i < 4; i++) {
        const __m512bh x = (__m512bh)_mm512_loadu_si512(k + i * row + d);
        for (int n = 0; n < N; n++)
          acc[n][i] = (vf)_mm512_dpbf16_ps((__m512)acc[n][i], (__m512bh)_mm512_loadu_si512(q + n * D + d), x);
      }
#endif
  for (; d < D; d += 16)
    for (int i = 0; i < 4; i++) {
      vf x = load(k + i * row + d);
      for (int n = 0; n < N; n++) acc[n][i] += load(q + n * D + d) * x;
    }
  for (int n = 0; n < N; n++) sums(acc[n], out + n * BLOCK);
}

inline void fetch(const void* row, int64_t bytes) {  // a row that is read soon
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// `next`, if given, is fetched meanwhile: the processor's own prefetching gives up at every jump between keys and values.
template <class Q, class K>
void products(const Q* q, int64_t M, const K* k, const K* next, int64_t stride, int64_t count, int64_t D, float* out) {  // (M, BLOCK)
  for (int64_t m = 0; m < M; m += 4, q += 4 * D, out += 4 * BLOCK)
    for (int64_t j = 0; j < count; j += count < 4 ? 1 : 4) {  // with fewer than four keys, each four times: the last writes count
      const int64_t at = count < 4 ? j : std::min(j, count - 4), row = count < 4 ? 0 : stride;
      const K* from = k + at * stride;
      if (m == 0 && next)
        for (int64_t i = 0; i < 4 && j + i < count; i++) fetch(next + (j + i) * stride, D * sizeof(K));
      switch (std::min<int64_t>(4, M - m)) {
        case 1: score<Q, K, 1>(q, from, row, D, out + at); break;
        case 2: score<Q, K, 2>(q, from, row, D, out + at); break;
        case 3: score<Q, K, 3>(q, from, row, D, out + at); break;
        default: score<Q, K, 4>(q, from, row, D, out + at);
      }
    }
}

}  // namespace
