// What the in-batch losses do with a tile of logits, (rows, columns) at a stride.
//
// total_i = sum_j f(x_ij) for the f of a kind, and the gradient on x_ij is f'(x_ij) (a_i + b_j). An
// excluded pair has the logit -inf, at which f and f' are 0. Arithmetic is in float32, totals are
// in float64.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "exponential.h"
#include "numbers.h"

constexpr int64_t LARGEST_BLOCK = 256;  // rows and columns of a tile
constexpr int64_t BAND = 64;            // rows whose sum along a column is in float32

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

// The totals that a tile is added to, from its first row and column on; those of the columns may be
// missing. `largest` is the greatest logit so far, which only a logsumexp keeps.
struct TotalsOf {
  double *rows, *columns, *row_largest, *column_largest;

  TotalsOf from(int64_t i, int64_t j, bool of_columns) const {
    auto ahead = [](double* x, int64_t by) { return x ? x + by : nullptr; };
    double* columns_j = of_columns ? ahead(columns, j) : nullptr;
    return {rows + i, columns_j, ahead(row_largest, i), ahead(column_largest, j)};
  }
};

// The coefficients of a tile's rows and columns, those of the columns 0 if missing. A logsumexp's
// go with a shift. Where there are pulls, they are added to the weights of the pairs of one class
// that are not excluded; the columns then have coefficients.
struct CoefficientsOf {
  const float *a, *b, *row_shift, *column_shift, *row_pull, *column_pull;
  const int64_t *row_class, *column_class;

  CoefficientsOf from(int64_t i, int64_t j) const {
    auto ahead = [](auto* x, int64_t by) { return x ? x + by : nullptr; };
    return {a + i,
            ahead(b, j),
            ahead(row_shift, i),
            ahead(column_shift, j),
            ahead(row_pull, i),
            ahead(column_pull, j),
            ahead(row_class, i),
            ahead(column_class, j)};
  }
};

// Sums of f. The tile keeps the slopes f'.
template <typename F>
struct Sums {
  template <typename Number>
  using KeptAs = Number;

  static void add(float* x, int64_t stride, int64_t rows, int64_t columns, float margin,
                  TotalsOf totals) {
    for (int64_t band = 0; band < rows; band += BAND) {
      float down[LARGEST_BLOCK] = {};
      for (int64_t i = band; i < std::min(rows, band + BAND); i++) {
        float* row = x + i * stride;
        float sum = 0;
        if (totals.columns) {
#pragma omp simd reduction(+ : sum)
          for (int64_t j = 0; j < columns; j++) {
            const F f(row[j], margin);
            sum += f.value;
            down[j] += f.value;
            row[j] = f.slope;
          }
        } else {
#pragma omp simd reduction(+ : sum)
          for (int64_t j = 0; j < columns; j++) {
            const F f(row[j], margin);
            sum += f.value;
            row[j] = f.slope;
          }
        }
        totals.rows[i] += sum;
      }
      if (totals.columns)
        for (int64_t j = 0; j < columns; j++) totals.columns[j] += down[j];
    }
  }

  // Add another total of row i.
  static void merge(TotalsOf totals, TotalsOf other, int64_t i) { totals.rows[i] += other.rows[i]; }

  // What add leaves in the tile.
  static void again(float* x, int64_t stride, int64_t rows, int64_t columns, float margin) {
    for (int64_t i = 0; i < rows; i++) {
      float* row = x + i * stride;
#pragma omp simd
      for (int64_t j = 0; j < columns; j++) row[j] = F(row[j], margin).slope;
    }
  }

  template <typename Kept>
  static void weigh(const Kept* slopes, int64_t stride, int64_t rows, int64_t columns,
                    CoefficientsOf of, float* out, int64_t out_stride) {
    for (int64_t i = 0; i < rows; i++) {
      const Kept* from = slopes + i * stride;
      float* to = out + i * out_stride;
      const float a = of.a[i];
      if (of.row_pull) {
        const float pull = of.row_pull[i];
        const int64_t own = of.row_class[i];
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) {
          const float slope = single(from[j]);  // not 0, of the sums that have positives
          const bool positive = of.column_class[j] == own && slope != 0;
          to[j] = slope * (a + of.b[j]) + (positive ? pull + of.column_pull[j] : 0);
        }
      } else if (of.b) {
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) to[j] = single(from[j]) * (a + of.b[j]);
      } else {
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) to[j] = single(from[j]) * a;
      }
    }
  }
};

// total = log sum exp of the logits: until the end a sum of exp(x - largest). The tile keeps the
// logits, which no narrower number may hold: their error would be the weights' relative error.
struct LogSumExp {
  template <typename>
  using KeptAs = float;

  static void add(float* x, int64_t stride, int64_t rows, int64_t columns, float, TotalsOf totals) {
    for (int64_t i = 0; i < rows; i++) {
      const float* row = x + i * stride;
      float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
      for (int64_t j = 0; j < columns; j++) most = std::max(most, row[j]);
      const float shift = renewed(totals.rows[i], totals.row_largest[i], most);
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < columns; j++) sum += exponential(row[j] - shift);
      totals.rows[i] += sum;
    }
    if (!totals.columns) return;
    float shift[LARGEST_BLOCK], sum[LARGEST_BLOCK] = {};
    std::fill(shift, shift + columns, -INFINITY);
    for (int64_t i = 0; i < rows; i++) {
      const float* row = x + i * stride;
#pragma omp simd
      for (int64_t j = 0; j < columns; j++) shift[j] = std::max(shift[j], row[j]);
    }
    for (int64_t j = 0; j < columns; j++)
      shift[j] = renewed(totals.columns[j], totals.column_largest[j], shift[j]);
    for (int64_t i = 0; i < rows; i++) {
      const float* row = x + i * stride;
#pragma omp simd
      for (int64_t j = 0; j < columns; j++) sum[j] += exponential(row[j] - shift[j]);
    }
    for (int64_t j = 0; j < columns; j++) totals.columns[j] += sum[j];
  }

  static void merge(TotalsOf totals, TotalsOf other, int64_t i) {
    renewed(totals.rows[i], totals.row_largest[i], other.row_largest[i]);
    totals.rows[i] += other.rows[i] * std::exp(other.row_largest[i] - totals.row_largest[i]);
  }

  static void again(float*, int64_t, int64_t, int64_t, float) {}

  static void weigh(const float* x, int64_t stride, int64_t rows, int64_t columns,
                    CoefficientsOf of, float* out, int64_t out_stride) {
    for (int64_t i = 0; i < rows; i++) {
      const float* from = x + i * stride;
      float* to = out + i * out_stride;
      const float a = of.a[i], shift = of.row_shift[i];
      if (of.row_pull) {
        const float pull = of.row_pull[i];
        const int64_t own = of.row_class[i];
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) {
          const bool positive = of.column_class[j] == own && from[j] != -INFINITY;
          const float of_row = a * exponential(from[j] - shift);
          const float of_column = of.b[j] * exponential(from[j] - of.column_shift[j]);
          to[j] = of_row + of_column + (positive ? pull + of.column_pull[j] : 0);
        }
      } else if (of.b) {
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) {
          const float of_row = a * exponential(from[j] - shift);
          to[j] = of_row + of.b[j] * exponential(from[j] - of.column_shift[j]);
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) to[j] = a * exponential(from[j] - shift);
      }
    }
  }

 private:
  // The total below a maximum that has seen `most` too, which is returned.
  static float renewed(double& total, double& largest, double most) {
    const double now = std::max(largest, most);
    total *= std::exp(largest - now);
    largest = now;
    return float(std::max(now, -1e38));
  }
};
