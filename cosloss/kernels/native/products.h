// Blocks of a matrix product, in as many vector registers as there are.
//
// A word is what one lane multiplies: a float, or two bfloat16 of which it adds both products. The
// sums are float32. What belongs to one element of the result is added in the order of the depth.

#pragma once

#include <cstdint>

#include "vector.h"

constexpr int64_t PANEL = 32;   // columns that are packed together
constexpr int64_t DEPTH = 512;  // words along the sum that are gone over at once
// columns and rows of a block: as many as there are registers for
constexpr int WIDTH = 2 * LANES, STRIP = LANES == 16 ? 8 : 6;

struct Pair {
  uint32_t bits;
};

inline Vector load(const Pair* from) { return load(reinterpret_cast<const float*>(from)); }

inline void multiply_add(Vector& sum, float a, Vector b) { sum += a * b; }

#ifdef __AVX512BF16__
inline void multiply_add(Vector& sum, Pair a, Vector b) {
  sum = _mm512_dpbf16_ps(sum, __m512bh(_mm512_set1_epi32(a.bits)), __m512bh(b));
}
#endif

// out (ROWS, WIDTH) = A B, or added to it; A_ik = a[i row + k step], B_kj = b[k stride + j].
template <int ROWS, typename Word>
void block(const Word* a, int64_t row, int64_t step, const Word* b, int64_t stride, int64_t depth,
           bool add, float* out, int64_t out_stride) {
  Vector sum[ROWS][2] = {};
  for (int64_t k = 0; k < depth; k++, a += step, b += stride) {
    const Vector left = load(b), right = load(b + LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      multiply_add(sum[i][0], a[i * row], left);
      multiply_add(sum[i][1], a[i * row], right);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++) {
    for (int half = 0; half < 2; half++) {
      float* to = out + i * out_stride + half * LANES;
      // added at the end: a long sum is rounded once for a block, not at each of its terms
      store(add ? load(to) + sum[i][half] : sum[i][half], to);
    }
  }
}

// The same for any number of rows.
template <typename Word>
void strips(const Word* a, int64_t row, int64_t step, const Word* b, int64_t stride, int64_t rows,
            int64_t depth, bool add, float* out, int64_t out_stride) {
  int64_t i = 0;
#define STRIPS_OF(ROWS)               \
  for (; i + ROWS <= rows; i += ROWS) \
    block<ROWS>(a + i * row, row, step, b, stride, depth, add, out + i * out_stride, out_stride);
  STRIPS_OF(STRIP)
  STRIPS_OF(4)
  STRIPS_OF(2)
  STRIPS_OF(1)
#undef STRIPS_OF
}

// The same for any number of columns that WIDTH divides; b is `panel` words on for every PANEL.
template <typename Word>
void multiply(const Word* a, int64_t row, int64_t step, const Word* b, int64_t stride,
              int64_t panel, int64_t rows, int64_t columns, int64_t depth, bool add, float* out,
              int64_t out_stride) {
  for (int64_t k = 0; k < depth; k += DEPTH) {
    const int64_t words = depth - k < DEPTH ? depth - k : DEPTH;
    for (int64_t j = 0; j < columns; j += WIDTH) {
      const Word* from = b + j / PANEL * panel + j % PANEL + k * stride;
      strips(a + k * step, row, step, from, stride, rows, words, add || k > 0, out + j, out_stride);
    }
  }
}
