// Merging clusters on CPUs: `ward` and `rounded` of zoo/attention/clustering.py: the same labels, but for rounding and ties, and the same bits.
//
// ward, a head at a time: cost(a, b) = |x_a - x_b|^2 / (1/w_a + 1/w_b)
//
// In each round the lightest clusters look for their cheapest partners; coordinates lie one dimension after another, so that a vector is
// 16 candidates. A head of some hundred clusters stays in a core's first two caches.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t TOGETHER = 4;  // clusters that look at the same candidates

struct Clusters {  // of one head, those that may merge, in order
  int64_t count, size, F;
  std::vector<int64_t> place;                // where each comes from
  std::vector<float> x, weight, inverse;     // (F, size); (size,) 1 / weight, infinite where there is nothing any more
  std::vector<int64_t> into;                 // what each has become part of

  Clusters(const float* from, const float* w, const bool* alive, int64_t N, int64_t F) : F(F) {
    for (int64_t i = 0; i < N; i++)
      if (alive[i]) place.push_back(i);
    count = place.size(), size = (count + 15) / 16 * 16;
    x.resize(F * size), weight.assign(size, 0), inverse.assign(size, INF), into.resize(count);
    std::iota(into.begin(), into.end(), 0);
    for (int64_t i = 0; i < count; i++) {
      weight[i] = w[place[i]], inverse[i] = 1 / std::max(weight[i], 1e-30f);
      for (int64_t f = 0; f < F; f++) x[f * size + i] = from[place[i] * F + f];
    }
  }
  bool alive(int64_t i) const { return inverse[i] < INF; }
};

struct Pair {
  int64_t one, partner;
  float cost;
};

// For up to TOGETHER clusters, the cheapest partner of each; of equally cheap ones the first. Squared distances up to `unit` are ties.
void cheapest(const Clusters& c, float unit, Pair* pairs, int64_t many) {
  vf least[TOGETHER];
  vi which[TOGETHER];
  for (int64_t p = 0; p < TOGETHER; p++) least[p] = all(INF), which[p] = vi{} - 1;
  for (int64_t j = 0; j < c.size; j += 16) {
    vf d[TOGETHER] = {};
    for (int64_t f = 0; f < c.F; f++) {
      const vf other = load(&c.x[f * c.size + j]);
      for (int64_t p = 0; p < TOGETHER; p++) {
        const vf apart = other - c.x[f * c.size + pairs[std::min(p, many - 1)].one];
        d[p] += apart * apart;
      }
    }
    const vf inverse = load(&c.inverse[j]);
    const vi index = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + int32_t(j);
    for (int64_t p = 0; p < many; p++) {
      vf cost = d[p] > unit ? d[p] / ((c.inverse[pairs[p].one] + inverse) * unit) : vf{};
      cost = (inverse < INF) & (index != int32_t(pairs[p].one)) ? cost : all(INF);
      which[p] = cost < least[p] ? index : which[p];
      least[p] = cost < least[p] ? cost : least[p];
    }
  }
  for (int64_t p = 0; p < many; p++) {
    pairs[p].cost = INF, pairs[p].partner = -1;
    for (int i = 0; i < 16; i++) {
      const bool better = least[p][i] < pairs[p].cost || (least[p][i] == pairs[p].cost && which[p][i] < pairs[p].partner);
      if (least[p][i] < INF && better) pairs[p].cost = least[p][i], pairs[p].partner = which[p][i];
    }
  }
}

// The largest squared norm of those alive, times `tie`
float unit_of(const Clusters& c, float tie) {
  float most = 0;
  for (int64_t i = 0; i < c.count; i++) {
    float square = 0;
    for (int64_t f = 0; f < c.F; f++) square += c.x[f * c.size + i] * c.x[f * c.size + i];
    if (c.alive(i)) most = std::max(most, square);
  }
  return std::max(tie * most, 1e-30f);
}

void merge(Clusters& c, int64_t a, int64_t b) {  // b becomes part of a
  const float both = c.weight[a] + c.weight[b];
  for (int64_t f = 0; f < c.F; f++) {
    float *x = &c.x[f * c.size + a], y = c.x[f * c.size + b];
    *x = (*x * c.weight[a] + y * c.weight[b]) / std::max(both, 1e-30f);
  }
  c.weight[a] = both, c.inverse[a] = 1 / std::max(both, 1e-30f);
  c.weight[b] = 0, c.inverse[b] = INF;
  for (int64_t& i : c.into)
    if (i == b) i = a;
}

