// What all kernels that go through rows ask of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "numbers.h"

constexpr int64_t PARALLEL_ELEMENTS = 1 << 13;  // fewer are not worth waking another thread
constexpr double SMALLEST_SQUARE = 1e-150, LARGEST_SQUARE = 1e150;

// Whether no square has left float64's range; those of narrower numbers cannot.
template <typename T>
bool in_range(double sum, const T* x, int64_t d) {
  if (!std::is_same_v<T, double>) return true;
  const bool zero = sum == 0 && std::all_of(x, x + d, [](T v) { return wide(v) == 0; });
  return zero || (sum >= SMALLEST_SQUARE && sum <= LARGEST_SQUARE);
}
