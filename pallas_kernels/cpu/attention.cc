// Attention of new tokens over paged keys and values for x86 with AVX-512, as XLA calls it (see
// attention.py): norms and rotation of queries and keys, the new keys' and values' way into their
// pages, and the attention itself are one call. Pages are bfloat16, sums float32. Softmax is
// accumulated over blocks of the sequence, at multiples of kBlock from its beginning, so a token's
// result does not depend on what stands beside it (Milakov and Gimelshein, 2018).

#include <algorithm>
#include <cmath>
#include <vector>

#include "ffi.h"
#include "team.h"
#include "vector.h"

namespace {

constexpr int64_t kBlock = 64;  // positions
constexpr int kMostRows = 8;    // queries times heads that walk the pages together
constexpr float kFar = -1e30f;  // below any score; finite, so that no inf - inf arises

struct Shape {
  int64_t tokens, rows, heads, kv_heads, dim, num_pages, page_size, table_width;
  float scale, eps;
  int64_t window;

  int64_t group() const { return heads / kv_heads; }
  int64_t page_elements() const { return 2 * kv_heads * page_size * dim; }
};

struct Pages {
  const Shape& shape;
  uint16_t* data;

  uint16_t* at(int64_t page, int kind, int64_t head, int64_t offset) const {
    return data + page * shape.page_elements() +
           ((head * shape.page_size + offset) * 2 + kind) * shape.dim;
  }
};

struct Batch {
  const int32_t *kv_lens, *table, *cu_q_lens, *distribution;
};

// One head of one token: norm and rotation where they are wanted, in place.
void turned(float* x, const Shape& shape, Floats norm, const float* cos, const float* sin) {
  if (norm.data) {
    const __m512 inverse = _mm512_set1_ps(inverse_rms(x, shape.dim, shape.eps));
    for (int64_t i = 0; i < shape.dim; i += 16)
      _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse),
                                            norm.at(i, 0xffff)));
  }
  if (!cos) return;
  const int64_t half = shape.dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float left = x[i], right = x[half + i];
    x[i] = left * cos[i] - right * sin[i];
    x[half + i] = right * cos[i] + left * sin[i];
  }
}

void narrow(const float* x, int64_t size, uint16_t* out) {
  for (int64_t i = 0; i < size; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), narrowed(_mm512_loadu_ps(x + i)));
}

// Sums of the lanes of sixteen vectors, as one vector.
inline __m512 sums(const __m512* v) {
  __m512 a[8], b[4];
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                         _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i)
    b[i] = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]))));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88),
                                 _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88),
                                 _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

// scores[m][p] of M queries with `count` keys, P at a time.
template <int M>
void score(const float* const* q, const uint16_t* const* keys, int64_t count, int64_t dim, float scale,
           float (*scores)[kBlock]) {
  constexpr int P = M == 1 ? 16 : M == 2 ? 8 : M <= 4 ? 4 : 2;
  for (int64_t p = 0; p < count; p += P) {
    __m512 acc[16];
    for (int j = 0; j < 16; ++j) acc[j] = _mm512_setzero_ps();
    for (int64_t i = 0; i < dim; i += 16) {
      __m512 key[P];
      for (int j = 0; j < P; ++j) key[j] = widened(keys[p + j] + i);
      for (int m = 0; m < M; ++m) {
        const __m512 part = _mm512_loadu_ps(q[m] + i);
        for (int j = 0; j < P; ++j) acc[m * P + j] = _mm512_fmadd_ps(part, key[j], acc[m * P + j]);
      }
    }
    alignas(64) float all[16];
    _mm512_store_ps(all, _mm512_mul_ps(sums(acc), _mm512_set1_ps(scale)));
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < P; ++j) scores[m][p + j] = all[m * P + j];
  }
}

// out[m] += sum over p of weights[m][p] * values[p], W vectors of `dim` at a time.
template <int M, int W>
void gather(const float (*weights)[kBlock], const uint16_t* const* values, int64_t low, int64_t high,
            int64_t i, float* const* out) {
  __m512 acc[M][W];
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < W; ++w) acc[m][w] = _mm512_loadu_ps(out[m] + i + 16 * w);
  for (int64_t p = low; p < high; ++p) {
    __m512 value[W];
    for (int w = 0; w < W; ++w) value[w] = widened(values[p] + i + 16 * w);
    for (int m = 0; m < M; ++m) {
      const __m512 weight = _mm512_set1_ps(weights[m][p]);
      for (int w = 0; w < W; ++w) acc[m][w] = _mm512_fmadd_ps(weight, value[w], acc[m][w]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < W; ++w) _mm512_storeu_ps(out[m] + i + 16 * w, acc[m][w]);
}

inline void fetch(const uint16_t* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 32) _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T1);
}

