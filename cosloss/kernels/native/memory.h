// Memory that a thread keeps from call to call, so that its pages are mapped once.

#pragma once

#include <cstddef>
#include <memory>
#include <new>

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
