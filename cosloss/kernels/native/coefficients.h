// What a matrix's pairs are weighed by.

#pragma once

#include <algorithm>
#include <cstdint>

#include "rounds.h"
#include "vector.h"

// The coefficients of a matrix's rows and columns, those of the columns 0 if missing. A logsumexp's
// go with a shift. Where there are pulls, they are added to the weights of the pairs of one class
// that are not excluded; the columns then have coefficients.
struct CoefficientsOf {
  const float *a, *b, *row_shift, *column_shift, *row_pull, *column_pull;
  const int32_t *row_class, *column_class;
};

// Those of a tile's columns, where there are any, with zeros to fill up the last vector.
struct OfColumns {
  float b[LARGEST_BLOCK], shift[LARGEST_BLOCK], pull[LARGEST_BLOCK];
  int32_t classes[LARGEST_BLOCK];

  OfColumns(const CoefficientsOf& of, int64_t first, int64_t columns) {
    fill(b, of.b, first, columns);
    fill(shift, of.column_shift, first, columns);
    fill(pull, of.column_pull, first, columns);
    fill(classes, of.column_class, first, columns);
  }

  // What pulls a row of this class towards its positives among the pairs.
  Vector pulls(float row_pull, int32_t row_class, int64_t j, Integers pairs) const {
    const Integers positive = (load(classes + j) == row_class) & pairs;
    return positive ? row_pull + load(pull + j) : Vector{};
  }

 private:
  template <typename T>
  static void fill(T* to, const T* from, int64_t first, int64_t columns) {
    if (!from) return;
    std::copy_n(from + first, columns, to);
    std::fill(to + columns, to + filled_up(columns), 0);
  }
};