// M queries, each of one head at one position, all of one key head in one sequence.
template <int M>
void attend(const Shape& shape, const Pages& pages, const int32_t* table, int64_t head,
            const int64_t* positions, const float* const* q, float* const* out) {
  float best[M], total[M];
  for (int m = 0; m < M; ++m) {
    best[m] = kFar, total[m] = 0.0f;
    std::fill(out[m], out[m] + shape.dim, 0.0f);
  }
  const int64_t last = positions[M - 1];  // they ascend
  const int64_t from = shape.window ? std::max<int64_t>(0, positions[0] - shape.window + 1) : 0;
  for (int64_t start = from / kBlock * kBlock; start <= last; start += kBlock) {
    const int64_t count = std::min(kBlock, last + 1 - start);
    const int64_t low = std::max<int64_t>(0, from - start);
    const uint16_t *keys[kBlock], *values[kBlock];
    alignas(64) float scores[M][kBlock];
    for (int64_t p = 0; p < kBlock; ++p) {  // those beyond repeat the last, and are not seen
      const int64_t at = start + std::clamp(p, low, count - 1);
      const int64_t page = table[at / shape.page_size], offset = at % shape.page_size;
      keys[p] = pages.at(page, 0, head, offset), values[p] = pages.at(page, 1, head, offset);
      // Values are wanted after all keys, and the next block's keys after them.
      const int64_t next = at + kBlock;
      if (p >= low && p < count) fetch(values[p], shape.dim);
      if (next <= last)
        fetch(pages.at(table[next / shape.page_size], 0, head, next % shape.page_size), shape.dim);
    }
    score<M>(q, keys, count, shape.dim, shape.scale, scores);
    for (int m = 0; m < M; ++m) {
      const int64_t end = positions[m] + 1 - start;
      const int64_t begin = shape.window ? std::max(low, end - shape.window) : low;
      __m512 most = _mm512_set1_ps(best[m]), sum = _mm512_setzero_ps();
      __mmask16 seen[kBlock / 16];
      for (int64_t v = 0; v < kBlock / 16; ++v) {
        seen[v] = first(std::clamp<int64_t>(end - 16 * v, 0, 16)) &
                  ~first(std::clamp<int64_t>(begin - 16 * v, 0, 16));
        most = _mm512_mask_max_ps(most, seen[v], most, _mm512_load_ps(scores[m] + 16 * v));
      }
      const float higher = _mm512_reduce_max_ps(most);
      for (int64_t v = 0; v < kBlock / 16; ++v) {
        const __m512 above = _mm512_sub_ps(_mm512_load_ps(scores[m] + 16 * v), _mm512_set1_ps(higher));
        const __m512 weight = _mm512_maskz_mov_ps(seen[v], exponential(above));
        _mm512_store_ps(scores[m] + 16 * v, weight);
        sum = _mm512_add_ps(sum, weight);
      }
      const float fade = std::exp(best[m] - higher);
      total[m] = total[m] * fade + _mm512_reduce_add_ps(sum);
      best[m] = higher;
      if (fade != 1.0f)
        for (int64_t i = 0; i < shape.dim; i += 16)
          _mm512_storeu_ps(out[m] + i,
                           _mm512_mul_ps(_mm512_loadu_ps(out[m] + i), _mm512_set1_ps(fade)));
    }
    int64_t i = 0;
    for (; i + 32 <= shape.dim; i += 32) gather<M, 2>(scores, values, low, count, i, out);
    for (; i < shape.dim; i += 16) gather<M, 1>(scores, values, low, count, i, out);
  }
  for (int m = 0; m < M; ++m) {
    const __m512 share = _mm512_set1_ps(1.0f / total[m]);
    for (int64_t i = 0; i < shape.dim; i += 16)
      _mm512_storeu_ps(out[m] + i, _mm512_mul_ps(_mm512_loadu_ps(out[m] + i), share));
  }
}

using Attend = void (*)(const Shape&, const Pages&, const int32_t*, int64_t, const int64_t*,
                        const float* const*, float* const*);
constexpr Attend kAttend[kMostRows] = {attend<1>, attend<2>, attend<3>, attend<4>,
                                       attend<5>, attend<6>, attend<7>, attend<8>};

struct Task {
  int64_t row, head, token, queries;  // from `token` on
};

}  // namespace

