// Attention over slots on CPUs: the formula of zoo/attention/slots.py, one softmax (a = b), sums in float32.
//
//   few rows (a decode step): every key and value is read once per kv head, by whichever thread is free: heads are cut into
//   chunks of CHUNK slots, each a sum of its own, and the chunks of a head are added up at the end.
//   many rows (a prompt), bfloat16: blocks of ROWS query rows x COLUMNS slots that stay in a core's cache, their two products by
//   oneDNN's batch-reduce GEMM (AMX or AVX-512 where the machine has it), softmax online. Blocks that no query may see are skipped.
//
// A head is a run of consecutive rows: of a dense store (B, G, S, D), or of an arena of pages.
// Vectors are the compiler's own, so that the file compiles for any machine; positions are compared, never indices.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "vectors.h"

namespace at::native::cpublas {  // from PyTorch's library; C (M, N) = A (M, K) B (K, N), or C +=. B holds pairs of rows side by side
void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const c10::BFloat16* A,
            const c10::BFloat16* B, float* C, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace {

using torch::stable::Tensor;

constexpr float NONE = -std::numeric_limits<float>::infinity();
// FEW, from cpu.py: query rows of a kv head up to which keys are best read as they lie
constexpr int64_t CHUNK = 512;    // slots of a decode task
constexpr int64_t ROWS = 128;     // query rows of a prompt's block
constexpr int64_t COLUMNS = 256;  // slots of a prompt's block
constexpr float LAG = 16;         // octaves by which a row's maximum may grow before its sums are rescaled
constexpr float OCTAVES = 1.44269504f;  // e^x = 2^(OCTAVES x)

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87. x = n ln 2 + r, exp(r) by its Taylor series to r^7.
inline vf exponential(vf x) {
  const vf shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  vf n = (x * all(1.44269504f) + shift) - shift;
  vf r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);  // ln 2 in two parts
  vf p = all(1.0f / 5040);
  p = p * r + all(1.0f / 720);
  p = p * r + all(1.0f / 120);
  p = p * r + all(1.0f / 24);
  p = p * r + all(1.0f / 6);
  p = p * r + all(0.5f);
  p = p * r + all(1.0f);
  p = p * r + all(1.0f);
  vi e = (__builtin_convertvector(n, vi) + 127) << 23;
  vf y = p * (vf)e;
  return x > all(-87.0f) ? y : vf{};
}

// 2^x within 3e-6 of itself, for weights that are rounded to bfloat16 next; 0 below 2^-126. x = n + r, 2^r by a minimax polynomial.
inline vf power(vf x) {
  const vf shift = all(12582912.0f), whole = x + shift;  // whose lowest bits are n
  const vf r = x - (whole - shift);
  vf p = all(0.00957009897f);
  p = p * r + all(0.0559178601f);
  p = p * r + all(0.240247449f);
  p = p * r + all(0.693121815f);
  p = p * r + all(0.999999261f);
  const vf y = (vf)((vi)p + ((vi)whole << 23));
  return x > all(-126.0f) ? y : vf{};
}

// Consecutive rows of one kv head: of a dense store, or of its pages

struct Run {
  const void *k, *v;
  const int32_t* pos;
  const float* a;
  int64_t slots, row;                       // row: numbers from one key (or value) to the next
  float *mass = nullptr, *spikes = nullptr;  // where what they receive is added up
};

struct Call {
  int64_t B, H, G, T, D, window;
  bool low;  // bfloat16, else float32
  const void* q;
  int64_t qb, qh, qt;
  const int64_t* at;  // (B, T) contiguous
  void* out;
  float* lse;
  std::vector<std::vector<Run>> heads;  // B G
  int64_t rows() const { return H / G * T; }
};

inline bool sees(int32_t pos, int64_t at, int64_t window) { return pos >= 0 && pos <= at && (!window || pos > at - window); }

template <class K>
const K* query(const Call& c, int64_t head, int64_t row) {  // row r T + t of a kv head
  int64_t b = head / c.G, h = head % c.G * (c.H / c.G) + row / c.T;
  return static_cast<const K*>(c.q) + b * c.qb + h * c.qh + row % c.T * c.qt;
}

template <class K>
void finish(const Call& c, int64_t head, int64_t row, const float* num, float max, float den) {
  int64_t at = head * c.rows() + row;  // the H query heads of a sequence are its G kv heads' rows, in order
  c.lse[at] = den > 0 ? max + std::log(den) : NONE;
  K* to = static_cast<K*>(c.out) + at * c.D;
  float scale = den > 0 ? 1 / den : 0;
  for (int64_t d = 0; d < c.D; d += 16) store(to + d, load(num + d) * scale);
}

struct Seen {  // of a block of slots: positions of what it holds, and whether all of them hold something
  int64_t low, high;
  bool whole;
  bool hidden(int64_t first, int64_t last, int64_t window) const {  // from all queries at first..last
    return high < 0 || low > last || (window && high <= first - window);
  }
  bool open(int64_t at, int64_t window) const { return whole && high <= at && !(window && low <= at - window); }  // to a query, whole
};

Seen look(const int32_t* pos, int64_t count, int64_t wanted) {
  uint32_t low = 0xffffffff, last = 0;
  int32_t high = -1;
  for (int64_t j = 0; j < count; j++) {
    low = std::min(low, uint32_t(pos[j])), last = std::max(last, uint32_t(pos[j]));  // an empty slot's -1 is the largest
    high = std::max(high, pos[j]);
  }
  return {low, high, last < 0x80000000 && count == wanted};
}

// Rows of a block up to the last that holds a token: no row behind it is touched, whatever a store has reserved
int64_t held(const Run& h, int64_t first, int64_t most) {
  int64_t count = std::min(most, h.slots - first);
  while (count > 0 && h.pos[first + count - 1] < 0) count--;
  return count;
}

// Few rows

template <class K>
void scores(const K* q, int64_t M, const K* k, const K* next, int64_t stride, int64_t count, int64_t D, float* out) {  // q k / sqrt(D)
  products(q, M, k, next, stride, count, D, out);
  const float scale = 1 / std::sqrt(float(D));
  for (int64_t i = 0; i < M * BLOCK; i += 16) store(out + i, load(out + i) * scale);
}

template <class K, int N>
void add(float* num, const K* v, const K* next, int64_t row, int64_t D, const float* p, int64_t count) {  // num (N, D) += p (N, count) v (count, D)
  for (int64_t d = 0; d < D; d += 32) {
    bool two = d + 32 <= D;
    vf left[N], right[N];
    for (int n = 0; n < N; n++) left[n] = load(num + n * D + d), right[n] = two ? load(num + n * D + d + 16) : vf{};
    for (int64_t j = 0; j < count; j++) {
      fetch(next + j * row + d, 32 * sizeof(K));
      vf x = load(v + j * row + d), y = two ? load(v + j * row + d + 16) : vf{};
      for (int n = 0; n < N; n++) left[n] += x * p[n * BLOCK + j], right[n] += y * p[n * BLOCK + j];
    }
    for (int n = 0; n < N; n++) {
      store(num + n * D + d, left[n]);
      if (two) store(num + n * D + d + 16, right[n]);
    }
  }
}

template <class K>
void read_queries(const Call& c, int64_t head, K* q) {  // (M, D)
  for (int64_t m = 0; m < c.rows(); m++) std::memcpy(q + m * c.D, query<K>(c, head, m), c.D * sizeof(K));
}

struct Task {
  int64_t head;
  const Run* run;
  int64_t first;  // slot
};

std::vector<Task> cut(const Call& c, int64_t size) {  // all slots, in pieces of this size, head by head
  std::vector<Task> tasks;
  for (int64_t head = 0; head < c.B * c.G; head++)
    for (const Run& run : c.heads[head])
      for (int64_t s = 0; s < run.slots; s += size) tasks.push_back({head, &run, s});
  return tasks;
}

template <class K>
void few(const Call& c) {
  const int64_t M = c.rows(), D = c.D;
  const std::vector<Task> tasks = cut(c, CHUNK);
  std::vector<int64_t> begin(c.B * c.G + 1);
  for (const Task& task : tasks) begin[task.head + 1]++;
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  const int64_t width = D + 2;
  std::vector<float> parts(tasks.size() * M * width);  // per task and row: num (D), maximum, denominator
#pragma omp parallel
  {
    std::vector<K> q(M * D);
    std::vector<float> p(M * BLOCK);
    int64_t have = -1;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); i++) {
      const auto [head, run, first] = tasks[i];
      const Run& h = *run;
      const int64_t* at = c.at + head / c.G * c.T;
      if (have != head) read_queries(c, head, q.data()), have = head;
      const int64_t low = *std::min_element(at, at + c.T), high = *std::max_element(at, at + c.T);
      float* part = &parts[i * M * width];
      std::vector<float> num(M * D);
      for (int64_t m = 0; m < M; m++) part[m * width + D] = NONE, part[m * width + D + 1] = 0;
      for (int64_t s = first, end = std::min(first + CHUNK, h.slots); s < end; s += BLOCK) {
        const int64_t count = held(h, s, BLOCK);
        const K *k = static_cast<const K*>(h.k) + s * h.row, *v = static_cast<const K*>(h.v) + s * h.row;
        const Seen seen = look(h.pos + s, count, BLOCK);
        if (seen.hidden(low, high, c.window)) continue;
        scores(q.data(), M, k, v, h.row, count, D, p.data());
        for (int64_t m = 0; m < M; m++) {
          float *x = &p[m * BLOCK], *max = &part[m * width + D], *den = max + 1;
          if (h.a)
            for (int64_t j = 0; j < count; j++) x[j] += h.a[s + j];
          if (!seen.open(at[m % c.T], c.window)) {
            for (int64_t j = 0; j < count; j++)
              if (!sees(h.pos[s + j], at[m % c.T], c.window)) x[j] = NONE;
            for (int64_t j = count; j < BLOCK; j++) x[j] = NONE;
          }
          vf high = load(x);
          for (int64_t j = 16; j < BLOCK; j += 16) high = larger(high, load(x + j));
          const float new_max = std::max(*max, top(high));
          if (new_max == NONE) {
            std::fill(x, x + BLOCK, 0.f);
            continue;
          }
          if (new_max > *max) {
            const float shrink = std::exp(*max - new_max);
            *den *= shrink, *max = new_max;
            for (int64_t d = 0; d < D; d += 16) store(&num[m * D + d], load(&num[m * D + d]) * shrink);
          }
          vf total = {};
          for (int64_t j = 0; j < BLOCK; j += 16) {
            vf e = exponential(load(x + j) - new_max);
            store(x + j, e);
            total += e;
          }
          *den += sum(total);
        }
        for (int64_t m = 0; m < M; m += 4) {
          switch (std::min<int64_t>(4, M - m)) {
            case 1: add<K, 1>(&num[m * D], v, k + BLOCK * h.row, h.row, D, &p[m * BLOCK], count); break;
            case 2: add<K, 2>(&num[m * D], v, k + BLOCK * h.row, h.row, D, &p[m * BLOCK], count); break;
            case 3: add<K, 3>(&num[m * D], v, k + BLOCK * h.row, h.row, D, &p[m * BLOCK], count); break;
            default: add<K, 4>(&num[m * D], v, k + BLOCK * h.row, h.row, D, &p[m * BLOCK], count);
          }
        }
      }
      for (int64_t m = 0; m < M; m++) std::copy_n(&num[m * D], D, part + m * width);
    }
#pragma omp for
    for (int64_t row = 0; row < c.B * c.G * M; row++) {
      const int64_t head = row / M, m = row % M;
      float max = NONE, den = 0;
      std::vector<float> num(D);
      for (int64_t i = begin[head]; i < begin[head + 1]; i++) max = std::max(max, parts[(i * M + m) * width + D]);
      for (int64_t i = begin[head]; i < begin[head + 1] && max > NONE; i++) {
        const float *part = &parts[(i * M + m) * width], weight = std::exp(part[D] - max);
        den += weight * part[D + 1];
        for (int64_t d = 0; d < D; d += 16) store(&num[d], load(&num[d]) + load(part + d) * weight);
      }
      finish<K>(c, head, m, num.data(), max, den);
    }
  }
}

