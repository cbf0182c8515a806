// int8 matrix products for x86 with AVX-512 VNNI, as XLA calls them (see int8.py):
//
//   out[m, n] = row_scale[m] * scale[n] * sum_k q[m, k] * weight[n, k]
//
// where q are the rows of x, turned by a Hadamard matrix in blocks and rounded to eight bits. A norm
// or a gated activation before that, a norm and a sum after it are part of the call: at a few rows
// the weights' bytes are what takes time, and a compiler's dozen small loops around a product would
// take as long again. A row's result does not depend on the rows beside it. Knows shapes and
// pointers, nothing of models.

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "draw.h"
#include "ffi.h"
#include "team.h"
#include "vector.h"

namespace {

enum Before { kNothing, kNorm, kGatedGelu, kGatedSilu };
enum After { kStore, kAdd, kNormAdd };

constexpr int64_t kTaskBytes = 32 << 10;  // of weights: a task must be worth its hand-over,
constexpr int64_t kMostBytes = 256 << 10;  // and longer stretches of memory are read faster
constexpr int64_t kTasks = 64;             // that are enough to be shared out evenly
constexpr int64_t kAheadBytes = 2560;     // fetched into the cache so long before their use
constexpr int64_t kFewRows = 4;           // below, signs are cheaper than an excess
constexpr int64_t kBlock = 64;            // of the Hadamard matrix; a smaller one where none fits

void turn(float* x, int64_t block) {
  for (int64_t half = 1; half < block; half *= 2)
    for (int64_t i = 0; i < block; i += 2 * half)
      for (int64_t j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b, x[j + half] = a - b;
      }
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  for (int64_t j = 0; j < block; ++j) x[j] *= norm;
}

// The same for a block of 64: four vectors, within each and then between them.
inline void turn64(float* x) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512 v[4];
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_loadu_ps(x + 16 * i);
    for (int half = 1; half < 16; half *= 2) {
      const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(half));
      const __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(half)), v[i]);
      v[i] = _mm512_mask_sub_ps(_mm512_add_ps(other, v[i]), upper, other, v[i]);
    }
  }
  const __m512 a = _mm512_add_ps(v[0], v[1]), b = _mm512_sub_ps(v[0], v[1]);
  const __m512 c = _mm512_add_ps(v[2], v[3]), d = _mm512_sub_ps(v[2], v[3]);
  const __m512 norm = _mm512_set1_ps(0.125f);
  _mm512_storeu_ps(x, _mm512_mul_ps(norm, _mm512_add_ps(a, c)));
  _mm512_storeu_ps(x + 16, _mm512_mul_ps(norm, _mm512_add_ps(b, d)));
  _mm512_storeu_ps(x + 32, _mm512_mul_ps(norm, _mm512_sub_ps(a, c)));
  _mm512_storeu_ps(x + 48, _mm512_mul_ps(norm, _mm512_sub_ps(b, d)));
}

// x[0, size) to bytes in q[0, padded): magnitudes, with a bit in `negative` where x is below zero,
// or where that is null offsets from 128. Returns the scale. Overwrites x.
float rounded(float* x, int64_t size, int64_t padded, uint8_t* q, uint64_t* negative) {
  const int64_t block = std::min(kBlock, size & -size);
  for (int64_t at = 0; at < size; at += block) block == kBlock ? turn64(x + at) : turn(x + at, block);
  __m512 most = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t k = 0; k < size; k += 16) {
    const __m512 part = _mm512_abs_ps(_mm512_maskz_loadu_ps(first(size - k), x + k));
    nan |= _mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, part);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const bool finite = !nan && std::isfinite(largest);
  // A row that is not finite has a scale that is not a number, and so have all its products.
  const __m512 inverse = _mm512_set1_ps(finite && largest > 0.0f ? 127.0f / largest : 0.0f);
  for (int64_t k = 0; k < padded; k += 16) {
    const __m512 part = _mm512_maskz_loadu_ps(first(std::max<int64_t>(0, size - k)), x + k);
    __m512i value = _mm512_cvtps_epi32(finite ? _mm512_mul_ps(part, inverse) : _mm512_setzero_ps());
    if (negative) {
      const uint64_t below = _mm512_movepi32_mask(value);
      negative[k / 64] = (k % 64 ? negative[k / 64] : 0) | below << k % 64;
      value = _mm512_abs_epi32(value);
    } else {
      value = _mm512_add_epi32(value, _mm512_set1_epi32(128));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtepi32_epi8(value));
  }
  return finite ? largest / 127.0f : NAN;
}

