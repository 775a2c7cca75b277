// A criterion's work on a tile of logits, (rows, columns) at a stride: statistics and d_logits.
//
// stat_i = sum_j f(x_ij) for the f of a kind, and d_logit_ij = f'(x_ij) (d_rows_i + d_columns_j). A
// masked pair has the logit -inf, at which f and f' are 0, and so have the columns that fill up a
// tile's last vector. Arithmetic is in float32, statistics are in float64.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gemm.h"
#include "params.h"
#include "simd.h"
#include "tiles.h"

// exp as glibc has had it from the first: that of 2.29 would shut older systems out
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp,exp@GLIBC_2.17");
#endif

// The part of LossGrads of a tile's columns, with zeros to fill up the last vector.
struct ColumnGrads {
  float d_stat[LARGEST_BLOCK], shift[LARGEST_BLOCK], d_pos[LARGEST_BLOCK];
  int32_t classes[LARGEST_BLOCK];

  ColumnGrads(const LossGrads& of, int64_t first, int64_t columns) {
    fill(d_stat, of.d_columns, first, columns);
    fill(shift, of.column_shift, first, columns);
    fill(d_pos, of.d_column_pos, first, columns);
    fill(classes, of.column_class, first, columns);
  }

  // The gradient on a row's logits that is its positives' alone; pairs: those that are not masked.
  Vector d_positives(float d_row_pos, int32_t row_class, int64_t j, Integers pairs) const {
    const Integers positive = (load(classes + j) == row_class) & pairs;
    return positive ? d_row_pos + load(d_pos + j) : Vector{};
  }

 private:
  template <typename T>
  static void fill(T* to, const T* from, int64_t first, int64_t columns) {
    if (!from) return;
    std::copy_n(from + first, columns, to);
    std::fill(to + columns, to + round_up(columns), 0);
  }
};

constexpr int64_t FLOAT_ROWS = 64;  // as many are added up row_sums a column in float32

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
    Vector p = broadcast(1.f / 15);
    p = p * square + 1.f / 13;
    p = p * square + 1.f / 11;
    p = p * square + 1.f / 9;
    p = p * square + 1.f / 7;
    p = p * square + 1.f / 5;
    p = p * square + 1.f / 3;
    p = p * square + 1.f;
    value = maximum(Vector{}, x) + 2.f * s * p;
    slope = (x < 0.f ? e : broadcast(1)) / (1.f + e);
  }
};

struct Hinge {
  Vector value, slope;
  Hinge(Vector x, float margin) {
    const Vector beyond = x - margin;
    value = maximum(Vector{}, beyond);  // NaN stays NaN
    slope = beyond > 0.f ? broadcast(1) : value;
  }
};

// Sums of f; the stash of a tile is f'.
template <typename F>
struct Sums {
  template <typename Number>
  using Stash = Number;

  // Add a tile of logits to the statistics, and stash f', which may take the tile's place.
  template <typename Number>
  static void add(const float* x, int64_t stride, int64_t rows, int64_t columns, float margin,
                  StatsPointers stats, Number* stash, int64_t stash_stride) {
    for (int64_t band = 0; band < rows; band += FLOAT_ROWS) {
      float column_sums[LARGEST_BLOCK] = {};
      for (int64_t i = band; i < std::min(rows, band + FLOAT_ROWS); i++) {
        Vector row_sums = {};
        for (int64_t j = 0; j < columns; j += LANES) {
          const F f(load(x + i * stride + j), margin);
          row_sums += f.value;
          store(load(column_sums + j) + f.value, column_sums + j);
          store(f.slope, stash + i * stash_stride + j);
        }
        stats.rows[i] += reduce_sum(row_sums);
      }
      if (stats.columns)
        for (int64_t j = 0; j < columns; j++) stats.columns[j] += column_sums[j];
    }
  }

  // Add a partial sum of row i.
  static void merge(StatsPointers stats, StatsPointers other, int64_t i) {
    stats.rows[i] += other.rows[i];
  }

  // The d_logits of a row, from the stash or, if LOGITS, from the logits.
  template <bool LOGITS, bool COLUMN_LOSSES, bool POSITIVES>
  struct DLogits {
    const ColumnGrads& columns;
    float margin, d_row, d_pos;
    int32_t own_class;

    DLogits(const LossGrads& of, const ColumnGrads& columns, int64_t i, float margin)
        : columns(columns), margin(margin), d_row(of.d_rows[i]) {
      if (POSITIVES) d_pos = of.d_row_pos[i], own_class = of.row_class[i];
    }

