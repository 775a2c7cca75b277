// Narrow floating-point numbers, and how they become wide ones and back.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

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