// Many rows, bfloat16

inline uint32_t pair(const bf16* low, const bf16* high) { return uint32_t(low->x) | uint32_t(high->x) << 16; }

// k (count, D) -> its transpose in pairs: (D / 2, COLUMNS) of two numbers each; columns beyond count are 0
void pack_keys(const bf16* k, int64_t row, int64_t count, int64_t D, uint32_t* to) {
  for (int64_t j = 0; j < COLUMNS; j++) {
    if (j < count) {
      uint32_t pairs[128];
      std::memcpy(pairs, k + j * row, D * 2);
      for (int64_t d = 0; d < D / 2; d++) to[d * COLUMNS + j] = pairs[d];
    } else {
      for (int64_t d = 0; d < D / 2; d++) to[d * COLUMNS + j] = 0;
    }
  }
}

// v (count, D) in pairs of rows: (COLUMNS / 2, D) of two numbers each
void pack_values(const bf16* v, int64_t row, int64_t count, int64_t D, uint32_t* to) {
  static const bf16 zeros[256] = {};
  for (int64_t j = 0; j < COLUMNS; j += 2) {
    const bf16 *x = j < count ? v + j * row : zeros, *y = j + 1 < count ? v + (j + 1) * row : zeros;
    for (int64_t d = 0; d < D; d++) to[j / 2 * D + d] = pair(x + d, y + d);
  }
}

