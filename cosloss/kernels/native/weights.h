// The weights of a tile's pairs, as the products of the gradients read them.

#pragma once

#include <cstdint>

#include "coefficients.h"
#include "operands.h"
#include "params.h"

constexpr int64_t AHEAD = 4096;  // bytes that are fetched early: what was kept comes from memory

// Put the weights of ROWS rows from row i on in scratch; their sum is returned where it is needed.
template <typename Weights, int ROWS, typename Number, typename Word>
double weigh_rows(const InBatchParams& work, Part part, int64_t i, const OfColumns& columns,
                  const Number* x, int64_t stride, Scratch<Word>& scratch) {
  auto of_row = [&](int64_t row) {
    return Weights(work.coefficients, columns, part.i + row, work.margin);
  };
  const Weights weights[2] = {of_row(i), of_row(i + ROWS - 1)};
  const auto to = scratch.row(i);
  Vector along = {};
  for (int64_t j = 0; j < part.columns; j += LANES) {
    Vector found[ROWS];
    for (int row = 0; row < ROWS; row++) {
      const Number* from = x + (i + row) * stride + j;
      __builtin_prefetch(from + AHEAD / sizeof(Number));
      found[row] = weights[row](load(from), j);
      along += found[row];
    }
    to.put(j, found);
  }
  return work.grad_bias ? sum(along) : 0;
}

// The same for all rows, as many at once as there are in a word.
template <typename Weights, typename Number, typename Word>
double weigh_tile(const InBatchParams& work, Part part, const Number* x, int64_t stride,
                  Scratch<Word>& scratch) {
  constexpr int ROWS = Scratch<Word>::PER_WORD;
  const OfColumns columns(work.coefficients, part.j, part.columns);
  double sum = 0;
  int64_t i = 0;
  for (; i + ROWS <= part.rows; i += ROWS)
    sum += weigh_rows<Weights, ROWS>(work, part, i, columns, x, stride, scratch);
  for (; i < part.rows; i++)
    sum += weigh_rows<Weights, 1>(work, part, i, columns, x, stride, scratch);
  return sum;
}

// The weights of a tile, from what is kept or, if LOGITS, from its logits; their sum is returned.
template <typename Kind, bool LOGITS, typename Number, typename Word>
double weigh(const InBatchParams& work, Part part, const Number* x, int64_t stride,
             Scratch<Word>& scratch) {
  if (work.coefficients.row_pull)
    return weigh_tile<typename Kind::template Weights<LOGITS, true, true>>(work, part, x, stride,
                                                                           scratch);
  if (work.coefficients.b)
    return weigh_tile<typename Kind::template Weights<LOGITS, true, false>>(work, part, x, stride,
                                                                            scratch);
  return weigh_tile<typename Kind::template Weights<LOGITS, false, false>>(work, part, x, stride,
                                                                           scratch);
}