    Vector operator()(Vector x, int64_t j) const {
      const Vector slope = LOGITS ? F(x, margin).slope : x;
      const Vector d = COLUMN_LOSSES ? d_row + load(columns.d_stat + j) : broadcast(d_row);
      // only an lse has positives, and its f' = exp is 0 exactly at masked pairs
      return POSITIVES ? slope * d + columns.d_positives(d_pos, own_class, j, slope != 0.f)
                       : slope * d;
    }
  };
};

// Online logsumexp: until the end, a sum of exp(x - maximum). The stash is the logits, in float32:
// an error of theirs would be a relative error of their d_logits.
struct LogSumExp {
  template <typename>
  using Stash = float;

  static void add(const float* x, int64_t stride, int64_t rows, int64_t columns, float,
                  StatsPointers stats, float* stash, int64_t stash_stride) {
    for (int64_t i = 0; i < rows; i++) {
      const float* row = x + i * stride;
      Vector most = broadcast(-INFINITY), row_sums = {};
      for (int64_t j = 0; j < columns; j += LANES) {
        const Vector logits = load(row + j);
        most = maximum(logits, most);
        store(logits, stash + i * stash_stride + j);
      }
      const float shift = rescale(stats.rows[i], stats.row_max[i], reduce_max(most));
      for (int64_t j = 0; j < columns; j += LANES) row_sums += exponential(load(row + j) - shift);
      stats.rows[i] += reduce_sum(row_sums);
    }
    if (!stats.columns) return;
    float shift[LARGEST_BLOCK], column_sums[LARGEST_BLOCK] = {};
    std::fill(shift, shift + columns, -INFINITY);
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t j = 0; j < columns; j += LANES)
        store(maximum(load(x + i * stride + j), load(shift + j)), shift + j);
    }
    for (int64_t j = 0; j < columns; j++)
      shift[j] = rescale(stats.columns[j], stats.column_max[j], shift[j]);
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t j = 0; j < columns; j += LANES) {
        const Vector e = exponential(load(x + i * stride + j) - load(shift + j));
        store(load(column_sums + j) + e, column_sums + j);
      }
    }
    for (int64_t j = 0; j < columns; j++) stats.columns[j] += column_sums[j];
  }

  static void merge(StatsPointers stats, StatsPointers other, int64_t i) {
    rescale(stats.rows[i], stats.row_max[i], other.row_max[i]);
    stats.rows[i] += other.rows[i] * std::exp(other.row_max[i] - stats.row_max[i]);
  }

  template <bool, bool COLUMN_LOSSES, bool POSITIVES>
  struct DLogits {
    const ColumnGrads& columns;
    float d_row, shift, d_pos;
    int32_t own_class;

    DLogits(const LossGrads& of, const ColumnGrads& columns, int64_t i, float)
        : columns(columns), d_row(of.d_rows[i]), shift(of.row_shift[i]) {
      if (POSITIVES) d_pos = of.d_row_pos[i], own_class = of.row_class[i];
    }

    Vector operator()(Vector x, int64_t j) const {
      Vector d = d_row * exponential(x - shift);
      if (COLUMN_LOSSES) d += load(columns.d_stat + j) * exponential(x - load(columns.shift + j));
      return POSITIVES ? d + columns.d_positives(d_pos, own_class, j, x != -INFINITY) : d;
    }
  };

 private:
  // Rescale a sum to a maximum that has seen `most` too, which is returned.
  static float rescale(double& sum, double& largest, double most) {
    const double now = std::max(largest, most);
    sum *= std::exp(largest - now);
    largest = now;
    return float(std::max(now, -1e38));
  }
};

// What becomes of d_logits where there is one logit matrix: nothing more.
struct Alone {
  Vector operator()(int64_t, int, int64_t, Vector, Vector d) const { return d; }
  void end_rows(int64_t, int) const {}
};

// What becomes of the d_logits of a prefix, from the longest to the shortest: their sums along the
// logits, and those of the longer prefixes on top, which the logits of this one are a part of:
//
//     g_ij = d_ij + link_i link_j g'_ij,    the links and g' of the next longer prefix.
class Nested {
 public:
  // g: a tile of the same stride as the logits, with g', if there is a longer prefix.
  Nested(const InBatchParams& prefix, TileBounds part, bool diagonal, bool longest, float* g,
         int64_t stride)
      : prefix_(prefix),
        part_(part),
        bias_(prefix.bias ? *prefix.bias : 0),
        along_columns_(diagonal ? nullptr : prefix.along_columns),
        row_links_(longest ? nullptr : prefix.row_links + prefix.all_rows + part.i),
        g_(g),
        stride_(stride) {
    if (longest) return;
    std::copy_n(prefix.column_links + prefix.m + part.j, part.columns, column_links_);
    std::fill(column_links_ + part.columns, column_links_ + round_up(part.columns), 0.f);
  }

