// The engine of the in-batch losses: totals of a logit matrix, and the gradient, tile by tile.
//
// Rows R (n, d), columns C (m, d), logits X = R C^T + bias; in a symmetric matrix C is R, and the
// tiles above the diagonal stand for those below. A thread takes a tile through all that is to be
// done with it: logits, totals, weights W, and its share of grad_R = W C and grad_C = W^T R. What
// it adds up does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "operands.h"
#include "params.h"
#include "products.h"
#include "rounds.h"
#include "row_sums.h"
#include "rows.h"
#include "totals.h"
#include "weights.h"

namespace {

template <typename Kind, typename Word>
using KeptAs = typename Kind::template KeptAs<typename Scratch<Word>::Number>;

void exclude(const InBatchParams& work, Part part, float* x, int64_t stride) {
  for (int64_t k = 0; k < work.diagonals; k++) {
    const int64_t ahead = work.first_row + part.i + work.offsets[k] - part.j;
    const int64_t first = std::max<int64_t>(0, -ahead);
    const int64_t last = std::min(part.rows, part.columns - ahead);
    for (int64_t i = first; i < last; i++) x[i * stride + i + ahead] = -INFINITY;
  }
  if (!work.row_groups) return;
  const int64_t* groups = work.column_groups + part.j;
  for (int64_t i = 0; i < part.rows; i++) {
    float* row = x + i * stride;
    const int64_t group = work.row_groups[part.i + i];
    if (work.row_classes) {
      const int64_t own = work.row_classes[part.i + i], *classes = work.column_classes + part.j;
#pragma omp simd
      for (int64_t j = 0; j < part.columns; j++)
        row[j] = groups[j] == group && classes[j] != own ? -INFINITY : row[j];
    } else {
#pragma omp simd
      for (int64_t j = 0; j < part.columns; j++) row[j] = groups[j] == group ? -INFINITY : row[j];
    }
  }
}

template <typename Word>
void logits(const InBatchParams& work, Part part, float* x, int64_t stride) {
  const int64_t words = work.d / Scratch<Word>::PER_WORD;
  multiply(static_cast<const Word*>(work.rows) + part.i * words, words, 1,
           static_cast<const Word*>(work.packed_c) + part.j * words, PANEL, words * PANEL,
           part.rows, (part.columns + PANEL - 1) / PANEL * PANEL, words, false, x, stride);
  if (work.bias) {
    for (int64_t i = 0; i < part.rows; i++)
#pragma omp simd
      for (int64_t j = 0; j < part.columns; j++) x[i * stride + j] += *work.bias;
  }
  exclude(work, part, x, stride);
  for (int64_t i = 0; i < part.rows; i++) {
    float* row = x + i * stride;
    std::fill(row + part.columns, row + filled_up(part.columns), -INFINITY);
  }
}

// The share of a tile, whose weights are in scratch, in the gradients.
template <typename Word>
void add_gradients(const InBatchParams& work, Part part, bool mirrored, Scratch<Word>& scratch) {
  constexpr int64_t PER_WORD = Scratch<Word>::PER_WORD;
  const int64_t d = work.d;
  auto words = [](int64_t numbers) { return (numbers + PER_WORD - 1) / PER_WORD; };
  if (work.grad_r) {
    multiply(scratch.weights(), scratch.weights_row(), 1,
             static_cast<const Word*>(work.packed_rows_of_c) + words(part.j) * PANEL, PANEL,
             words(work.m) * PANEL, part.rows, d, words(part.columns), true,
             work.grad_r + part.sums * d, d);
  }
  float* grad_c = mirrored ? work.grad_r : work.grad_c;
  if (grad_c) {
    multiply(scratch.weights_down(), 1, scratch.stride,
             static_cast<const Word*>(work.packed_rows_of_r) + words(part.i) * PANEL, PANEL,
             words(work.n) * PANEL, part.columns, d, words(part.rows), true, grad_c + part.j * d,
             d);
  }
}

// Everything that is to be done with a tile; `kept` is its part of what is kept.
template <typename Kind, typename Word>
void process(const InBatchParams& work, Part part, bool diagonal, KeptAs<Kind, Word>* kept,
             int64_t kept_stride, double* bias_sum, Scratch<Word>& scratch) {
  const bool adds = work.totals.rows, computes = adds || !kept;
  float* const x = scratch.tile;
  const int64_t stride = scratch.stride;
  if (computes) logits<Word>(work, part, x, stride);
  auto add = [&](auto* left, int64_t left_stride) {
    Kind::add(x, stride, part.rows, part.columns, work.margin,
              work.totals.from(part.sums, part.j, !diagonal), left, left_stride);
  };
  if (adds && kept)
    add(kept, kept_stride);
  else if (adds)
    add(x, stride);
  if (!work.coefficients.a) return;
  const double sum = kept   ? weigh<Kind, false>(work, part, kept, kept_stride, scratch)
                     : adds ? weigh<Kind, false>(work, part, x, stride, scratch)
                            : weigh<Kind, true>(work, part, x, stride, scratch);
  if (bias_sum) *bias_sum = sum;
  add_gradients(work, part, work.symmetric && !diagonal, scratch);
}

template <typename Kind, typename Word>
void go_over(const InBatchParams& all) {
  const InBatchParams given = all.from_first_row(all.d * sizeof(typename Scratch<Word>::Number));
  const Cut cut(given.n, given.m, given.symmetric);
  const Rounds rounds = cut.rounds;
  const bool several = rounds.copies > 1;
  RowSums sums(given, several ? rounds.copies : 0);
  const InBatchParams work = several ? sums.work() : given;
  std::vector<double> bias_sums(work.grad_bias ? rounds.all() : 0);
#pragma omp parallel if (work.n * work.m > PARALLEL_ELEMENTS)
  {
    Scratch<Word> scratch(cut.height, cut.width);
    if (several) {
#pragma omp for
      for (int64_t i = 0; i < work.n; i++) sums.clear(i);
    }
    for (int64_t round = 0; round < rounds.count(); round++) {
// so that most of a thread's next tile, and what it kept of it, is in its core's cache
#pragma omp for schedule(static)
      for (int64_t k = 0; k < rounds.tiles(round); k++) {
        const Tile tile = rounds.tile(round, k);
        if (tile.j >= rounds.columns) continue;
        const int64_t place = rounds.place(tile), i = tile.i * cut.height;
        const int64_t j = tile.j * cut.width, copy = tile.j % rounds.copies;
        const Part part = {i, j, std::min(cut.height, work.n - i), std::min(cut.width, work.m - j),
                           copy * work.n + i};
        auto* kept = static_cast<KeptAs<Kind, Word>*>(work.kept);
        process<Kind>(work, part, work.symmetric && i == j,
                      kept ? kept + place * cut.height * cut.width : nullptr, cut.width,
                      work.grad_bias ? &bias_sums[place] : nullptr, scratch);
      }
    }
    if (several) {
#pragma omp for
      for (int64_t i = 0; i < work.n; i++) sums.merge<Kind>(i);
    }
  }
  if (work.grad_bias) *work.grad_bias += std::accumulate(bias_sums.begin(), bias_sums.end(), 0.0);
}

}  // namespace