// One row of x as the product takes it, size floats, to `row`.
void prepare(Before before, const float* x, int64_t size, Floats weight, float eps, float* row) {
  if (before == kNothing) {
    std::copy(x, x + size, row);
    return;
  }
  const __m512 inverse = _mm512_set1_ps(before == kNorm ? inverse_rms(x, size, eps) : 0.0f);
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 live = first(size - i);
    const __m512 part = _mm512_maskz_loadu_ps(live, x + i);
    __m512 y;
    if (before == kNorm) {
      y = _mm512_mul_ps(_mm512_mul_ps(part, inverse), weight.at(i, live));
    } else {
      // gelu(x) = x / (1 + exp(-2 u)), u = sqrt(2/pi) (x + 0.044715 x^3); silu has u = x / 2
      __m512 u2 = part;
      if (before == kGatedGelu) {
        const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(part, part), part);
        u2 = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, part);
        u2 = _mm512_mul_ps(_mm512_set1_ps(2 * 0.7978845608f), u2);
      }
      const __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), u2)));
      y = _mm512_mul_ps(_mm512_div_ps(part, below), _mm512_maskz_loadu_ps(live, x + size + i));
    }
    _mm512_mask_storeu_ps(row + i, live, y);
  }
}

// Sums of sixteen vectors' lanes, as one vector: a transposition by halves.
inline __m512i sums(__m512i* a) {
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]),
                            _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 4; ++i)
    a[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]),
                            _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
  // a[i] holds, in each quarter, parts of outputs 4i .. 4i+3.
  const __m512i b0 = _mm512_add_epi32(_mm512_shuffle_i32x4(a[0], a[1], 0x88),
                                      _mm512_shuffle_i32x4(a[0], a[1], 0xdd));
  const __m512i b1 = _mm512_add_epi32(_mm512_shuffle_i32x4(a[2], a[3], 0x88),
                                      _mm512_shuffle_i32x4(a[2], a[3], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(b0, b1, 0x88), _mm512_shuffle_i32x4(b0, b1, 0xdd));
}

struct Product {
  std::vector<uint8_t> q;          // [rows, padded]
  std::vector<uint64_t> negative;  // [rows, padded / 64], or empty; see `rounded`
  std::vector<float> row_scale;    // [rows]
  const int8_t* weight;            // [outputs, size]
  const float* scale;              // [outputs]
  int64_t rows, outputs, size, padded;

  const uint8_t* row(int64_t m) const { return q.data() + m * padded; }
};

// The instruction multiplies bytes without a sign by bytes with one. So either signs go over from
// the row to the weights, or the row is 128 too large and what that adds is taken off again.

// Sums over k for sixteen outputs from `n`, of row `m` by its signs or, without one, of 128. One
// output after the other, as they lie in memory, which so is read at twice the rate of sixteen at
// once. Outputs from `count` on repeat the last.
template <bool is_row>
inline __m512i streamed(const Product& p, int64_t m, int64_t n, int64_t count) {
  __m512i acc[16];
  for (int c = 0; c < 16; ++c) {
    const int8_t* w = p.weight + (n + std::min<int64_t>(c, count - 1)) * p.size;
    acc[c] = _mm512_setzero_si512();
    for (int64_t k = 0; k < p.size; k += 64) {
      const __mmask64 in = p.size - k < 64 ? ~0ull >> (64 - (p.size - k)) : ~0ull;
      __m512i x = _mm512_set1_epi8(-128), part = _mm512_maskz_loadu_epi8(in, w + k);
      _mm_prefetch(reinterpret_cast<const char*>(w + k + kAheadBytes), _MM_HINT_T0);
      if (is_row) {
        x = _mm512_loadu_si512(p.row(m) + k);
        const __mmask64 negative = p.negative[(m * p.padded + k) / 64];
        part = _mm512_mask_sub_epi8(part, negative, _mm512_setzero_si512(), part);
      }
      acc[c] = _mm512_dpbusd_epi32(acc[c], x, part);
    }
  }
  return sums(acc);
}

