// exp, and what the losses make of it, in float32: branchless, so that a loop over them is
// vectorised.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Beyond these, exp is 0 or infinity here.
constexpr float LOWEST_EXPONENT = -87.3f, HIGHEST_EXPONENT = 88.3f;

// 2^n exp(r) with |r| <= log(2) / 2, whose exp is a polynomial; off by less than 2 units in the
// last place. NaN stays NaN.
inline float exponential(float x) {
  constexpr float ROUND = 12582912.f;  // 1.5 2^23: what is added to it becomes an integer
  const bool none = x<LOWEST_EXPONENT, endless = x> HIGHEST_EXPONENT;
  const float bounded = none || endless ? 0.f : x;
  const float shifted = bounded * 1.44269504f + ROUND;
  const float n = shifted - ROUND;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  int32_t exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - 0x4b400000 + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return none ? 0.f : endless ? INFINITY : p * power;
}