struct Packed {  // a head's blocks of keys and values as the GEMM wants them: those that some query may see
  std::vector<uint32_t> k, v;
  std::vector<Task> blocks;
  std::vector<int64_t> count;  // rows of each, up to the last that holds a token
  std::vector<Seen> seen;
};

std::vector<Packed> choose(const Call& c) {
  std::vector<Packed> packed(c.B * c.G);
  for (const Task& block : cut(c, COLUMNS)) {
    const Run& h = *block.run;
    const int64_t* at = c.at + block.head / c.G * c.T;
    const int64_t count = held(h, block.first, COLUMNS);
    int64_t oldest = std::numeric_limits<int64_t>::max(), newest = -1;
    for (int64_t t = 0; t < c.T; t++)
      if (at[t] >= 0) oldest = std::min(oldest, at[t]), newest = std::max(newest, at[t]);
    const Seen seen = look(h.pos + block.first, count, COLUMNS);
    if (seen.hidden(oldest, newest, c.window)) continue;
    Packed& to = packed[block.head];
    to.blocks.push_back(block), to.count.push_back(count), to.seen.push_back(seen);
  }
  for (Packed& to : packed) to.k.resize(to.seen.size() * c.D / 2 * COLUMNS), to.v.resize(to.seen.size() * COLUMNS / 2 * c.D);
  return packed;
}