  // The same of row i, which is number `row` of those at once, and the columns from j on.
  Vector operator()(int64_t i, int row, int64_t j, Vector x, Vector d) {
    const Vector along = d * (x == -INFINITY ? Vector{} : x - bias_);  // d is 0 at masked pairs
    row_along_[row] += along;
    store(load(column_along_ + j) + along, column_along_ + j);
    float* const at = g_ + i * stride_ + j;
    if (row_links_) d += row_links_[i] * load(column_links_ + j) * load(at);
    store(d, at);
    return d;
  }

  void end_rows(int64_t i, int rows) {
    for (int row = 0; row < rows; row++) {
      prefix_.along_rows[part_.i + i + row] += reduce_sum(row_along_[row]);
      row_along_[row] = Vector{};
    }
  }

  void end_tile() const {
    if (!along_columns_) return;
    for (int64_t j = 0; j < part_.columns; j++) along_columns_[part_.j + j] += column_along_[j];
  }

 private:
  const InBatchParams& prefix_;
  const TileBounds part_;
  const float bias_;
  double* const along_columns_;
  const float* const row_links_;
  float* const g_;
  const int64_t stride_;
  Vector row_along_[2] = {};
  float column_along_[LARGEST_BLOCK] = {}, column_links_[LARGEST_BLOCK];
};

constexpr int64_t PREFETCH_BYTES = 4096;  // ahead: a kept stash comes from memory

// Write the d_logits of ROWS rows from row i on to scratch, and return their sum if it is needed.
template <typename DLogits, int ROWS, typename Number, typename Word, typename Further>
double d_logits_of_rows(const InBatchParams& params, TileBounds part, int64_t i,
                        const ColumnGrads& columns, const Number* x, int64_t stride,
                        Scratch<Word>& scratch, Further& further) {
  auto of_row = [&](int64_t row) {
    return DLogits(params.loss_grads, columns, part.i + row, params.margin);
  };
  const DLogits d_logits[2] = {of_row(i), of_row(i + ROWS - 1)};
  const auto to = scratch.row(i);
  Vector row_sums = {};
  for (int64_t j = 0; j < part.columns; j += LANES) {
    Vector found[ROWS];
    for (int row = 0; row < ROWS; row++) {
      const Number* from = x + (i + row) * stride + j;
      __builtin_prefetch(from + PREFETCH_BYTES / sizeof(Number));
      const Vector own = load(from);
      found[row] = d_logits[row](own, j);
      row_sums += found[row];
      found[row] = further(i + row, row, j, own, found[row]);
    }
    to.put(j, found);
  }
  further.end_rows(i, ROWS);
  return params.grad_bias ? reduce_sum(row_sums) : 0;
}

// The same for a tile, as many rows at once as a word has numbers.
template <typename DLogits, typename Number, typename Word, typename Further>
double d_logits_of_tile(const InBatchParams& params, TileBounds part, const Number* x,
                        int64_t stride, Scratch<Word>& scratch, Further& further) {
  constexpr int ROWS = Scratch<Word>::PER_WORD;
  const ColumnGrads columns(params.loss_grads, part.j, part.columns);
  double sum = 0;
  int64_t i = 0;
  for (; i + ROWS <= part.rows; i += ROWS)
    sum += d_logits_of_rows<DLogits, ROWS>(params, part, i, columns, x, stride, scratch, further);
  for (; i < part.rows; i++)
    sum += d_logits_of_rows<DLogits, 1>(params, part, i, columns, x, stride, scratch, further);
  return sum;
}

// The same for whatever losses there are; x: the tile's stash or, if LOGITS, its logits.
template <typename Kind, bool LOGITS, typename Number, typename Word, typename Further>
double d_logits_of(const InBatchParams& params, TileBounds part, const Number* x, int64_t stride,
                   Scratch<Word>& scratch, Further further) {
  if (params.loss_grads.d_row_pos)
    return d_logits_of_tile<typename Kind::template DLogits<LOGITS, true, true>>(
        params, part, x, stride, scratch, further);
  if (params.loss_grads.d_columns)
    return d_logits_of_tile<typename Kind::template DLogits<LOGITS, true, false>>(
        params, part, x, stride, scratch, further);
  return d_logits_of_tile<typename Kind::template DLogits<LOGITS, false, false>>(
      params, part, x, stride, scratch, further);
}