extern "C" {

// qkv [tokens, heads + 2 kv_heads, dim] f32, kv_pages [pages, kv_heads, page_size, 2 dim] bf16,
// kv_lens [rows], table [rows, width], cu_q_lens [rows + 1], distribution [2] s32, cos and sin
// [tokens, 1, dim / 2] f32, q_norm and k_norm [dim] f32 or bf16 -> [tokens, heads * dim] f32, zeros
// behind the last row's tokens, and the pages, the same memory. cos, sin and norms may be empty;
// `dim` is a multiple of 16. Page numbers are the caller's to get right; there are no errors.
void* fastserve_attention(ffi::CallFrame* frame) {
  if (!frame->runs()) return nullptr;
  ffi::Buffer** args = frame->args.buffers;
  Shape shape;
  shape.tokens = args[0]->dims[0], shape.dim = args[0]->dims[2];
  shape.num_pages = args[1]->dims[0], shape.kv_heads = args[1]->dims[1];
  shape.page_size = args[1]->dims[2], shape.heads = args[0]->dims[1] - 2 * shape.kv_heads;
  shape.rows = args[2]->size(), shape.table_width = args[3]->dims[1];
  shape.scale = frame->attribute<float>("scale"), shape.eps = frame->attribute<float>("eps");
  shape.window = frame->attribute<int32_t>("window");
  const Batch batch{args[2]->as<int32_t>(), args[3]->as<int32_t>(), args[4]->as<int32_t>(),
                    args[5]->as<int32_t>()};
  const bool rotates = args[6]->size() > 0;
  const float *cos = args[6]->as<float>(), *sin = args[7]->as<float>();
  const auto norm = [&](int i) {
    return Floats{args[i]->size() ? args[i]->data : nullptr, args[i]->dtype == ffi::kBFloat16};
  };
  const Floats q_norm = norm(8), k_norm = norm(9);
  float* out = frame->rets.buffers[0]->as<float>();
  const Pages pages{shape, frame->rets.buffers[1]->as<uint16_t>()};
  if (pages.data != args[1]->data)
    std::copy_n(args[1]->as<uint16_t>(), shape.num_pages * shape.page_elements(), pages.data);

  const int64_t live_rows = batch.distribution[1], live = batch.cu_q_lens[live_rows];
  std::vector<int64_t> row_of(live);
  for (int64_t row = 0; row < live_rows; ++row)
    std::fill(row_of.begin() + batch.cu_q_lens[row], row_of.begin() + batch.cu_q_lens[row + 1], row);
  const auto position = [&](int64_t row, int64_t token) {
    return batch.kv_lens[row] - batch.cu_q_lens[row + 1] + token;
  };

  static thread_local std::vector<float> kept;  // the queries; grown, not made anew
  if (static_cast<int64_t>(kept.size()) < live * shape.heads * shape.dim)
    kept.resize(live * shape.heads * shape.dim);
  float* queries = kept.data();
  const int64_t width = (shape.heads + 2 * shape.kv_heads) * shape.dim, half = shape.dim / 2;
  constexpr int64_t kStripe = 4;
  team().each((live + kStripe - 1) / kStripe, [&](int64_t i) {
    std::vector<float> key(shape.dim);
    for (int64_t token = i * kStripe; token < std::min(live, (i + 1) * kStripe); ++token) {
      const int64_t row = row_of[token], at = position(row, token);
      const int64_t page = batch.table[row * shape.table_width + at / shape.page_size];
      const float *x = args[0]->as<float>() + token * width;
      const float *c = rotates ? cos + token * half : nullptr, *s = sin + token * half;
      for (int64_t head = 0; head < shape.heads; ++head, x += shape.dim) {
        float* q = queries + (token * shape.heads + head) * shape.dim;
        std::copy_n(x, shape.dim, q);
        turned(q, shape, q_norm, c, s);
      }
      for (int64_t head = 0; head < shape.kv_heads; ++head, x += shape.dim) {
        std::copy_n(x, shape.dim, key.data());
        turned(key.data(), shape, k_norm, c, s);
        narrow(key.data(), shape.dim, pages.at(page, 0, head, at % shape.page_size));
        narrow(x + shape.kv_heads * shape.dim, shape.dim, pages.at(page, 1, head, at % shape.page_size));
      }
    }
  });

  const int64_t per_task = std::max<int64_t>(1, kMostRows / shape.group());
  std::vector<Task> tasks;
  for (int64_t row = 0; row < live_rows; ++row)
    for (int64_t token = batch.cu_q_lens[row]; token < batch.cu_q_lens[row + 1]; token += per_task)
      for (int64_t head = 0; head < shape.kv_heads; ++head)
        tasks.push_back({row, head, token, std::min(per_task, batch.cu_q_lens[row + 1] - token)});
  // The longest first, or the last one is waited for.
  team().each(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[tasks.size() - 1 - i];
    const int32_t* table = batch.table + task.row * shape.table_width;
    const int64_t group = shape.group(), all = task.queries * group;
    for (int64_t from = 0; from < all; from += kMostRows) {
      const int64_t count = std::min<int64_t>(kMostRows, all - from);
      int64_t positions[kMostRows];
      const float* q[kMostRows];
      float* mixed[kMostRows];
      for (int64_t m = 0; m < count; ++m) {
        const int64_t token = task.token + (from + m) / group;
        const int64_t head = task.head * group + (from + m) % group;
        positions[m] = position(task.row, token);
        q[m] = queries + (token * shape.heads + head) * shape.dim;
        mixed[m] = out + (token * shape.heads + head) * shape.dim;
      }
      kAttend[count - 1](shape, pages, table, task.head, positions, q, mixed);
    }
  });
  std::fill(out + live * shape.heads * shape.dim, out + shape.tokens * shape.heads * shape.dim, 0.0f);
  return nullptr;
}

}  // extern "C"