// x (rows, COLUMNS) = q k of a block: log-weights are added, in units of 1 / scale, and what a query may not see becomes -inf
void mask(float* x, const Run& h, int64_t s, int64_t count, const int64_t* at, int64_t rows, int64_t window, const Seen& seen,
          float scale) {
  for (int64_t m = 0; m < rows; m++, x += COLUMNS) {
    if (h.a)
      for (int64_t j = 0; j < count; j++) x[j] += h.a[s + j] / scale;
    if (!seen.open(at[m], window)) {
      const vi first = vi{} + int32_t(window ? std::max<int64_t>(at[m] - window + 1, 0) : 0), last = vi{} + int32_t(at[m]);
      int64_t j = 0;
      for (; j + 16 <= count; j += 16) {
        vi pos;
        std::memcpy(&pos, h.pos + s + j, 64);
        store(x + j, pos >= first & pos <= last ? load(x + j) : all(NONE));
      }
      for (; j < COLUMNS; j++)
        if (j >= count || !sees(h.pos[s + j], at[m], window)) x[j] = NONE;
    }
  }
}

// Query rows first, first + 1, ... of a kv head into q (ROWS, D), zeros behind them, and where they stand -> the first and last position
std::pair<int64_t, int64_t> read_tile(const Call& c, int64_t head, int64_t first, int64_t rows, bf16* q, int64_t* at) {
  int64_t low = std::numeric_limits<int64_t>::max(), high = -1;
  std::fill_n(q, ROWS * c.D, bf16(0.f));
  for (int64_t m = 0; m < rows; m++) {
    std::memcpy(q + m * c.D, query<bf16>(c, head, first + m), c.D * 2);
    at[m] = c.at[head / c.G * c.T + (first + m) % c.T];
    if (at[m] >= 0) low = std::min(low, at[m]), high = std::max(high, at[m]);
  }
  return {low, high};
}

bool probe() {  // throws here, where that is an error, if the library has no such GEMM; among threads it would end the process
  alignas(64) bf16 a[16 * 32] = {}, b[32 * 16] = {};
  alignas(64) float x[16 * 16];
  at::native::cpublas::brgemm(16, 16, 32, 32, 16, 16, false, a, b, x, true);
  at::native::cpublas::brgemm_release(true);
  return true;
}

struct Weights {
  vf sum, high;  // high: the largest exponents
};

Weights weigh(const float* x, float unit, float base, bf16* p) {  // p (COLUMNS) = 2^(x unit - base)
  vf total[2] = {}, high[2] = {all(NONE), all(NONE)};
  for (int64_t j = 0; j < COLUMNS; j += 32) {
    vf e[2];
    for (int n = 0; n < 2; n++) {
      const vf y = load(x + j + 16 * n) * unit - base;
      high[n] = larger(y, high[n]);  // in this order a number that is none (-inf - -inf) is passed over
      e[n] = power(y);
      total[n] += e[n];
    }
    store(p + j, e[0], e[1]);
  }
  return {total[0] + total[1], larger(high[0], high[1])};
}

float highest(const float* x) {  // of COLUMNS
  vf high = load(x);
  for (int64_t j = 16; j < COLUMNS; j += 16) high = larger(high, load(x + j));
  return top(high);
}

