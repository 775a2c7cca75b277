// A vector register of float32, whose lanes are computed together.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE__
#include <immintrin.h>
#endif

#include "numbers.h"

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// So many numbers, and those that fill up their last vector.
inline int64_t filled_up(int64_t numbers) { return (numbers + LANES - 1) / LANES * LANES; }

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));  // also what a comparison says

inline Vector splat(float x) { return x - Vector{}; }

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Integers load(const int32_t* from) {
  Integers v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(Vector v, float* to) { std::memcpy(to, &v, sizeof v); }

#ifdef __AVX512BF16__
inline Vector load(const bfloat16* from) {
  __m256i narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return Vector(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline void store(Vector v, bfloat16* to) {
  const __m256bh narrow = _mm512_cvtneps_pbh(__m512(v));
  std::memcpy(to, &narrow, sizeof narrow);
}
#endif

// The second where one of them is NaN.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);  // where one of them is constant, compilers do not find it
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vector smaller(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline Vector absolute(Vector x) { return Vector(Integers(x) & INT32_MAX); }

// So many lanes, folded in half until one is left.
template <int COUNT, typename Fold>
__attribute__((always_inline)) inline float folded(float* lanes, Fold fold) {
  if constexpr (COUNT > 1) {
    for (int k = 0; k < COUNT / 2; k++) lanes[k] = fold(lanes[k], lanes[k + COUNT / 2]);
    return folded<COUNT / 2>(lanes, fold);
  }
  return lanes[0];
}

template <typename Fold>
__attribute__((always_inline)) inline float folded(Vector v, Fold fold) {
  float lanes[LANES];
  store(v, lanes);
  return folded<LANES>(lanes, fold);
}

inline float sum(Vector v) {
  return folded(v, [](float a, float b) { return a + b; });
}

inline float largest(Vector v) {
  return folded(v, [](float a, float b) { return a > b ? a : b; });
}
