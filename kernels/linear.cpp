// Linear layers for few rows on CPUs: y = x W^T, every weight read once. A token through a matrix is bound by reading the matrix.
//
//   same dtype   x and W bfloat16 or float32; sums in float32
//   int8         W int8 and one float32 scale a row; W is converted to float32 on its way. A bfloat16 x becomes whole numbers of 16 bits,
//                in units of its own for every GROUP columns, x = unit (256 high + low), so that products are sums of bytes, four at
//                a time (vpdpbusd), where there is such an instruction and columns are a multiple of 64.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GROUP = 256;  // columns that share a unit
constexpr int64_t AHEAD = 4096;  // bytes ahead that are fetched: rows of a byte a number are too short for the processor to notice
constexpr int64_t AT_ONCE = 8;  // rows of W that stay in the first cache for all rows of x

// run(rows of W from `n` on, how many, where their products go (M, BLOCK)) for all rows, by all threads; then out (M, N) = those products
template <class K, class F, class G>
void blocks(int64_t M, int64_t N, K* out, F run, G scale) {
#pragma omp parallel
  {
    std::vector<float> y(M * BLOCK);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n += BLOCK) {
      const int64_t count = std::min(BLOCK, N - n);
      for (int64_t j = 0; j < count; j += AT_ONCE) run(n + j, std::min(AT_ONCE, count - j), &y[j]);
      for (int64_t m = 0; m < M; m++)
        for (int64_t j = 0; j < count; j++) out[m * N + n + j] = y[m * BLOCK + j] * scale(n + j);
    }
  }
}

template <class K>
void few_rows(const K* x, int64_t M, const K* weight, int64_t N, int64_t D, K* out) {
  blocks(
      M, N, out, [&](int64_t n, int64_t count, float* y) { products(x, M, weight + n * D, (const K*)nullptr, D, count, D, y); },
      [](int64_t) { return 1.f; });
}

#ifdef __AVX512VNNI__

struct Digits {  // of rows x (M, D)
  std::vector<int8_t> high, low;
  std::vector<float> unit;           // (M, groups)
  std::vector<int32_t> highs, lows;  // what the digits of a group add up to

  template <class K>
  Digits(const K* x, int64_t M, int64_t D) : high(M * D), low(M * D) {
    for (int64_t i = 0; i < M * D;) {
      const int64_t end = std::min(i + GROUP, (i / D + 1) * D);
      float most = 0;
      for (int64_t d = i; d < end; d++) {
        const float size = std::abs(float(x[d]));
        if (!(size <= most) && most == most) most = size;  // NaN stays, and makes the row NaN
      }
      const bool finite = most < INFINITY;
      const float one = finite ? std::max(most / 32639, std::numeric_limits<float>::min()) : NAN;  // 256 * 127 + 127
      int32_t h = 0, l = 0;
      for (int64_t d = i; d < end; d++) {
        const int32_t whole = finite ? int32_t(std::nearbyint(float(x[d]) / one)) : 0, digit = (whole + 128) >> 8;
        high[d] = digit, low[d] = whole - 256 * digit;
        h += high[d], l += low[d];
      }
      unit.push_back(one), highs.push_back(h), lows.push_back(l);
      i = end;
    }
  }
};

