// What the in-batch losses do with a tile of logits, contiguous (rows, columns), in one pass.
//
// total_i = sum_j f(x_ij) for the f of a kind, and the gradient on x_ij is f'(x_ij) (a_i + b_j). An
// excluded pair has the logit -inf, at which f and f' are 0. Arithmetic is in float32, totals are
// in float64, and what is added to them does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "exponential.h"
#include "rows.h"

namespace {

constexpr int64_t BAND = 64;     // rows whose sum along a column is in float32
constexpr int64_t STRIPE = 128;  // columns that one thread goes down

struct Exponential {
  float value, slope;
  Exponential(float x, float) : value(exponential(x)), slope(value) {}
};

struct Softplus {
  float value, slope;
  Softplus(float x, float) {
    const float e = exponential(-std::fabs(x));
    // log(1 + e) = 2 atanh(s), s = e / (2 + e) <= 1/3: its series has a small relative error
    const float s = e / (2.f + e), square = s * s;
    float p = 1.f / 15;
    p = p * square + 1.f / 13;
    p = p * square + 1.f / 11;
    p = p * square + 1.f / 9;
    p = p * square + 1.f / 7;
    p = p * square + 1.f / 5;
    p = p * square + 1.f / 3;
    p = p * square + 1.f;
    value = (x < 0 ? 0 : x) + 2 * s * p;
    slope = (x < 0 ? e : 1.f) / (1.f + e);
  }
};

struct Hinge {
  float value, slope;
  Hinge(float x, float margin) {
    const float beyond = x - margin;
    value = beyond <= 0 ? 0 : beyond;  // NaN stays NaN
    slope = beyond > 0 ? 1 : value;
  }
};

template <typename F, typename T>
void add(T* x, int64_t rows, int64_t columns, float margin, double* row_totals,
         double* column_totals) {
  const int64_t bands = (rows + BAND - 1) / BAND;
  float* sums = nullptr;
  if (column_totals) sums = static_cast<float*>(std::calloc(bands * columns, sizeof(float)));
#pragma omp parallel for schedule(static) if (rows * columns > PARALLEL_ELEMENTS)
  for (int64_t band = 0; band < bands; band++) {
    for (int64_t i = band * BAND; i < std::min(rows, (band + 1) * BAND); i++) {
      T* row = x + i * columns;
      float sum = 0;
      if (sums) {
        float* down = sums + band * columns;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < columns; j++) {
          const F f(single(row[j]), margin);
          sum += f.value;
          down[j] += f.value;
          row[j] = narrow<T>(f.slope);
        }
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < columns; j++) {
          const F f(single(row[j]), margin);
          sum += f.value;
          row[j] = narrow<T>(f.slope);
        }
      }
      row_totals[i] += sum;
    }
  }
  if (!sums) return;
  for (int64_t band = 0; band < bands; band++)
    for (int64_t j = 0; j < columns; j++) column_totals[j] += sums[band * columns + j];
  std::free(sums);
}

template <typename F, typename T>
void slope(T* x, int64_t elements, float margin) {
#pragma omp parallel for simd schedule(static) if (elements > PARALLEL_ELEMENTS)
  for (int64_t k = 0; k < elements; k++) x[k] = narrow<T>(F(single(x[k]), margin).slope);
}

template <typename T>
void weigh(const T* slopes, int64_t rows, int64_t columns, const float* a, const float* b, T* out) {
#pragma omp parallel for schedule(static) if (rows * columns > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < rows; i++) {
    const T* from = slopes + i * columns;
    T* to = out + i * columns;
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) to[j] = narrow<T>(single(from[j]) * (a[i] + b[j]));
  }
}

// total = log sum exp over the rows' logits and, given column totals, the columns': until the end a
// sum of exp(x - largest), `largest` the greatest logit so far.
template <typename T>
void add_shifted(const T* x, int64_t rows, int64_t columns, double* row_totals, double* row_largest,
                 double* column_totals, double* column_largest) {
#pragma omp parallel for schedule(static) if (rows * columns > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < rows; i++) {
    const T* row = x + i * columns;
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < columns; j++) most = std::max(most, single(row[j]));
    const double now = std::max(row_largest[i], double(most));
    const float shift = std::max(now, -1e38);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; j++) sum += exponential(single(row[j]) - shift);
    row_totals[i] = row_totals[i] * std::exp(row_largest[i] - now) + sum;
    row_largest[i] = now;
  }
  if (!column_totals) return;
