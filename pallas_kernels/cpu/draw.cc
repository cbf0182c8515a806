// One token from each row of logits, for x86 with AVX-512, as XLA calls it (see draw.py): the
// highest, or one by chance after min_p, top_k and top_p. Exact, and without sorting a vocabulary:
//
//   a row falls into blocks, whose highest logits are found first; what lies below a cut by min_p
//   or top_k is then skipped by the block; a top_p cut is not searched for at all: a token is drawn
//   from what is left, and if those above it alone make up top_p, it and all below are left out
//   and another is drawn, until one is not too low. What stays always holds all that may be drawn,
//   so each of those keeps its share.
//
// Knows logits and rules, nothing of slots. A row's result does not depend on the rows beside it.

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "draw.h"
#include "ffi.h"
#include "team.h"
#include "vector.h"

namespace {

constexpr int64_t kBlock = 512;
constexpr float kLeast = -100.0f;  // e^x of less is nothing beside the best's 1

// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
double uniform(uint64_t& state) {
  uint64_t z = state += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-53;
}

struct Row {
  const float* logits;
  int64_t vocab;
  float best = -INFINITY, inverse_heat = 1.0f;
  float floor = -INFINITY;   // logits below are not drawn
  bool above = false;        // nor is `floor` itself
  std::vector<float> highest;  // of each block
  std::vector<double> mass;    // of each block, of what may be drawn
  double total = 0.0;

  int64_t blocks() const { return (vocab + kBlock - 1) / kBlock; }

  // body(index of the first of sixteen, mask, logits) over one block.
  template <class Body>
  void each(int64_t block, const Body& body) const {
    const int64_t end = std::min(vocab, (block + 1) * kBlock);
    for (int64_t i = block * kBlock; i < end; i += 16) {
      const __mmask16 in = first(end - i);
      body(i, in, _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), in, logits + i));
    }
  }

  // Fills `highest` and `best`; false where a logit is not a number.
  bool look() {
    __mmask16 nan = 0;
    highest.resize(blocks());
    for (int64_t b = 0; b < blocks(); ++b) {
      __m512 most = _mm512_set1_ps(-INFINITY);
      each(b, [&](int64_t, __mmask16, __m512 x) {
        nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, x);
      });
      highest[b] = _mm512_reduce_max_ps(most);
      best = std::max(best, highest[b]);
    }
    return !nan;
  }

  int64_t first_best() const {
    const int64_t b = std::find(highest.begin(), highest.end(), best) - highest.begin();
    return std::find(logits + b * kBlock, logits + vocab, best) - logits;
  }

  // The k-th highest logit. So many blocks' highest are k logits, so it is none below the k-th of
  // those; few are above.
  float kth(int64_t k) const {
    const auto at = [](std::vector<float>& values, int64_t k) {
      std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
      return values[k - 1];
    };
    std::vector<float> values = highest;
    const float least = k <= blocks() ? at(values, k) : -INFINITY;
    values.clear();
    for (int64_t b = 0; b < blocks(); ++b)
      if (highest[b] >= least)
        for (int64_t i = b * kBlock; i < std::min(vocab, (b + 1) * kBlock); ++i)
          if (logits[i] >= least) values.push_back(logits[i]);
    return at(values, k);
  }

  __mmask16 may(__mmask16 in, __m512 x) const {
    const __m512 least = _mm512_set1_ps(floor);
    return above ? _mm512_mask_cmp_ps_mask(in, x, least, _CMP_GT_OQ)
                 : _mm512_mask_cmp_ps_mask(in, x, least, _CMP_GE_OQ);
  }

  __m512 weight(__mmask16 in, __m512 x) const {
    const __m512 hot = _mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(best)), _mm512_set1_ps(inverse_heat));
    const __mmask16 counts = _mm512_mask_cmp_ps_mask(may(in, x), hot, _mm512_set1_ps(kLeast), _CMP_GT_OQ);
    return _mm512_maskz_mov_ps(counts, exponential(hot));
  }

  // Fills `mass` and `total` by `floor`.
  void weigh() {
    mass.resize(blocks());
    total = 0.0;
    for (int64_t b = 0; b < blocks(); ++b) {
      __m512 sum = _mm512_setzero_ps();
      if (above ? highest[b] > floor : highest[b] >= floor)
        each(b, [&](int64_t, __mmask16 in, __m512 x) { sum = _mm512_add_ps(sum, weight(in, x)); });
      total += mass[b] = _mm512_reduce_add_ps(sum);
    }
  }

  // The token in which `target`, in [0, total), falls; the last possible where rounding missed it.
  int64_t find(double target) const {
    int64_t b = 0, last = 0;
    for (; b < blocks(); ++b) {
      if (mass[b] <= 0.0) continue;
      last = b;
      if (target < mass[b]) break;
      target -= mass[b];
    }
    if (b == blocks()) target = INFINITY;
    alignas(64) float weights[kBlock];
    each(last, [&](int64_t i, __mmask16 in, __m512 x) {
      _mm512_store_ps(weights + (i - last * kBlock), weight(in, x));
    });
    int64_t token = 0;
    for (int64_t i = 0; i < std::min(kBlock, vocab - last * kBlock); ++i) {
      if (weights[i] <= 0.0f) continue;
      token = last * kBlock + i;
      if (target < weights[i]) break;
      target -= weights[i];
    }
    return token;
  }
};

