// A vector register of float32, whose lanes are computed together; narrow numbers; exp.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __SSE__
#include <immintrin.h>
#endif

// The upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};

inline float single(float x) { return x; }

inline float single(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline double wide(double x) { return x; }
inline double wide(float x) { return x; }
inline double wide(bfloat16 x) { return single(x); }

template <typename T, typename From>
inline T narrow(From x) {
  return T(x);
}

template <>
inline bfloat16 narrow<bfloat16, float>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0)};
}

template <>
inline bfloat16 narrow<bfloat16, double>(double x) {
  return narrow<bfloat16>(float(x));
}

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// The next multiple of LANES.
inline int64_t round_up(int64_t numbers) { return (numbers + LANES - 1) / LANES * LANES; }

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers
    __attribute__((vector_size(4 * LANES)));  // and the masks that comparisons give

inline Vector broadcast(float x) { return x - Vector{}; }

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

// The larger number; b where one of them is NaN.
inline Vector maximum(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);  // GCC does not find it where a is constant
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vector minimum(Vector a, Vector b) {
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

// Fold COUNT lanes in half until one is left.
template <int COUNT, typename Fold>
__attribute__((always_inline)) inline float reduce(float* lanes, Fold fold) {
  if constexpr (COUNT > 1) {
    for (int k = 0; k < COUNT / 2; k++) lanes[k] = fold(lanes[k], lanes[k + COUNT / 2]);
    return reduce<COUNT / 2>(lanes, fold);
  }
  return lanes[0];
}

template <typename Fold>
__attribute__((always_inline)) inline float reduce(Vector v, Fold fold) {
  float lanes[LANES];
  store(v, lanes);
  return reduce<LANES>(lanes, fold);
}

inline float reduce_sum(Vector v) {
  return reduce(v, [](float a, float b) { return a + b; });
}

inline float reduce_max(Vector v) {
  return reduce(v, [](float a, float b) { return a > b ? a : b; });
}

// Below about -87.7 exp is 0 here, above 88.4 infinity; off by less than 2 units in the last place.
// NaN stays NaN.
//
// 2^n exp(r) with |r| <= log(2) / 2, whose exp is a polynomial. The bounds are where n is -127 and
// 128, and so 2^n, as the bits of n + 127 say it, 0 and infinity.
inline Vector exponential(Vector x) {
  constexpr float LOWEST = -88.1f, HIGHEST = 88.8f;
  constexpr float ROUND =
      12582912.f + 127;  // 1.5 2^23: a number added to it is rounded to an integer
  const Vector bounded = minimum(broadcast(HIGHEST), maximum(broadcast(LOWEST), x));
  const Vector shifted = bounded * 1.44269504f + ROUND;
  const Vector n = shifted - ROUND;
  const Vector r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  return p * Vector(Integers(shifted) << 23);
}
