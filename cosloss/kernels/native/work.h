// What the engine of the in-batch losses is asked to do, in the notation of in_batch.cpp.

#pragma once

#include <cstdint>

#include "coefficients.h"
#include "totals.h"

struct Work {
  const void *rows, *across, *down_r, *down_c;  // R; C and R packed as in operands.h
  int64_t n, m, d;
  int64_t symmetric;
  // excluded are the pairs on diagonals, column - row = offset, and those of one group, of which
  // pairs of one class are not, where there are classes
  int64_t first_row, diagonals;
  const int64_t *offsets, *row_groups, *column_groups, *row_classes, *column_classes;
  const float* bias;
  double margin;
  // totals to be added to, or none
  TotalsOf totals;
  // what the tiles leave for weighing, or nothing: written with totals, read without
  void* kept;
  // coefficients, or none, and the sums of gradients, each if needed
  CoefficientsOf coefficients;
  float *grad_r, *grad_c;
  float* grad_bias;
};

// The part of a matrix that a tile is: its first row and column, and how many of each. What is
// added up along its rows goes to the sums from row `sums` on.
struct Part {
  int64_t i, j, rows, columns, sums;
};