// R rows times C outputs, R * C = 16, by row and output: weights that lie in the cache, each vector
// of them used R times and each of the rows' C times.
template <int R, int C>
inline __m512i tile(const Product& p, int64_t m, int64_t n, int64_t count) {
  __m512i acc[16];
  const int8_t* rows[C];
  for (int c = 0; c < C; ++c) rows[c] = p.weight + (n + std::min<int64_t>(c, count - 1)) * p.size;
  for (int j = 0; j < 16; ++j) acc[j] = _mm512_setzero_si512();
  const auto step = [&](int64_t k, const auto& load) {
    __m512i x[R];
    for (int r = 0; r < R; ++r) x[r] = _mm512_loadu_si512(p.row(m + r) + k);
    for (int c = 0; c < C; ++c) {
      const __m512i part = load(rows[c] + k);
      for (int r = 0; r < R; ++r) acc[r * C + c] = _mm512_dpbusd_epi32(acc[r * C + c], x[r], part);
    }
  };
  const int64_t whole = p.size / 64 * 64;
  for (int64_t k = 0; k < whole; k += 64) step(k, [](const int8_t* w) { return _mm512_loadu_si512(w); });
  if (whole < p.size)
    step(whole, [&](const int8_t* w) {
      return _mm512_maskz_loadu_epi8(~0ull >> (64 - p.size % 64), w);
    });
  return sums(acc);
}

// Sixteen outputs from `n` of all rows: their weights stay in the first-level cache meanwhile.
// one(row, output, mask, values) gets one row's, four(row, output, values) four rows' by four.
template <class One, class Four>
inline void sixteen(const Product& p, int64_t n, const One& one, const Four& four) {
  const int64_t count = std::min<int64_t>(16, p.outputs - n);
  const __m512 scale = _mm512_maskz_loadu_ps(first(count), p.scale + n);
  const auto scaled = [&](int64_t m, __m512i sum) {
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(p.row_scale[m])), scale);
  };
  if (!p.negative.empty()) {
    for (int64_t m = 0; m < p.rows; ++m)
      one(m, n, first(count), scaled(m, streamed<true>(p, m, n, count)));
    return;
  }
  const __m512i excess = streamed<false>(p, 0, n, count);
  int64_t m = 0;
  for (; count == 16 && m + 4 <= p.rows; m += 4) {
    const __m512 by_row = _mm512_permutexvar_ps(
        _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0),
        _mm512_castps128_ps512(_mm_loadu_ps(p.row_scale.data() + m)));
    for (int c = 0; c < 16; c += 4) {
      const __m512i quarter = _mm512_set_epi32(3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0);
      const __m512i at = _mm512_add_epi32(quarter, _mm512_set1_epi32(c));
      const __m512i sum = _mm512_sub_epi32(tile<4, 4>(p, m, n + c, 4),
                                           _mm512_permutexvar_epi32(at, excess));
      four(m, n + c,
           _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), by_row), _mm512_permutexvar_ps(at, scale)));
    }
  }
  for (; m < p.rows; ++m)
    one(m, n, first(count), scaled(m, _mm512_sub_epi32(tile<1, 16>(p, m, n, count), excess)));
}

// Rows of x rounded, all that the product needs. `prepared` writes one row's floats.
template <class Prepared>
Product product(int64_t rows, const ffi::Buffer& matrix, const ffi::Buffer& scale,
                const Prepared& prepared) {
  Product p;
  p.rows = rows, p.outputs = matrix.dims[0], p.size = matrix.dims[1];
  p.padded = (p.size + 63) / 64 * 64;
  p.weight = matrix.as<const int8_t>(), p.scale = scale.as<const float>();
  p.q.resize(rows * p.padded), p.row_scale.resize(rows);
  if (rows < kFewRows) p.negative.resize(rows * p.padded / 64);
  const int64_t stripe = std::max<int64_t>(1, 4096 / p.size);
  team().each((rows + stripe - 1) / stripe, [&](int64_t i) {
    std::vector<float> row(p.padded);
    for (int64_t m = i * stripe; m < std::min(rows, (i + 1) * stripe); ++m) {
      prepared(m, row.data());
      uint64_t* negative = p.negative.empty() ? nullptr : p.negative.data() + m * p.padded / 64;
      p.row_scale[m] = rounded(row.data(), p.size, p.padded, p.q.data() + m * p.padded, negative);
    }
  });
  return p;
}