void many(const Call& c) {
  const int64_t M = c.rows(), D = c.D, tiles = (M + ROWS - 1) / ROWS, heads = c.B * c.G;
  const float scale = 1 / std::sqrt(float(D)), unit = scale * OCTAVES;
  std::vector<Packed> packed = choose(c);
#pragma omp parallel
  {
    std::vector<float> x(ROWS * COLUMNS), num(ROWS * D), base(ROWS), den(16 * ROWS);  // base: in octaves
    std::vector<bf16> p(ROWS * COLUMNS), q(ROWS * D);
    std::vector<int64_t> at(ROWS);
    for (int64_t head = 0; head < heads; head++) {
      Packed& to = packed[head];
#pragma omp for nowait
      for (int64_t i = 0; i < int64_t(to.seen.size()); i++) {
        const Run& h = *to.blocks[i].run;
        const int64_t s = to.blocks[i].first;
        pack_keys(static_cast<const bf16*>(h.k) + s * h.row, h.row, to.count[i], D, &to.k[i * D / 2 * COLUMNS]);
        pack_values(static_cast<const bf16*>(h.v) + s * h.row, h.row, to.count[i], D, &to.v[i * COLUMNS / 2 * D]);
      }
    }
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * tiles; task++) {
      const int64_t head = task % heads, first = (tiles - 1 - task / heads) * ROWS, rows = std::min(ROWS, M - first);
      const auto [low, high] = read_tile(c, head, first, rows, q.data(), at.data());
      std::fill(num.begin(), num.end(), 0.f), std::fill(base.begin(), base.end(), NONE), std::fill(den.begin(), den.end(), 0.f);
      for (size_t i = 0; i < packed[head].seen.size(); i++) {
        const Seen& seen = packed[head].seen[i];
        if (seen.hidden(low, high, c.window)) continue;
        const Run& h = *packed[head].blocks[i].run;
        const int64_t s = packed[head].blocks[i].first, count = packed[head].count[i];
        at::native::cpublas::brgemm(ROWS, COLUMNS, D, D, COLUMNS, COLUMNS, false, q.data(),
                                    reinterpret_cast<const bf16*>(&packed[head].k[i * D / 2 * COLUMNS]), x.data(), true);
        mask(x.data(), h, s, count, at.data(), rows, c.window, seen, scale);
        for (int64_t m = 0; m < rows; m++) {
          const float* row = &x[m * COLUMNS];
          Weights got = weigh(row, unit, base[m], &p[m * COLUMNS]);
          if (any(got.high > all(LAG))) {  // of the first block that a query sees anything of, always: its base is -inf
            const float new_base = highest(row) * unit, shrink = std::exp2(base[m] - new_base);
            base[m] = new_base;
            store(&den[16 * m], load(&den[16 * m]) * shrink);
            for (int64_t d = 0; d < D; d += 16) store(&num[m * D + d], load(&num[m * D + d]) * shrink);
            got = weigh(row, unit, new_base, &p[m * COLUMNS]);
          }
          store(&den[16 * m], load(&den[16 * m]) + got.sum);
        }
        at::native::cpublas::brgemm(ROWS, D, COLUMNS, COLUMNS, D, D, true, p.data(),
                                    reinterpret_cast<const bf16*>(&packed[head].v[i * COLUMNS / 2 * D]), num.data(), true);
      }
      for (int64_t m = 0; m < rows; m++) finish<bf16>(c, head, first + m, &num[m * D], base[m] / OCTAVES, sum(load(&den[16 * m])));
    }
    at::native::cpublas::brgemm_release(true);
  }
}

// The probability that slots receive: exp(score - lse), to the powers 1 and 2, summed over queries

template <class K>
void few_mass(const Call& c, const float* weights) {  // (B, T): how much a query counts
  const int64_t M = c.rows(), D = c.D;
  const std::vector<Task> tasks = cut(c, BLOCK);
#pragma omp parallel
  {
    std::vector<K> q(M * D);
    std::vector<float> p(M * BLOCK);
    int64_t have = -1;
#pragma omp for schedule(static)
    for (size_t i = 0; i < tasks.size(); i++) {
      const auto [head, run, s] = tasks[i];
      const Run& h = *run;
      const int64_t* at = c.at + head / c.G * c.T;
      const int64_t count = held(h, s, BLOCK);
      if (look(h.pos + s, count, BLOCK).hidden(*std::min_element(at, at + c.T), *std::max_element(at, at + c.T), c.window)) continue;
      if (have != head) read_queries(c, head, q.data()), have = head;
      const K* k = static_cast<const K*>(h.k) + s * h.row;
      scores(q.data(), M, k, k + BLOCK * h.row, h.row, count, D, p.data());
      for (int64_t m = 0; m < M; m++) {
        const float weight = weights[head / c.G * c.T + m % c.T], lse = c.lse[head * M + m];
        if (weight == 0 || lse == NONE) continue;
        float* x = &p[m * BLOCK];
        for (int64_t j = 0; j < count; j++)
          x[j] = sees(h.pos[s + j], at[m % c.T], c.window) ? x[j] + (h.a ? h.a[s + j] : 0) - lse : NONE;
        for (int64_t j = 0; j < BLOCK; j += 16) store(x + j, exponential(load(x + j)));
        for (int64_t j = 0; j < count; j++) {
          h.mass[s + j] += weight * x[j];
          h.spikes[s + j] += weight * x[j] * x[j];
        }
      }
    }
  }
}

