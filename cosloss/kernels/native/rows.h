// Shared by all kernels that go through rows: when to use threads, ranges, a thread's memory.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "simd.h"

constexpr int64_t PARALLEL_ELEMENTS = 1 << 13;  // fewer are not worth waking another thread
constexpr double SMALLEST_SQUARE = 1e-150, LARGEST_SQUARE = 1e150;

// Whether no square has left float64's range; those of narrower numbers cannot.
template <typename T>
bool in_range(double sum, const T* x, int64_t d) {
  if (!std::is_same_v<T, double>) return true;
  const bool zero = sum == 0 && std::all_of(x, x + d, [](T v) { return wide(v) == 0; });
  return zero || (sum >= SMALLEST_SQUARE && sum <= LARGEST_SQUARE);
}

constexpr std::size_t CACHE_LINE = 64;

// Uninitialised numbers, the thread's own until it asks for the same use again.
template <typename Use, typename Number>
Number* thread_memory(std::size_t numbers) {
  struct Free {
    void operator()(void* at) const { ::operator delete(at, std::align_val_t(CACHE_LINE)); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local std::size_t size = 0;
  const std::size_t bytes = numbers * sizeof(Number);
  if (size < bytes) {
    size = 0;
    memory.reset();  // the old memory goes before the new comes
    memory.reset(::operator new(bytes, std::align_val_t(CACHE_LINE)));
    size = bytes;
  }
  return static_cast<Number*>(memory.get());
}
