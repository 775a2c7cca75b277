// The work of pairwise cosine similarity beside its matrix products.
//
// All tensors are contiguous. A row's norm is unit_rows.cpp's: a row is clamped where it is at most
// eps.

#include <algorithm>
#include <cstdint>

#include "rows.h"

namespace {

constexpr int64_t SIDE = 16;  // the side of a square that is transposed at once
constexpr int64_t COLUMNS_AT_ONCE =
    64;  // columns that a thread goes down: some neighbouring cache lines

template <typename T>
void perfect_shuffle(const T* from, T* to) {
  constexpr int64_t half = SIDE * SIDE / 2;
  for (int64_t k = 0; k < half; k++) {
    to[2 * k] = from[k];
    to[2 * k + 1] = from[half + k];
  }
}

// transposed = x^T, for a tile x of a matrix whose rows are `size` apart. Four perfect shuffles of
// a 16 x 16 square make its columns its rows; compilers vectorise them, and not the plain loop.
template <typename T>
void transpose_tile(const T* x, int64_t size, int64_t rows, int64_t columns,
                    T transposed[SIDE][SIDE]) {
  T shuffled[SIDE * SIDE];
  if (columns == SIDE)  // a length that the compiler knows
    for (int64_t r = 0; r < rows; r++) std::copy(x + r * size, x + r * size + SIDE, transposed[r]);
  else
    for (int64_t r = 0; r < rows; r++)
      std::copy(x + r * size, x + r * size + columns, transposed[r]);
  perfect_shuffle(transposed[0], shuffled);
  perfect_shuffle(shuffled, transposed[0]);
  perfect_shuffle(transposed[0], shuffled);
  perfect_shuffle(shuffled, transposed[0]);
}

template <typename T>
T clamped(T s) {
  return s > 1 ? T(1) : s < -1 ? T(-1) : s;  // NaN stays
}

// The same for one tile on or above the diagonal.
template <typename T>
void mirror_tile(T* s, int64_t size, int64_t i, int64_t j, int64_t rows, int64_t columns,
                 const double* norm, double eps) {
  T transposed[SIDE][SIDE], *tile = s + i * size + j;
  for (int64_t r = 0; r < rows; r++) {
    T* row = tile + r * size;
    for (int64_t c = 0; c < columns; c++) row[c] = clamped(row[c]);
  }
  transpose_tile(tile, size, rows, columns, transposed);
  for (int64_t c = 0; c < columns; c++) {
    T* row = s + (j + c) * size + i;
    const int64_t below = std::min(rows, j + c - i);  // on the diagonal, not all of the row
    std::copy(transposed[c], transposed[c] + below, row);
    if (below < rows && norm[j + c] > eps && row[below] == row[below]) row[below] = 1;
  }
}

// Given the products in the rows first..last from the diagonal on: their clamped values there and
// mirrored below the diagonal, which is 1 except for clamped rows and NaN.
template <typename T>
void mirror(T* s, int64_t size, int64_t first, int64_t last, const double* norm, double eps) {
#pragma omp parallel for schedule(dynamic) if ((last - first) * (size - first) > PARALLEL_ELEMENTS)
  for (int64_t strip = first; strip < size; strip += COLUMNS_AT_ONCE) {
    const int64_t end = std::min(strip + COLUMNS_AT_ONCE, size);
    for (int64_t i = first; i < std::min(last, end); i += SIDE)
      for (int64_t j = std::max(strip, i); j < end; j += SIDE)
        mirror_tile(s, size, i, j, std::min(SIDE, last - i), std::min(SIDE, end - j), norm, eps);
  }
}

// out = the rows first..last of grad + grad^T
template <typename T>
void add_mirrored(const T* grad, int64_t size, int64_t first, int64_t last, T* out) {
#pragma omp parallel for schedule(static) if ((last - first) * size > PARALLEL_ELEMENTS)
  for (int64_t strip = 0; strip < size; strip += COLUMNS_AT_ONCE) {
    const int64_t end = std::min(strip + COLUMNS_AT_ONCE, size);
    T transposed[SIDE][SIDE];
    for (int64_t i = first; i < last; i += SIDE)
      for (int64_t j = strip; j < end; j += SIDE) {
        const int64_t rows = std::min(SIDE, last - i), columns = std::min(SIDE, end - j);
        transpose_tile(grad + j * size + i, size, columns, rows, transposed);
        for (int64_t r = 0; r < rows; r++) {
          const T* row = grad + (i + r) * size + j;
          T* sum = out + (i - first + r) * size + j;
          for (int64_t c = 0; c < columns; c++) sum[c] = row[c] + transposed[r][c];
        }
      }
  }
}

}  // namespace

#define PAIRWISE_COSINE_SIMILARITY(T, NAME)                                                \
  extern "C" void pairwise_mirror_##NAME(T* s, int64_t size, int64_t first, int64_t last,  \
                                         const double* norm, double eps) {                 \
    mirror(s, size, first, last, norm, eps);                                               \
  }                                                                                        \
  extern "C" void pairwise_add_mirrored_##NAME(const T* grad, int64_t size, int64_t first, \
                                               int64_t last, T* out) {                     \
    add_mirrored(grad, size, first, last, out);                                            \
  }

PAIRWISE_COSINE_SIMILARITY(float, float32)
PAIRWISE_COSINE_SIMILARITY(double, float64)