void many_mass(const Call& c, const float* weights) {
  const int64_t M = c.rows(), D = c.D, tiles = (M + ROWS - 1) / ROWS;
  const float scale = 1 / std::sqrt(float(D));
  std::vector<Task> tasks = cut(c, COLUMNS);  // early slots are seen by most queries: they come first
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.first < y.first; });
#pragma omp parallel
  {
    std::vector<float> x(ROWS * COLUMNS), sum(COLUMNS), squares(COLUMNS);
    std::vector<bf16> q(ROWS * D);
    std::vector<uint32_t> k(D / 2 * COLUMNS);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); i++) {
      const auto [head, run, s] = tasks[i];
      const Run& h = *run;
      const int64_t count = held(h, s, COLUMNS);
      const Seen seen = look(h.pos + s, count, COLUMNS);
      if (seen.high < 0) continue;  // nothing here
      pack_keys(static_cast<const bf16*>(h.k) + s * h.row, h.row, count, D, k.data());
      std::fill(sum.begin(), sum.end(), 0.f), std::fill(squares.begin(), squares.end(), 0.f);
      for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = tile * ROWS, rows = std::min(ROWS, M - first);
        int64_t at[ROWS];
        const auto [low, high] = read_tile(c, head, first, rows, q.data(), at);
        if (seen.hidden(low, high, c.window)) continue;
        at::native::cpublas::brgemm(ROWS, COLUMNS, D, D, COLUMNS, COLUMNS, false, q.data(), reinterpret_cast<const bf16*>(k.data()),
                                    x.data(), true);
        mask(x.data(), h, s, count, at, rows, c.window, seen, scale);
        for (int64_t m = 0; m < rows; m++) {
          const float weight = weights[head / c.G * c.T + (first + m) % c.T], lse = c.lse[head * M + first + m];
          if (weight == 0 || lse == NONE) continue;
          for (int64_t j = 0; j < COLUMNS; j += 16) {
            vf e = exponential(load(&x[m * COLUMNS + j]) * scale - lse), part = e * weight;
            store(&sum[j], load(&sum[j]) + part);
            store(&squares[j], load(&squares[j]) + part * e);
          }
        }
      }
      for (int64_t j = 0; j < count; j++) {
        h.mass[s + j] = sum[j];
        h.spikes[s + j] = squares[j];
      }
    }
    at::native::cpublas::brgemm_release(true);
  }
}

// What PyTorch calls

void need_gemm() {
  static const bool there = probe();
  (void)there;
}

void run(const Call& c) {
  if (!c.low) {
    few<float>(c);
  } else if (c.rows() <= FEW) {
    few<bf16>(c);
  } else {
    need_gemm();
    many(c);
  }
}

void run_mass(const Call& c, const float* weights) {
  if (std::all_of(weights, weights + c.B * c.T, [](float w) { return w == 0; })) return;  // most decode steps are not observed
  if (!c.low) {
    few_mass<float>(c, weights);
  } else if (c.rows() <= FEW) {
    few_mass<bf16>(c, weights);
  } else {
    many_mass(c, weights);
  }
}

using torch::headeronly::ScalarType;

void expect(bool right, const char* what) { STD_TORCH_CHECK(right, what); }

Call prepare(const Tensor& q, const Tensor& q_pos, int64_t G, int64_t window) {
  Call c;
  expect(q.dim() == 4 && q_pos.dim() == 2 && q.size(0) > 0 && q.size(2) > 0, "queries must be (B, H, T, D), positions (B, T)");
  expect(q_pos.scalar_type() == ScalarType::Long && q_pos.size(0) == q.size(0) && q_pos.size(1) == q.size(2),
         "positions of queries must be int64 (B, T)");
  expect(G > 0 && q.size(1) % G == 0, "query heads must be a multiple of key/value heads");
  c.B = q.size(0), c.H = q.size(1), c.T = q.size(2), c.D = q.size(3), c.G = G, c.window = window;
  c.low = q.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  STD_TORCH_CHECK(c.low || q.scalar_type() == torch::headeronly::ScalarType::Float, "queries must be bfloat16 or float32");
  STD_TORCH_CHECK(c.D % 16 == 0 && c.D <= 256, "head sizes must be multiples of 16 up to 256");
  STD_TORCH_CHECK(q.stride(3) == 1 && q_pos.is_contiguous(), "queries must be contiguous");
  c.heads.resize(c.B * c.G);
  c.q = q.const_data_ptr(), c.qb = q.stride(0), c.qh = q.stride(1), c.qt = q.stride(2);
  c.at = static_cast<const int64_t*>(q_pos.const_data_ptr());
  return c;
}