template <int N>
void dot(const Digits& x, int64_t M, const int8_t* w, int64_t D, float* out) {  // N rows of W
  const int64_t groups = (D + GROUP - 1) / GROUP;
  const __m512i flip = _mm512_set1_epi8(-128);  // w + 128: the instruction takes one side unsigned
  for (int64_t m = 0; m < M; m++) {
    vf total[N] = {};
    for (int64_t g = 0; g < groups; g++) {
      const int64_t at = m * groups + g;
      __m512i high[N], low[N];
      for (int n = 0; n < N; n++) {  // 128 times the sum of x is taken off beforehand
        high[n] = _mm512_zextsi128_si512(_mm_cvtsi32_si128(-128 * x.highs[at]));
        low[n] = _mm512_zextsi128_si512(_mm_cvtsi32_si128(-128 * x.lows[at]));
      }
      for (int64_t d = g * GROUP; d < std::min((g + 1) * GROUP, D); d += 64) {
        const __m512i h = _mm512_loadu_si512(&x.high[m * D + d]), l = _mm512_loadu_si512(&x.low[m * D + d]);
        for (int n = 0; n < N; n++) {
          __builtin_prefetch(w + n * D + d + AHEAD);
          const __m512i u = _mm512_xor_si512(_mm512_loadu_si512(w + n * D + d), flip);
          high[n] = _mm512_dpbusd_epi32(high[n], u, h), low[n] = _mm512_dpbusd_epi32(low[n], u, l);
        }
      }
      for (int n = 0; n < N; n++)
        total[n] += ((vf)_mm512_cvtepi32_ps(high[n]) * 256.f + (vf)_mm512_cvtepi32_ps(low[n])) * x.unit[at];
    }
    for (int n = 0; n < N; n++) out[m * BLOCK + n] = sum(total[n]);
  }
}

#endif

template <class K>
void few_rows_int8(const K* x, int64_t M, const int8_t* weight, const float* scale, int64_t N, int64_t D, K* out) {
  const auto scales = [&](int64_t n) { return scale[n]; };
#ifdef __AVX512VNNI__
  if (sizeof(K) == 2 && D % 64 == 0) {
    const Digits digits(x, M, D);
    const auto run = [&](int64_t n, int64_t count, float* y) {
      for (int64_t j = 0; j < count; j += 4) switch (count - j) {
          case 1: dot<1>(digits, M, weight + (n + j) * D, D, y + j); break;
          case 2: dot<2>(digits, M, weight + (n + j) * D, D, y + j); break;
          case 3: dot<3>(digits, M, weight + (n + j) * D, D, y + j); break;
          default: dot<4>(digits, M, weight + (n + j) * D, D, y + j);
        }
    };
    blocks(M, N, out, run, scales);
    return;
  }
#endif
  const std::vector<float> wide(x, x + M * D);
  blocks(
      M, N, out,
      [&](int64_t n, int64_t count, float* y) { products(wide.data(), M, weight + n * D, (const int8_t*)nullptr, D, count, D, y); },
      scales);
}

// What PyTorch calls

template <class F>
Tensor by_dtype(const Tensor& x, const Tensor& weight, F run) {  // run(x, out), both pointers of x's dtype
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(1) % 16 == 0 && x.is_contiguous() &&
                      weight.is_contiguous(),
                  "rows and weight must be contiguous and have as many columns, a multiple of 16");
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (x.scalar_type() == ScalarType::BFloat16) {
    run(static_cast<const bf16*>(x.const_data_ptr()), static_cast<bf16*>(out.mutable_data_ptr()));
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "numbers must be bfloat16 or float32");
    run(static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()));
  }
  return out;
}

Tensor linear(Tensor x, Tensor weight) {
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "rows and weight must have the same dtype");
  return by_dtype(x, weight, [&]<class K>(const K* from, K* to) {
    few_rows(from, x.size(0), static_cast<const K*>(weight.const_data_ptr()), weight.size(0), x.size(1), to);
  });
}

Tensor linear_int8(Tensor x, Tensor weight, Tensor scale) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && scale.scalar_type() == ScalarType::Float && scale.is_contiguous() &&
                      scale.numel() == weight.size(0),
                  "the weight must be int8, its scales float32, one a row");
  return by_dtype(x, weight, [&]<class K>(const K* from, K* to) {
    few_rows_int8(from, x.size(0), static_cast<const int8_t*>(weight.const_data_ptr()), static_cast<const float*>(scale.const_data_ptr()),
                  weight.size(0), x.size(1), to);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(zoo, m) {
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor weight, Tensor scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(zoo, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
}

}  // namespace