void shrink(Clusters& c, int64_t surplus, float tie) {
  std::vector<int64_t> light(c.count), best(c.count), taken(c.count);
  std::vector<Pair> pairs;
  while (surplus > 0) {
    light.clear();
    for (int64_t i = 0; i < c.count; i++)
      if (c.alive(i)) light.push_back(i);
    const int64_t wide = std::min<int64_t>(3 + surplus * 3 / 2, light.size());
    std::partial_sort(light.begin(), light.begin() + wide, light.end(), [&](int64_t i, int64_t j) {
      return c.weight[i] != c.weight[j] ? c.weight[i] < c.weight[j] : i < j;
    });
    pairs.clear();
    for (int64_t i = 0; i < wide; i++) pairs.push_back({light[i], -1, INF});
    const float unit = unit_of(c, tie);
    for (int64_t i = 0; i < wide; i += TOGETHER) cheapest(c, unit, &pairs[i], std::min(TOGETHER, wide - i));
    std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& p, const Pair& q) { return p.cost < q.cost; });
    while (!pairs.empty() && pairs.back().cost == INF) pairs.pop_back();
    // Any number of equal ones may go into the first of them; else those pairs merge that are cheaper than any other that touches them.
    std::fill(taken.begin(), taken.end(), 0);
    for (const Pair& p : pairs)
      if (p.cost == 0 && p.partner < p.one) taken[p.one] = 1;
    std::vector<Pair> good;
    for (const Pair& p : pairs)
      if (p.cost == 0 && p.partner < p.one && !taken[p.partner]) good.push_back(p);
    int64_t most = surplus;
    if (good.empty()) {
      most = (surplus + 1) / 2;
      std::fill(best.begin(), best.end(), c.count);
      for (int64_t rank = 0; rank < int64_t(pairs.size()); rank++)
        for (int64_t i : {pairs[rank].one, pairs[rank].partner}) best[i] = std::min(best[i], rank);
      for (int64_t rank = 0; rank < int64_t(pairs.size()); rank++)
        if (best[pairs[rank].one] == rank && best[pairs[rank].partner] == rank) good.push_back(pairs[rank]);
    }
    if (good.empty()) return;  // nothing is left that could merge
    good.resize(std::min<size_t>(good.size(), most));
    for (const Pair& p : good) merge(c, std::min(p.one, p.partner), std::max(p.one, p.partner));
    surplus -= good.size();
  }
}

Tensor ward(Tensor x, Tensor weight, Tensor alive, Tensor surplus, double tie) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous() && x.scalar_type() == ScalarType::Float, "points must be contiguous float32 (B, G, N, F)");
  const int64_t heads = x.size(0) * x.size(1), N = x.size(2), F = x.size(3);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == heads * N && weight.scalar_type() == ScalarType::Float,
                  "weights must be contiguous float32 (B, G, N)");
  STD_TORCH_CHECK(alive.is_contiguous() && alive.numel() == heads * N && alive.scalar_type() == ScalarType::Bool,
                  "what may merge must be contiguous bool (B, G, N)");
  STD_TORCH_CHECK(surplus.is_contiguous() && surplus.numel() == heads && surplus.scalar_type() == ScalarType::Long,
                  "surpluses must be contiguous int64 (B, G)");
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), N}, ScalarType::Long);
  const float *points = static_cast<const float*>(x.const_data_ptr()), *weights = static_cast<const float*>(weight.const_data_ptr());
  const bool* may = static_cast<const bool*>(alive.const_data_ptr());
  const int64_t* many = static_cast<const int64_t*>(surplus.const_data_ptr());
  int64_t* to = static_cast<int64_t*>(out.mutable_data_ptr());
#pragma omp parallel for schedule(dynamic)
  for (int64_t head = 0; head < heads; head++) {
    std::iota(to + head * N, to + (head + 1) * N, 0);
    if (many[head] <= 0) continue;
    Clusters c(points + head * N * F, weights + head * N, may + head * N, N, F);
    shrink(c, many[head], tie);
    for (int64_t i = 0; i < c.count; i++) to[head * N + c.place[i]] = c.place[c.into[i]];
  }
  return out;
}

// Rounding to bfloat16 at random. The numbers are those of zoo/random.py

constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15;

inline uint64_t scramble(uint64_t x) {  // splitmix64's finaliser
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

inline bf16 round_at_random(float x, float noise) {  // up or down, so that the expectation over noise is x
  const bf16 near(x);
  const float error = x - float(near);
  const bool up = error > 0, negative = near.x >> 15;
  bf16 other;
  if ((near.x & 0x7fff) == 0)
    other = bf16(up ? 1 : 0x8001, bf16::from_bits());
  else
    other = bf16(near.x + (up == negative ? -1 : 1), bf16::from_bits());
  return noise * std::abs(float(other) - float(near)) < std::abs(error) ? other : near;
}

// mean (M, D) float32, where (M, n) int64: what a row's draws are a function of, beside seed and dimension
Tensor rounded(Tensor mean, int64_t seed, Tensor where) {
  STD_TORCH_CHECK(mean.dim() == 2 && mean.is_contiguous() && mean.scalar_type() == ScalarType::Float, "means must be contiguous float32 (M, D)");
  STD_TORCH_CHECK(where.dim() == 2 && where.is_contiguous() && where.scalar_type() == ScalarType::Long && where.size(0) == mean.size(0),
                  "where draws belong must be contiguous int64 (M, n)");
  const int64_t M = mean.size(0), D = mean.size(1), n = where.size(1);
  Tensor out = torch::stable::new_empty(mean, {M, D}, ScalarType::BFloat16);
  const float* from = static_cast<const float*>(mean.const_data_ptr());
  const int64_t* at = static_cast<const int64_t*>(where.const_data_ptr());
  bf16* to = static_cast<bf16*>(out.mutable_data_ptr());
#pragma omp parallel for
  for (int64_t m = 0; m < M; m++) {
    uint64_t row = scramble(uint64_t(seed) + GOLDEN);
    for (int64_t i = 0; i < n; i++) row = scramble(row * GOLDEN + uint64_t(at[m * n + i]) + 1);
    for (int64_t d = 0; d < D; d++) {
      const uint64_t x = scramble(row * GOLDEN + uint64_t(d) + 1);
      const float noise = (float(x >> 41 & 0x7fffff) + 0.5f) * 0x1p-23f;
      to[m * D + d] = round_at_random(from[m * D + d], noise);
    }
  }
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(zoo, m) {
  m.def("ward(Tensor x, Tensor weight, Tensor alive, Tensor surplus, float tie) -> Tensor");
  m.def("rounded(Tensor mean, int seed, Tensor where) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(zoo, CPU, m) {
  m.impl("ward", TORCH_BOX(&ward));
  m.impl("rounded", TORCH_BOX(&rounded));
}

}  // namespace
