// The statistics of a logit matrix and the gradients through it, tile by tile.
//
// Rows R (n, d), columns C (m, d), logits X = R C^T + bias. In a symmetric matrix C is R, and the
// tiles above the diagonal stand for those below. A run does what its parameters ask for:
//
//     for each round of the schedule:
//       for each tile [i, j] of the round, in parallel:
//         if statistics are asked for, or no tiles are kept:  x = R[i] C[j]^T + bias, masked
//         if statistics are asked for:  add f(x) to the rows' and columns'; stash f'(x)
//         if gradients are asked for:
//           d = d_logits of the stash, or of x
//           grad_R[i] += d C[j]
//           grad_C[j] += d^T R[i], which is grad_R[j] in a symmetric matrix
//           grad_bias += sum of d
//
// No two tiles of a round add to the same sum: the bits do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "criteria.h"
#include "gemm.h"
#include "params.h"
#include "rows.h"
#include "tiles.h"

namespace {

template <typename Kind, typename Word>
using StashOf = typename Kind::template Stash<typename Scratch<Word>::Number>;

void mask_beyond_limits(const InBatchParams& params, TileBounds part, float* x, int64_t stride) {
  const float* of_columns = params.column_limits;
  for (int64_t i = 0; i < part.rows; i++) {
    float* row = x + i * stride;
    const float of_row = params.row_limits ? params.row_limits[part.i + i] : INFINITY;
#pragma omp simd
    for (int64_t j = 0; j < part.columns; j++) {
      const float limit = of_columns ? std::min(of_row, of_columns[part.j + j]) : of_row;
      row[j] = row[j] > limit ? -INFINITY : row[j];
    }
  }
}

void mask_pairs(const InBatchParams& params, TileBounds part, float* x, int64_t stride) {
  for (int64_t k = 0; k < params.diagonals; k++) {
    const int64_t ahead = params.first_row + part.i + params.offsets[k] - part.j;
    const int64_t first = std::max<int64_t>(0, -ahead);
    const int64_t last = std::min(part.rows, part.columns - ahead);
    for (int64_t i = first; i < last; i++) x[i * stride + i + ahead] = -INFINITY;
  }
  if (params.row_limits || params.column_limits) mask_beyond_limits(params, part, x, stride);
  if (!params.row_groups) return;
  const int64_t* groups = params.column_groups + part.j;
  for (int64_t i = 0; i < part.rows; i++) {
    float* row = x + i * stride;
    const int64_t group = params.row_groups[part.i + i];
    if (params.row_classes) {
      const int64_t own = params.row_classes[part.i + i], *classes = params.column_classes + part.j;
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
void logits(const InBatchParams& params, TileBounds part, float* x, int64_t stride) {
  const int64_t words = params.d / Scratch<Word>::PER_WORD;
  gemm(static_cast<const Word*>(params.rows) + part.i * words, words, 1,
       static_cast<const Word*>(params.packed_c) + part.j * words, PANEL, words * PANEL, part.rows,
       (part.columns + PANEL - 1) / PANEL * PANEL, words, false, x, stride);
  if (params.bias) {
    for (int64_t i = 0; i < part.rows; i++)
#pragma omp simd
      for (int64_t j = 0; j < part.columns; j++) x[i * stride + j] += *params.bias;
  }
  mask_pairs(params, part, x, stride);
  for (int64_t i = 0; i < part.rows; i++) {
    float* row = x + i * stride;
    std::fill(row + part.columns, row + round_up(part.columns), -INFINITY);
  }
}

// Add a tile's share to the gradients; its d_logits are in scratch.
template <typename Word>
void add_gradients(const InBatchParams& params, TileBounds part, bool symmetric,
                   Scratch<Word>& scratch) {
  constexpr int64_t PER_WORD = Scratch<Word>::PER_WORD;
  const int64_t d = params.d;
  auto words = [](int64_t numbers) { return (numbers + PER_WORD - 1) / PER_WORD; };
  if (params.grad_r) {
    gemm(scratch.d_logits(), scratch.d_logits_stride(), 1,
         static_cast<const Word*>(params.packed_rows_of_c) + words(part.j) * PANEL, PANEL,
         words(params.m) * PANEL, part.rows, d, words(part.columns), true,
         params.grad_r + part.sums * d, d);
  }
  float* grad_c = symmetric ? params.grad_r : params.grad_c;
  if (grad_c) {
    gemm(scratch.d_logits_t(), 1, scratch.stride,
         static_cast<const Word*>(params.packed_rows_of_r) + words(part.i) * PANEL, PANEL,
         words(params.n) * PANEL, part.columns, d, words(part.rows), true, grad_c + part.j * d, d);
  }
}

// All work on one tile; `kept`: where its stash is kept, if it is.
template <typename Kind, typename Word>
void run_tile(const InBatchParams& params, TileBounds part, bool diagonal,
              StashOf<Kind, Word>* kept, int64_t kept_stride, double* bias_sum,
              Scratch<Word>& scratch) {
  const bool adds = params.stats.rows, computes = adds || !kept;
  float* const x = scratch.tile;
  const int64_t stride = scratch.stride;
  if (computes) logits<Word>(params, part, x, stride);
  auto add = [&](auto* stash, int64_t stash_stride) {
    Kind::add(x, stride, part.rows, part.columns, params.margin,
              params.stats.from(part.sums, part.j, !diagonal), stash, stash_stride);
  };
  if (adds && kept)
    add(kept, kept_stride);
  else if (adds)
    add(x, stride);
  if (!params.loss_grads.d_rows) return;
  const double sum = kept   ? d_logits_of<Kind, false>(params, part, kept, kept_stride, scratch)
                     : adds ? d_logits_of<Kind, false>(params, part, x, stride, scratch)
                            : d_logits_of<Kind, true>(params, part, x, stride, scratch);
  if (bias_sum) *bias_sum = sum;
  add_gradients(params, part, params.symmetric && !diagonal, scratch);
}

template <typename Kind, typename Word>
void run(const InBatchParams& all) {
  const InBatchParams given = all.from_first_row(all.d * sizeof(typename Scratch<Word>::Number));
  const Tiling tiling(given.n, given.m, given.symmetric);
  const TileSchedule schedule = tiling.schedule;
  const bool several = schedule.splits > 1;
  SplitSums sums(given, several ? schedule.splits : 0);
  const InBatchParams params = several ? sums.params() : given;
  std::vector<double> bias_sums(params.grad_bias ? schedule.all() : 0);
#pragma omp parallel if (params.n * params.m > PARALLEL_ELEMENTS)
  {
    Scratch<Word> scratch(tiling.height, tiling.width);
    if (several) {
#pragma omp for
      for (int64_t i = 0; i < params.n; i++) sums.clear(i);
    }
    for (int64_t round = 0; round < schedule.count(); round++) {
// static: most of a thread's next tile, and of the stash it kept, is in its core's cache
#pragma omp for schedule(static)
      for (int64_t k = 0; k < schedule.tiles(round); k++) {
        const Tile tile = schedule.tile(round, k);
        if (tile.j >= schedule.columns) continue;
        const int64_t index = schedule.index(tile), i = tile.i * tiling.height;
        const int64_t j = tile.j * tiling.width, split = tile.j % schedule.splits;
        const TileBounds part = {i, j, std::min(tiling.height, params.n - i),
                                 std::min(tiling.width, params.m - j), split * params.n + i};
        auto* kept = static_cast<StashOf<Kind, Word>*>(params.kept);
        run_tile<Kind>(params, part, params.symmetric && i == j,
                       kept ? kept + index * tiling.height * tiling.width : nullptr, tiling.width,
                       params.grad_bias ? &bias_sums[index] : nullptr, scratch);
      }
    }
    if (several) {
#pragma omp for
      for (int64_t i = 0; i < params.n; i++) sums.merge<Kind>(i);
    }
  }
  if (params.grad_bias)
    *params.grad_bias += std::accumulate(bias_sums.begin(), bias_sums.end(), 0.0);
}

}  // namespace

// The number of elements of all tiles.
extern "C" int64_t in_batch_elements(int64_t n, int64_t m, int64_t symmetric) {
  const Tiling tiling(n, m, symmetric);
  return tiling.schedule.all() * tiling.height * tiling.width;
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

#define IN_BATCH(WORD, NAME)                                               \
  extern "C" void in_batch_exp_##NAME(const InBatchParams* params) {       \
    run<Sums<Exponential>, WORD>(*params);                                 \
  }                                                                        \
  extern "C" void in_batch_softplus_##NAME(const InBatchParams* params) {  \
    run<Sums<Softplus>, WORD>(*params);                                    \
  }                                                                        \
  extern "C" void in_batch_hinge_##NAME(const InBatchParams* params) {     \
    run<Sums<Hinge>, WORD>(*params);                                       \
  }                                                                        \
  extern "C" void in_batch_logsumexp_##NAME(const InBatchParams* params) { \
    run<LogSumExp, WORD>(*params);                                         \
  }

IN_BATCH(float, float32)
#ifdef __AVX512BF16__
IN_BATCH(Pair, bfloat16)
#endif
