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
#include <type_traits>
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

// Columns of R and C: all of them, or those that a prefix has and the one before has not.
struct Segment {
  int64_t begin, end;
};

// Write a tile of logits to x, on top of what is there if `add`.
template <typename Word>
void logits(const InBatchParams& params, TileBounds part, Segment of, bool add, float* x,
            int64_t stride) {
  constexpr int64_t PER_WORD = Scratch<Word>::PER_WORD;
  const int64_t words = params.d / PER_WORD, begin = of.begin / PER_WORD;
  gemm(static_cast<const Word*>(params.rows) + part.i * words + begin, words, 1,
       static_cast<const Word*>(params.packed_c) + part.j * words + begin * PANEL, PANEL,
       words * PANEL, part.rows, (part.columns + PANEL - 1) / PANEL * PANEL,
       (of.end - of.begin) / PER_WORD, add, x, stride);
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

// Add a tile's share to the gradients on those columns; its d_logits are in scratch.
template <typename Word>
void add_gradients(const InBatchParams& params, TileBounds part, Segment of, bool symmetric,
                   Scratch<Word>& scratch) {
  constexpr int64_t PER_WORD = Scratch<Word>::PER_WORD;
  const int64_t d = params.d, count = of.end - of.begin;
  auto words = [](int64_t numbers) { return (numbers + PER_WORD - 1) / PER_WORD; };
  if (params.grad_r) {
    gemm(scratch.d_logits(), scratch.d_logits_stride(), 1,
         static_cast<const Word*>(params.packed_rows_of_c) + of.begin * words(params.m) +
             words(part.j) * PANEL,
         PANEL, words(params.m) * PANEL, part.rows, count, words(part.columns), true,
         params.grad_r + part.sums * d + of.begin, d);
  }
  float* grad_c = symmetric ? params.grad_r : params.grad_c;
  if (grad_c) {
    gemm(scratch.d_logits_t(), 1, scratch.stride,
         static_cast<const Word*>(params.packed_rows_of_r) + of.begin * words(params.n) +
             words(part.i) * PANEL,
         PANEL, words(params.n) * PANEL, part.columns, count, words(part.rows), true,
         grad_c + part.j * d + of.begin, d);
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
  const Segment whole = {0, params.d};
  if (computes) logits<Word>(params, part, whole, false, x, stride);
  auto add = [&](auto* stash, int64_t stash_stride) {
    Kind::add(x, stride, part.rows, part.columns, params.margin,
              params.stats.from(part.sums, part.j, !diagonal), stash, stash_stride);
  };
  if (adds && kept)
    add(kept, kept_stride);
  else if (adds)
    add(x, stride);
  if (!params.loss_grads.d_rows) return;
  const double sum =
      kept   ? d_logits_of<Kind, false>(params, part, kept, kept_stride, scratch, Alone())
      : adds ? d_logits_of<Kind, false>(params, part, x, stride, scratch, Alone())
             : d_logits_of<Kind, true>(params, part, x, stride, scratch, Alone());
  if (bias_sum) *bias_sum = sum;
  add_gradients(params, part, whole, params.symmetric && !diagonal, scratch);
}

// x = links_i links_j (from - bias) for a tile of masked logits `from`, all of whose masked pairs
// are masked again.
void scale_logits(const InBatchParams& prefix, TileBounds part, const float* from, float* x,
                  int64_t stride) {
  const float bias = prefix.bias ? *prefix.bias : 0;
  const float* links = prefix.column_links + part.j;
  for (int64_t i = 0; i < part.rows; i++) {
    const float link = prefix.row_links[part.i + i];
#pragma omp simd
    for (int64_t j = 0; j < part.columns; j++)
      x[i * stride + j] = link * links[j] * (from[i * stride + j] - bias);
  }
}

struct PrefixLogits;  // a thread's memory
struct PrefixGradients;

// All work on one tile of every prefix; `kept`: where their logits are kept, if they are. Their
// products are shared: a prefix's logits are those of the one before and a segment's, and a
// segment's gradients are those of all prefixes that have it.
template <typename Kind, typename Word>
void run_prefixes(const InBatchParams& params, TileBounds part, bool diagonal, float* kept,
                  int64_t height, int64_t kept_stride, double* bias_sum, Scratch<Word>& scratch) {
  const bool adds = params.stats.rows, computes = adds || !kept;
  const int64_t size = height * kept_stride;
  float* const all =
      kept ? kept
           : thread_memory<PrefixLogits, float>(params.prefixes * LARGEST_BLOCK * LARGEST_BLOCK);
  auto segment = [&](int64_t k) { return Segment{k ? params.ends[k - 1] : 0, params.ends[k]}; };
  for (int64_t k = 0; computes && k < params.prefixes; k++) {
    const InBatchParams prefix = params.of_prefix(k);
    float* const x = all + k * size;
    if (k) scale_logits(prefix, part, x - size, x, kept_stride);
    logits<Word>(prefix, part, segment(k), k > 0, x, kept_stride);
    if (!adds) continue;
    // an lse leaves its stash, the logits, where they are; that of a sum is not needed
    constexpr bool IS_LOGITS = std::is_same_v<Kind, LogSumExp>;
    Kind::add(x, kept_stride, part.rows, part.columns, prefix.margin,
              prefix.stats.from(part.sums, part.j, !diagonal), IS_LOGITS ? x : scratch.tile,
              IS_LOGITS ? kept_stride : scratch.stride);
  }
  if (!params.loss_grads.d_rows) return;
  float* const g = thread_memory<PrefixGradients, float>(LARGEST_BLOCK * LARGEST_BLOCK);
  double sum = 0;
  for (int64_t k = params.prefixes - 1; k >= 0; k--) {
    const InBatchParams prefix = params.of_prefix(k);
    Nested nested(prefix, part, diagonal, k == params.prefixes - 1, g, kept_stride);
    sum += d_logits_of<Kind, true, float, Word, Nested&>(prefix, part, all + k * size, kept_stride,
                                                         scratch, nested);
    nested.end_tile();
    add_gradients(prefix, part, segment(k), params.symmetric && !diagonal, scratch);
  }
  if (bias_sum) *bias_sum = sum;
}

template <typename Kind, typename Word>
void run(const InBatchParams& all) {
  const InBatchParams given = all.from_first_row(all.d * sizeof(typename Scratch<Word>::Number));
  const Tiling tiling(given.n, given.m, given.symmetric, given.prefixes);
  const TileSchedule schedule = tiling.schedule;
  const int64_t area = tiling.height * tiling.width;
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
        const bool diagonal = params.symmetric && i == j;
        double* const bias_sum = params.grad_bias ? &bias_sums[index] : nullptr;
        if (params.prefixes) {
          auto* kept = static_cast<float*>(params.kept);
          run_prefixes<Kind>(params, part, diagonal,
                             kept ? kept + index * params.prefixes * area : nullptr, tiling.height,
                             tiling.width, bias_sum, scratch);
        } else {
          auto* kept = static_cast<StashOf<Kind, Word>*>(params.kept);
          run_tile<Kind>(params, part, diagonal, kept ? kept + index * area : nullptr, tiling.width,
                         bias_sum, scratch);
        }
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

// The number of elements of all tiles, of every prefix if there are several.
extern "C" int64_t in_batch_elements(int64_t n, int64_t m, int64_t symmetric, int64_t prefixes) {
  const Tiling tiling(n, m, symmetric, prefixes);
  const int64_t all = tiling.schedule.all() * tiling.height * tiling.width;
  return prefixes ? prefixes * all : all;
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