struct Rule {
  float temperature, top_p, min_p;
  int32_t top_k;
  uint64_t seed;
};

int64_t by_chance(Row& row, Rule rule) {
  row.inverse_heat = 1.0f / rule.temperature;
  row.floor = row.best + std::log(rule.min_p) * rule.temperature;
  if (rule.top_k > 0 && rule.top_k < row.vocab) row.floor = std::max(row.floor, row.kth(rule.top_k));
  row.weigh();
  const double goal = rule.top_p * row.total;
  for (;;) {
    const int64_t token = row.find(uniform(rule.seed) * row.total);
    const float own = row.logits[token];
    if (!(rule.top_p < 1.0f) || own == row.best) return token;
    row.floor = own, row.above = true;
    row.weigh();
    if (row.total < goal) return token;
  }
}

}  // namespace

Rules::Rules(ffi::Buffer** args)
    : temperature(args[0]->as<float>()), top_p(args[1]->as<float>()), min_p(args[2]->as<float>()),
      top_k(args[3]->as<int32_t>()), seeds(args[4]->as<uint32_t>()) {}

void draw(const float* logits, int64_t rows, int64_t vocab, const Rules& rules, float* best,
          int32_t* tokens) {
  team().each(rows, [&](int64_t m) {
    Row row;
    row.logits = logits + m * vocab, row.vocab = vocab;
    tokens[m] = 0;
    if (!row.look()) {
      best[m] = NAN;
      return;
    }
    best[m] = row.best;
    const Rule rule = {rules.temperature[m], rules.top_p[m], rules.min_p[m], rules.top_k[m],
                       uint64_t{rules.seeds[2 * m]} << 32 | rules.seeds[2 * m + 1]};
    const bool drawn = rule.temperature > 0.0f && std::isfinite(row.best);
    tokens[m] = static_cast<int32_t>(drawn ? by_chance(row, rule) : row.first_best());
  });
}

extern "C" {

// live [1] s32, logits [rows, vocab] f32, temperature, top_p, min_p [rows] f32, top_k [rows] s32,
// seeds [rows, 2] u32 -> of each row the highest logit [rows] f32, not a number where one is not,
// and the token [rows] s32; rows from `live` on are zeros.
void* fastserve_draw(ffi::CallFrame* frame) {
  if (!frame->runs()) return nullptr;
  ffi::Buffer** args = frame->args.buffers;
  const int64_t all = args[1]->dims[0], vocab = args[1]->dims[1];
  const int64_t rows = std::clamp<int64_t>(*args[0]->as<int32_t>(), 0, all);
  float* best = frame->rets.buffers[0]->as<float>();
  int32_t* tokens = frame->rets.buffers[1]->as<int32_t>();
  draw(args[1]->as<float>(), rows, vocab, Rules(args + 2), best, tokens);
  std::fill(best + rows, best + all, 0.0f), std::fill(tokens + rows, tokens + all, 0);
  return nullptr;
}

}  // extern "C"
