// What the in-batch losses do with a tile of logits, (rows, columns) at a stride.
//
// total_i = sum_j f(x_ij) for the f of a kind, and the gradient on x_ij is f'(x_ij) (a_i + b_j). An
// excluded pair has the logit -inf, at which f and f' are 0, and so have the columns that fill up a
// tile's last vector. Arithmetic is in float32, totals are in float64.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "coefficients.h"
#include "exponential.h"
#include "rounds.h"
#include "vector.h"

constexpr int64_t BAND = 64;  // rows whose sum along a column is in float32

struct Exponential {
  Vector value, slope;
  Exponential(Vector x, float) : value(exponential(x)), slope(value) {}
};

struct Softplus {
  Vector value, slope;
  Softplus(Vector x, float) {
    const Vector e = exponential(-absolute(x));
    // log(1 + e) = 2 atanh(s), s = e / (2 + e) <= 1/3: its series has a small relative error
    const Vector s = e / (2.f + e), square = s * s;
    Vector p = splat(1.f / 15);
    p = p * square + 1.f / 13;
    p = p * square + 1.f / 11;
    p = p * square + 1.f / 9;
    p = p * square + 1.f / 7;
    p = p * square + 1.f / 5;
    p = p * square + 1.f / 3;
    p = p * square + 1.f;
    value = larger(Vector{}, x) + 2.f * s * p;
    slope = (x < 0.f ? e : splat(1)) / (1.f + e);
  }
};

struct Hinge {
  Vector value, slope;
  Hinge(Vector x, float margin) {
    const Vector beyond = x - margin;
    value = larger(Vector{}, beyond);  // NaN stays NaN
    slope = beyond > 0.f ? splat(1) : value;
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

// Sums of f. The tile keeps the slopes f'.
template <typename F>
struct Sums {
  template <typename Number>
  using KeptAs = Number;

  // Add a tile of logits to the totals, and leave what is kept of it, which may take its place.
  template <typename Number>
  static void add(const float* x, int64_t stride, int64_t rows, int64_t columns, float margin,
                  TotalsOf totals, Number* slopes, int64_t slopes_stride) {
    for (int64_t band = 0; band < rows; band += BAND) {
      float down[LARGEST_BLOCK] = {};
      for (int64_t i = band; i < std::min(rows, band + BAND); i++) {
        Vector along = {};
        for (int64_t j = 0; j < columns; j += LANES) {
          const F f(load(x + i * stride + j), margin);
          along += f.value;
          store(load(down + j) + f.value, down + j);
          store(f.slope, slopes + i * slopes_stride + j);
        }
        totals.rows[i] += sum(along);
      }
      if (totals.columns)
        for (int64_t j = 0; j < columns; j++) totals.columns[j] += down[j];
    }
  }

  // Add another total of row i.
  static void merge(TotalsOf totals, TotalsOf other, int64_t i) { totals.rows[i] += other.rows[i]; }

  // The weights of a row's pairs: of what add leaves, or of the logits.
  template <bool LOGITS, bool TWO_WAY, bool PULLS>
  struct Weights {
    const OfColumns& columns;
    float margin, a, pull;
    int32_t own;

    Weights(const CoefficientsOf& of, const OfColumns& columns, int64_t i, float margin)
        : columns(columns), margin(margin), a(of.a[i]) {
      if (PULLS) pull = of.row_pull[i], own = of.row_class[i];
    }

    Vector operator()(Vector x, int64_t j) const {
      const Vector slope = LOGITS ? F(x, margin).slope : x;
      const Vector weights = slope * (TWO_WAY ? a + load(columns.b + j) : splat(a));
      // the slope is not 0 but where a pair is excluded, of the sums that have positives
      return PULLS ? weights + columns.pulls(pull, own, j, slope != 0.f) : weights;
    }
  };
};

// total = log sum exp of the logits: until the end a sum of exp(x - largest). The tile keeps the
// logits, which no narrower number may hold: their error would be the weights' relative error.
struct LogSumExp {
  template <typename>
  using KeptAs = float;

  static void add(const float* x, int64_t stride, int64_t rows, int64_t columns, float,
                  TotalsOf totals, float* kept, int64_t kept_stride) {
    for (int64_t i = 0; i < rows; i++) {
      const float* row = x + i * stride;
      Vector most = splat(-INFINITY), along = {};
      for (int64_t j = 0; j < columns; j += LANES) {
        const Vector logits = load(row + j);
        most = larger(logits, most);
        store(logits, kept + i * kept_stride + j);
      }
      const float shift = renewed(totals.rows[i], totals.row_largest[i], largest(most));
      for (int64_t j = 0; j < columns; j += LANES) along += exponential(load(row + j) - shift);
      totals.rows[i] += sum(along);
    }
    if (!totals.columns) return;
    float shift[LARGEST_BLOCK], down[LARGEST_BLOCK] = {};
    std::fill(shift, shift + columns, -INFINITY);
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t j = 0; j < columns; j += LANES)
        store(larger(load(x + i * stride + j), load(shift + j)), shift + j);
    }
    for (int64_t j = 0; j < columns; j++)
      shift[j] = renewed(totals.columns[j], totals.column_largest[j], shift[j]);
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t j = 0; j < columns; j += LANES) {
        const Vector e = exponential(load(x + i * stride + j) - load(shift + j));
        store(load(down + j) + e, down + j);
      }
    }
    for (int64_t j = 0; j < columns; j++) totals.columns[j] += down[j];
  }

  static void merge(TotalsOf totals, TotalsOf other, int64_t i) {
    renewed(totals.rows[i], totals.row_largest[i], other.row_largest[i]);
    totals.rows[i] += other.rows[i] * std::exp(other.row_largest[i] - totals.row_largest[i]);
  }

  template <bool, bool TWO_WAY, bool PULLS>
  struct Weights {
    const OfColumns& columns;
    float a, shift, pull;
    int32_t own;

    Weights(const CoefficientsOf& of, const OfColumns& columns, int64_t i, float)
        : columns(columns), a(of.a[i]), shift(of.row_shift[i]) {
      if (PULLS) pull = of.row_pull[i], own = of.row_class[i];
    }

    Vector operator()(Vector x, int64_t j) const {
      Vector weights = a * exponential(x - shift);
      if (TWO_WAY) weights += load(columns.b + j) * exponential(x - load(columns.shift + j));
      return PULLS ? weights + columns.pulls(pull, own, j, x != -INFINITY) : weights;
    }
  };

 private:
  // The total below a maximum that has seen `most` too, which is returned.
  static float renewed(double& total, double& largest, double most) {
    const double now = std::max(largest, most);
    total *= std::exp(largest - now);
    largest = now;
    return float(std::max(now, -1e38));
  }
};