#pragma omp parallel for schedule(static) if (rows * columns > PARALLEL_ELEMENTS)
  for (int64_t start = 0; start < columns; start += STRIPE) {
    const int64_t width = std::min(STRIPE, columns - start);
    float most[STRIPE], sum[STRIPE];
    std::fill(most, most + width, -INFINITY);
    std::fill(sum, sum + width, 0.f);
    for (int64_t i = 0; i < rows; i++) {
      const T* row = x + i * columns + start;
#pragma omp simd
      for (int64_t j = 0; j < width; j++) most[j] = std::max(most[j], single(row[j]));
    }
    double now[STRIPE];
    for (int64_t j = 0; j < width; j++) {
      now[j] = std::max(column_largest[start + j], double(most[j]));
      most[j] = std::max(now[j], -1e38);
    }
    for (int64_t i = 0; i < rows; i++) {
      const T* row = x + i * columns + start;
#pragma omp simd
      for (int64_t j = 0; j < width; j++) sum[j] += exponential(single(row[j]) - most[j]);
    }
    for (int64_t j = 0; j < width; j++) {
      double &total = column_totals[start + j], &largest = column_largest[start + j];
      total = total * std::exp(largest - now[j]) + sum[j];
      largest = now[j];
    }
  }
}

// out_ij = exp(x_ij - shift_i)
template <typename T>
void slope_shifted(const T* x, int64_t rows, int64_t columns, const float* shift, T* out) {
#pragma omp parallel for schedule(static) if (rows * columns > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < rows; i++) {
    const T* from = x + i * columns;
    T* to = out + i * columns;
#pragma omp simd
    for (int64_t j = 0; j < columns; j++)
      to[j] = narrow<T>(exponential(single(from[j]) - shift[i]));
  }
}

// out_ij = a_i exp(x_ij - row_shift_i) + b_j exp(x_ij - column_shift_j)
template <typename T>
void weigh_shifted(const T* x, int64_t rows, int64_t columns, const float* a,
                   const float* row_shift, const float* b, const float* column_shift, T* out) {
#pragma omp parallel for schedule(static) if (rows * columns > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < rows; i++) {
    const T* from = x + i * columns;
    T* to = out + i * columns;
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) {
      const float v = single(from[j]);
      const float of_row = a[i] * exponential(v - row_shift[i]);
      to[j] = narrow<T>(of_row + b[j] * exponential(v - column_shift[j]));
    }
  }
}

}  // namespace

#define OF_KIND(KIND, F, T, NAME)                                                        \
  extern "C" void add_##KIND##_##NAME(T* x, int64_t rows, int64_t columns, float margin, \
                                      double* row_totals, double* column_totals) {       \
    add<F>(x, rows, columns, margin, row_totals, column_totals);                         \
  }                                                                                      \
  extern "C" void slope_##KIND##_##NAME(T* x, int64_t elements, float margin) {          \
    slope<F>(x, elements, margin);                                                       \
  }

#define TILES(T, NAME)                                                                           \
  OF_KIND(exp, Exponential, T, NAME)                                                             \
  OF_KIND(softplus, Softplus, T, NAME)                                                           \
  OF_KIND(hinge, Hinge, T, NAME)                                                                 \
  extern "C" void weigh_##NAME(const T* slopes, int64_t rows, int64_t columns, const float* a,   \
                               const float* b, T* out) {                                         \
    weigh(slopes, rows, columns, a, b, out);                                                     \
  }                                                                                              \
  extern "C" void add_logsumexp_##NAME(const T* x, int64_t rows, int64_t columns,                \
                                       double* row_totals, double* row_largest,                  \
                                       double* column_totals, double* column_largest) {          \
    add_shifted(x, rows, columns, row_totals, row_largest, column_totals, column_largest);       \
  }                                                                                              \
  extern "C" void slope_logsumexp_##NAME(const T* x, int64_t rows, int64_t columns,              \
                                         const float* shift, T* out) {                           \
    slope_shifted(x, rows, columns, shift, out);                                                 \
  }                                                                                              \
  extern "C" void weigh_logsumexp_##NAME(const T* x, int64_t rows, int64_t columns,              \
                                         const float* a, const float* row_shift, const float* b, \
                                         const float* column_shift, T* out) {                    \
    weigh_shifted(x, rows, columns, a, row_shift, b, column_shift, out);                         \
  }

TILES(float, float32)
TILES(bfloat16, bfloat16)
