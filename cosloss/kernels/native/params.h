// The parameters of a run of the in-batch engine, in the notation of in_batch.cpp.

#pragma once

#include <cstdint>

#include "coefficients.h"
#include "totals.h"

// A null pointer stands for what is missing, or not asked for.
struct InBatchParams {
  const void *rows, *packed_c, *packed_rows_of_r, *packed_rows_of_c;  // R; C and R as in operands.h
  int64_t first_row, n, m, d;  // the run is over n rows of R from first_row on
  int64_t symmetric;
  // masked are the pairs on diagonals, column - row = offset, and those of one group, of which
  // pairs of one class are not, where there are classes
  int64_t diagonals;
  const int64_t *offsets, *row_groups, *column_groups, *row_classes, *column_classes;
  const float* bias;
  double margin;
  TotalsOf totals;  // the statistics to accumulate in
  void* kept;       // tiles: written where statistics are accumulated, read where not
  CoefficientsOf coefficients;
  float *grad_r, *grad_c;
  float* grad_bias;

  // The parameters with R and what goes with its rows beginning at first_row; the coefficients do
  // already. Without these there is no gradient.
  InBatchParams from_first_row(int64_t bytes_of_a_row) const {
    auto ahead = [this](auto* x, int64_t size) { return x ? x + first_row * size : x; };
    InBatchParams own = *this;
    own.rows = ahead(static_cast<const char*>(rows), bytes_of_a_row);
    own.row_groups = ahead(row_groups, 1);
    own.row_classes = ahead(row_classes, 1);
    own.totals.rows = ahead(totals.rows, 1);
    own.totals.row_largest = ahead(totals.row_largest, 1);
    own.grad_r = ahead(grad_r, d);
    if (!coefficients.a) own.grad_r = own.grad_c = own.grad_bias = nullptr;
    return own;
  }
};

// The part of a matrix that a tile is: its first row and column, and how many of each. What is
// added up along its rows goes to the sums from row `sums` on.
struct Part {
  int64_t i, j, rows, columns, sums;
};