template <class K>
const void* shifted(const Tensor& t, int64_t by) {
  return static_cast<const K*>(t.const_data_ptr()) + by;
}

void expect_slots(const Call& c, const Tensor& k, const Tensor& v, const Tensor& pos) {
  const ScalarType type = c.low ? ScalarType::BFloat16 : ScalarType::Float;
  expect(k.scalar_type() == type && v.scalar_type() == type, "keys and values must have the queries' dtype");
  expect(k.size(k.dim() - 1) == c.D && v.size(v.dim() - 1) == c.D && v.size(v.dim() - 2) == k.size(k.dim() - 2),
         "keys and values must have as many rows, and the queries' head size");
  expect(pos.scalar_type() == ScalarType::Int && pos.size(pos.dim() - 1) == k.size(k.dim() - 2), "positions of slots must be int32, one a row");
}

void add_heads(Call& c, const Tensor& k, const Tensor& v, const Tensor& pos, const std::optional<Tensor>& a) {  // a dense store
  expect_slots(c, k, v, pos);
  expect(k.dim() == 4 && v.dim() == 4 && pos.dim() == 3 && k.size(0) == c.B && v.size(0) == c.B && pos.size(0) == c.B && v.size(1) == c.G &&
             (pos.size(1) == 1 || pos.size(1) == c.G),
         "slots must be (B, G, S, D), their positions (B, G or 1, S)");
  expect(!a || (a->scalar_type() == ScalarType::Float && a->dim() == 3 && a->size(0) == c.B && a->size(1) == c.G && a->size(2) == k.size(2)),
         "log-weights must be float32 (B, G, S)");
  STD_TORCH_CHECK(k.stride(3) == 1 && v.stride(3) == 1 && k.stride(2) == v.stride(2) && pos.stride(2) == 1, "slots must be rows");
  STD_TORCH_CHECK(!a || a->stride(2) == 1, "log-weights must be rows");
  const int64_t size = c.low ? 2 : 4;
  for (int64_t b = 0; b < c.B; b++)
    for (int64_t g = 0; g < c.G; g++)
      c.heads[b * c.G + g].push_back({shifted<char>(k, size * (b * k.stride(0) + g * k.stride(1))),
                         shifted<char>(v, size * (b * v.stride(0) + g * v.stride(1))),
                         static_cast<const int32_t*>(shifted<int32_t>(pos, b * pos.stride(0) + (pos.size(1) == 1 ? 0 : g * pos.stride(1)))),
                         a ? static_cast<const float*>(shifted<float>(*a, b * a->stride(0) + g * a->stride(1))) : nullptr, k.size(2),
                         k.stride(2)});
}

// spans (B G, 3): a head's first page in the arena, how many it owns, and where they begin in a list of the layer's pages
void add_pages(Call& c, const Tensor& k, const Tensor& v, const Tensor& pos, const Tensor& a, const Tensor& where) {
  expect_slots(c, k, v, pos);
  expect(k.dim() == 3 && v.dim() == 3 && pos.dim() == 2 && v.size(0) == k.size(0) && pos.size(0) == k.size(0), "pages must be (P, rows, D)");
  expect(k.is_contiguous() && v.is_contiguous() && pos.is_contiguous() && a.is_contiguous() && where.is_contiguous(), "pages must be contiguous");
  expect(a.scalar_type() == ScalarType::Float && a.numel() == pos.numel(), "log-weights must be float32, one a row");
  expect(where.scalar_type() == ScalarType::Int && where.dim() == 2 && where.size(0) == c.B * c.G && where.size(1) == 3,
         "spans must be int32 (B G, 3)");
  const int32_t* spans = static_cast<const int32_t*>(where.const_data_ptr());
  for (int64_t head = 0; head < c.B * c.G; head++)
    expect(spans[3 * head] >= 0 && spans[3 * head + 1] >= 0 && spans[3 * head] + spans[3 * head + 1] <= k.size(0), "a span leaves the arena");
  const int64_t size = c.low ? 2 : 4, page = k.size(1);
  for (int64_t head = 0; head < c.B * c.G; head++) {
    const int64_t first = spans[3 * head] * page;
    c.heads[head].push_back({shifted<char>(k, size * first * c.D), shifted<char>(v, size * first * c.D),
                       static_cast<const int32_t*>(shifted<int32_t>(pos, first)),
                       static_cast<const float*>(shifted<float>(a, first)), spans[3 * head + 1] * page, c.D});
  }
}