// Of sixteen outputs each, in one task.
int64_t tiles_per_task(const Product& p) {
  const int64_t bytes = std::clamp(p.outputs * p.size / kTasks, kTaskBytes, kMostBytes);
  return std::max<int64_t>(1, bytes / (16 * p.size));
}

template <class One, class Four>
void multiply(const Product& p, const One& one, const Four& four) {
  const int64_t tiles = (p.outputs + 15) / 16;
  const int64_t per_task = tiles_per_task(p);
  team().each((tiles + per_task - 1) / per_task, [&](int64_t i) {
    for (int64_t t = i * per_task; t < std::min(tiles, (i + 1) * per_task); ++t)
      sixteen(p, 16 * t, one, four);
  });
}

// The product to out [rows, outputs], with `residual` added where there is one.
void store(const Product& p, float* out, const float* residual) {
  multiply(
      p,
      [&](int64_t m, int64_t n, __mmask16 live, __m512 values) {
        const int64_t at = m * p.outputs + n;
        if (residual) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(live, residual + at));
        _mm512_mask_storeu_ps(out + at, live, values);
      },
      [&](int64_t m, int64_t n, __m512 values) {
        const __m128 quarters[] = {
            _mm512_extractf32x4_ps(values, 0), _mm512_extractf32x4_ps(values, 1),
            _mm512_extractf32x4_ps(values, 2), _mm512_extractf32x4_ps(values, 3)};
        for (int r = 0; r < 4; ++r) {
          const int64_t at = (m + r) * p.outputs + n;
          _mm_storeu_ps(out + at, residual ? _mm_add_ps(quarters[r], _mm_loadu_ps(residual + at)) : quarters[r]);
        }
      });
}

Floats floats(const ffi::Buffer& buffer) {
  return {buffer.data, buffer.dtype == ffi::kBFloat16};
}

// Of arguments that begin with live, x, weight and scale, and nothing before it.
Product plain_product(ffi::Buffer** args) {
  const int64_t all = args[1]->dims[0], size = args[1]->dims[1];
  const int64_t rows = std::clamp<int64_t>(*args[0]->as<int32_t>(), 0, all);
  const float* x = args[1]->as<float>();
  return product(rows, *args[2], *args[3], [&](int64_t m, float* row) {
    prepare(kNothing, x + m * size, size, {}, 0.0f, row);
  });
}

}  // namespace

extern "C" {

int fastserve_cpu_runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// live [1] s32, x [rows, size or 2 size] f32, weight [outputs, size] s8, scale [outputs] f32,
// before [size] and after [outputs] of f32 or bf16, residual [rows, outputs] f32 -> [rows, outputs]
// f32, of which rows from `live` on are zero. What an attribute does not ask for may be empty.
// Shapes and types are the caller's to get right; there are no errors.
void* fastserve_int8_matmul(ffi::CallFrame* frame) {
  if (!frame->runs()) return nullptr;
  ffi::Buffer** args = frame->args.buffers;
  const auto before = static_cast<Before>(frame->attribute<int32_t>("before"));
  const auto after = static_cast<After>(frame->attribute<int32_t>("after"));
  const float eps = frame->attribute<float>("eps");
  const int64_t all = args[1]->dims[0], width = args[1]->dims[1], size = args[2]->dims[1];
  const int64_t rows = std::clamp<int64_t>(*args[0]->as<int32_t>(), 0, all);
  const float *x = args[1]->as<float>(), *residual = args[6]->as<float>();
  const Product p = product(rows, *args[2], *args[3], [&](int64_t m, float* row) {
    prepare(before, x + m * width, size, floats(*args[4]), eps, row);
  });
  float* out = frame->rets.buffers[0]->as<float>();
  store(p, out, after == kAdd ? residual : nullptr);
  if (after == kNormAdd) {
    const Floats weight = floats(*args[5]);
    const int64_t stripe = std::max<int64_t>(1, 8192 / p.outputs);
    team().each((rows + stripe - 1) / stripe, [&](int64_t i) {
      for (int64_t m = i * stripe; m < std::min(rows, (i + 1) * stripe); ++m) {
        float* row = out + m * p.outputs;
        const __m512 inverse = _mm512_set1_ps(inverse_rms(row, p.outputs, eps));
        for (int64_t n = 0; n < p.outputs; n += 16) {
          const __mmask16 live = first(p.outputs - n);
          const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(live, row + n), inverse);
          const __m512 old = _mm512_maskz_loadu_ps(live, residual + m * p.outputs + n);
          _mm512_mask_storeu_ps(row + n, live, _mm512_add_ps(old, _mm512_mul_ps(y, weight.at(n, live))));
        }
      }
    });
  }
  std::fill(out + rows * p.outputs, out + all * p.outputs, 0.0f);
  return nullptr;
}

