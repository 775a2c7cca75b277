// exp in float32, without a branch.

#pragma once

#include "vector.h"

// Below about -87.7 exp is 0 here, above 88.4 infinity; off by less than 2 units in the last place.
// NaN stays NaN.
//
// 2^n exp(r) with |r| <= log(2) / 2, whose exp is a polynomial. The bounds are where n is -127 and
// 128, and so 2^n, as the bits of n + 127 say it, 0 and infinity.
inline Vector exponential(Vector x) {
  constexpr float LOWEST = -88.1f, HIGHEST = 88.8f;
  constexpr float ROUND = 12582912.f + 127;  // 1.5 2^23: what is added to it becomes an integer
  const Vector bounded = smaller(splat(HIGHEST), larger(splat(LOWEST), x));
  const Vector shifted = bounded * 1.44269504f + ROUND;
  const Vector n = shifted - ROUND;
  const Vector r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  return p * Vector(Integers(shifted) << 23);
}