using Pages = std::optional<Tensor>;  // none of them, or all: keys, values, positions, log-weights, spans

// k, v, pos, a: a dense store. pk ...: pages beside it, whose slots are seen in the same softmax
Call prepare(const Tensor& q, const Tensor& q_pos, const Tensor& k, const Tensor& v, const Tensor& pos, const std::optional<Tensor>& a,
             const Pages& pk, const Pages& pv, const Pages& ppos, const Pages& pa, const Pages& spans, int64_t window) {
  Call c = prepare(q, q_pos, k.size(1), window);
  add_heads(c, k, v, pos, a);
  expect(bool(pk) == bool(pv) && bool(pk) == bool(ppos) && bool(pk) == bool(pa) && bool(pk) == bool(spans), "pages are given whole, or not at all");
  if (pk) add_pages(c, *pk, *pv, *ppos, *pa, *spans);
  return c;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor q_pos, Tensor k, Tensor v, Tensor pos, std::optional<Tensor> a, Pages pk, Pages pv,
                                     Pages ppos, Pages pa, Pages spans, int64_t window) {
  Call c = prepare(q, q_pos, k, v, pos, a, pk, pv, ppos, pa, spans, window);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {c.B, c.H, c.T}, ScalarType::Float);
  c.out = out.mutable_data_ptr(), c.lse = static_cast<float*>(lse.mutable_data_ptr());
  run(c);
  return {out, lse};
}

// The same, and what slots receive: of the store (B, G, S), and of the pages in the list that spans speak of
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_and_mass(Tensor q, Tensor q_pos, Tensor k, Tensor v, Tensor pos,
                                                                      std::optional<Tensor> a, Pages pk, Pages pv, Pages ppos, Pages pa,
                                                                      Pages spans, Pages listed, Tensor weight, int64_t window) {
  Call c = prepare(q, q_pos, k, v, pos, a, pk, pv, ppos, pa, spans, window);
  expect(weight.is_contiguous() && weight.scalar_type() == ScalarType::Float && weight.numel() == c.B * c.T,
         "weights of queries must be contiguous float32 (B, T)");
  expect(bool(pk) == bool(listed), "pages are given whole, or not at all");
  const int64_t pages = pk ? listed->size(0) : 0, page = pk ? pk->size(1) : 1;
  const auto zeros = [&](std::vector<int64_t> size) { return torch::stable::new_zeros(q, size, ScalarType::Float); };
  Tensor mass = zeros({c.B, c.G, k.size(2)}), spikes = zeros({c.B, c.G, k.size(2)}), pmass = zeros({pages, page}), pspikes = zeros({pages, page});
  const auto place = [](Run& run, const Tensor& mass, const Tensor& spikes, int64_t at) {
    run.mass = static_cast<float*>(mass.mutable_data_ptr()) + at, run.spikes = static_cast<float*>(spikes.mutable_data_ptr()) + at;
  };
  const int32_t* span = pk ? static_cast<const int32_t*>(spans->const_data_ptr()) : nullptr;
  for (int64_t head = 0; head < c.B * c.G; head++) {
    place(c.heads[head][0], mass, spikes, head * k.size(2));
    if (!pk) continue;
    expect(span[3 * head + 2] >= 0 && span[3 * head + 2] + span[3 * head + 1] <= pages, "a span leaves the list of pages");
    place(c.heads[head][1], pmass, pspikes, span[3 * head + 2] * page);
  }
  Tensor out = torch::stable::new_empty(q, q.sizes());
  std::vector<float> lse(c.B * c.H * c.T);
  c.out = out.mutable_data_ptr(), c.lse = lse.data();
  run(c);
  run_mass(c, static_cast<const float*>(weight.const_data_ptr()));
  return {out, mass, spikes, pmass, pspikes};
}

STABLE_TORCH_LIBRARY(zoo, m) {
  // The layout of a store is no business of the compiler's: without this tag, it copies the cache before every call.
  const std::vector<at::Tag> tags{at::Tag::flexible_layout};
  m.def(
      "attention(Tensor q, Tensor q_pos, Tensor k, Tensor v, Tensor pos, Tensor? a, Tensor? pk, Tensor? pv, Tensor? ppos, Tensor? pa, "
      "Tensor? spans, int window) -> (Tensor, Tensor)",
      tags);
  m.def(
      "attention_and_mass(Tensor q, Tensor q_pos, Tensor k, Tensor v, Tensor pos, Tensor? a, Tensor? pk, Tensor? pv, Tensor? ppos, "
      "Tensor? pa, Tensor? spans, Tensor? listed, Tensor weight, int window) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
}

STABLE_TORCH_LIBRARY_IMPL(zoo, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_and_mass", TORCH_BOX(&attention_and_mass));
}

}  // namespace