// live [1] s32, x [rows, size] f32, weight [outputs, size] s8, scale [outputs] f32 -> of each row
// the largest output [rows] f32, not a number where one is not, and the first that has it [rows] s32.
void* fastserve_int8_best(ffi::CallFrame* frame) {
  if (!frame->runs()) return nullptr;
  ffi::Buffer** args = frame->args.buffers;
  const Product p = plain_product(args);
  const int64_t all = args[1]->dims[0], rows = p.rows;
  float* value = frame->rets.buffers[0]->as<float>();
  int32_t* index = frame->rets.buffers[1]->as<int32_t>();
  std::fill(value, value + all, 0.0f), std::fill(index, index + all, 0);
  struct Best {
    float value = -INFINITY;
    int32_t index = 0;
  };
  // By task, so that the first of equals is found whoever runs what.
  const int64_t tiles = (p.outputs + 15) / 16;
  const int64_t per_task = tiles_per_task(p);
  const int64_t tasks = (tiles + per_task - 1) / per_task;
  std::vector<Best> bests(tasks * rows);
  team().each(tasks, [&](int64_t i) {
    Best* own = bests.data() + i * rows;
    const auto take = [&](int64_t m, int64_t n, __mmask16 live, __m512 values) {
      const float most = _mm512_mask_reduce_max_ps(live, values);
      if (!(most > own[m].value)) return;
      const __mmask16 has_it = _mm512_mask_cmp_ps_mask(live, values, _mm512_set1_ps(most), _CMP_EQ_OQ);
      own[m] = {most, static_cast<int32_t>(n + __builtin_ctz(has_it))};
    };
    const auto take_four = [&](int64_t m, int64_t n, __m512 values) {
      alignas(64) float lanes[16];
      _mm512_store_ps(lanes, values);
      for (int j = 0; j < 16; ++j)
        if (lanes[j] > own[m + j / 4].value) own[m + j / 4] = {lanes[j], static_cast<int32_t>(n + j % 4)};
    };
    for (int64_t t = i * per_task; t < std::min(tiles, (i + 1) * per_task); ++t)
      sixteen(p, 16 * t, take, take_four);
  });
  for (int64_t m = 0; m < rows; ++m) {
    Best best;
    for (int64_t i = 0; i < tasks; ++i)
      if (bests[i * rows + m].value > best.value) best = bests[i * rows + m];
    value[m] = std::isnan(p.row_scale[m]) ? NAN : best.value;
    index[m] = best.index;
  }
  return nullptr;
}

// live [1] s32, x [rows, size] f32, weight [outputs, size] s8, scale [outputs] f32, and the rules
// of fastserve_draw -> what that makes of the product. Logits of a vocabulary are large: here they
// lie in memory that is kept, where the system need not clear pages for each step.
void* fastserve_int8_draw(ffi::CallFrame* frame) {
  if (!frame->runs()) return nullptr;
  static std::mutex mutex;
  static std::unique_ptr<float[]> logits;
  static int64_t room = 0;
  ffi::Buffer** args = frame->args.buffers;
  const Product p = plain_product(args);
  const int64_t all = args[1]->dims[0], rows = p.rows;
  float* best = frame->rets.buffers[0]->as<float>();
  int32_t* tokens = frame->rets.buffers[1]->as<int32_t>();
  std::fill(best + rows, best + all, 0.0f), std::fill(tokens + rows, tokens + all, 0);
  std::lock_guard<std::mutex> lock(mutex);
  if (rows * p.outputs > room) {
    room = rows * p.outputs;
    logits.reset();
    logits.reset(new float[room]);
  }
  store(p, logits.get(), nullptr);
  draw(logits.get(), rows, p.outputs, Rules(args + 4), best, tokens);
  return nullptr;
}

}  // extern "C"