// How many numbers all tiles have.
extern "C" int64_t in_batch_elements(int64_t n, int64_t m, int64_t symmetric) {
  const Cut cut(n, m, symmetric);
  return cut.rounds.all() * cut.height * cut.width;
}

extern "C" void in_batch_pack_b(const uint32_t* from, int64_t rows, int64_t words, uint32_t* to) {
  pack_b(from, rows, words, to);
}

extern "C" void in_batch_pack_bt_float32(const float* from, int64_t rows, int64_t d, float* to) {
  pack_bt(from, rows, d, to);
}

extern "C" void in_batch_pack_bt_bfloat16(const bfloat16* from, int64_t rows, int64_t d,
                                          bfloat16* to) {
  pack_bt(from, rows, d, to);
}

#define IN_BATCH(WORD, NAME)                                             \
  extern "C" void in_batch_exp_##NAME(const InBatchParams* work) {       \
    go_over<Sums<Exponential>, WORD>(*work);                             \
  }                                                                      \
  extern "C" void in_batch_softplus_##NAME(const InBatchParams* work) {  \
    go_over<Sums<Softplus>, WORD>(*work);                                \
  }                                                                      \
  extern "C" void in_batch_hinge_##NAME(const InBatchParams* work) {     \
    go_over<Sums<Hinge>, WORD>(*work);                                   \
  }                                                                      \
  extern "C" void in_batch_logsumexp_##NAME(const InBatchParams* work) { \
    go_over<LogSumExp, WORD>(*work);                                     \
  }

IN_BATCH(float, float32)
#ifdef __AVX512BF16__
IN_BATCH(Pair, bfloat16)
#endif
