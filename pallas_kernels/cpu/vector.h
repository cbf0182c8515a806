// Sixteen floats at a time: what both kernels need of AVX-512. Every file here is compiled
// for it (see pyproject.toml), and nothing runs before `fastserve_cpu_runs` has been asked.
#pragma once

#include <immintrin.h>

#include <cstdint>

// e^x to two units in the last place; NaN for NaN (Cephes' reduction and polynomial).
inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88.7f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 widened(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512 widened(const uint16_t* bfloat16) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bfloat16)));
}

// To the nearest bfloat16, ties to even, NaN kept.
inline __m256i narrowed(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1);
}

// A parameter vector of either type.
struct Floats {
  const void* data;
  bool narrow;

  __m512 at(int64_t i, __mmask16 live) const {
    if (narrow) return widened(_mm256_maskz_loadu_epi16(live, static_cast<const uint16_t*>(data) + i));
    return _mm512_maskz_loadu_ps(live, static_cast<const float*>(data) + i);
  }
};

// 1 / sqrt(mean of squares + eps) of x[0, size).
inline float inverse_rms(const float* x, int64_t size, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += 16) {
    const __m512 part = _mm512_maskz_loadu_ps(first(size - i), x + i);
    squares = _mm512_fmadd_ps(part, part, squares);
  }
  return 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / static_cast<float>(size) + eps);
}
