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
#include <type_traits>
#include <vector>

#include "memory.h"
#include "operands.h"
#include "products.h"
#include "rounds.h"
#include "rows.h"
#include "totals.h"

namespace {

constexpr int64_t SMALLEST_BLOCK = 64, TOGETHER = 8, FEW = 4;

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

// Rows of a block: so that TOGETHER tiles make a round, if that leaves them large enough.
int64_t block_of(int64_t n, bool symmetric) {
  const int64_t blocks = symmetric ? 2 * TOGETHER : TOGETHER;
  const int64_t size = std::clamp((n + blocks - 1) / blocks, SMALLEST_BLOCK, LARGEST_BLOCK);
  return (size + PANEL - 1) / PANEL * PANEL;
}

// How a matrix is cut into tiles.
struct Cut {
  int64_t height, width;
  Rounds rounds;

  Cut(int64_t n, int64_t m, bool symmetric)
      : height(block_of(n, symmetric)), width(block_of(m, symmetric)) {
    // few rows need no low tiles to make a round, but copies of their sums
    const bool few = !symmetric && FEW * n <= m;
    if (few) height = std::min((n + PANEL - 1) / PANEL * PANEL, LARGEST_BLOCK);
    const int64_t rows = (n + height - 1) / height, columns = (m + width - 1) / width;
    const int64_t copies = few ? std::clamp<int64_t>(TOGETHER / rows, 1, columns) : 1;
    rounds = {rows, columns, symmetric, copies};
  }
};

template <typename Kind, typename Word>
using KeptAs = typename Kind::template KeptAs<typename Scratch<Word>::Number>;

// The part of a matrix that a tile is: its first row and column, and how many of each. What is
// added up along its rows goes to the sums from row `sums` on.
struct Part {
  int64_t i, j, rows, columns, sums;
};

void exclude(const Work& work, Part part, float* x, int64_t stride) {
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
void logits(const Work& work, Part part, float* x, int64_t stride) {
  const int64_t words = work.d / Scratch<Word>::PER_WORD;
  multiply(static_cast<const Word*>(work.rows) + part.i * words, words, 1,
           static_cast<const Word*>(work.across) + part.j * words, PANEL, words * PANEL, part.rows,
           (part.columns + PANEL - 1) / PANEL * PANEL, words, false, x, stride);
  if (work.bias) {
    for (int64_t i = 0; i < part.rows; i++)
#pragma omp simd
      for (int64_t j = 0; j < part.columns; j++) x[i * stride + j] += *work.bias;
  }
  exclude(work, part, x, stride);
}

template <typename T>
void keep(const float* x, int64_t stride, Part part, T* kept, int64_t kept_stride) {
  for (int64_t i = 0; i < part.rows; i++)
    narrow_all(x + i * stride, part.columns, kept + i * kept_stride);
}

double sum(const float* x, int64_t stride, Part part) {
  double total = 0;
  for (int64_t i = 0; i < part.rows; i++) {
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t j = 0; j < part.columns; j++) along += x[i * stride + j];
    total += along;
  }
  return total;
}

// The share of a tile, whose weights are in scratch, in the gradients.
template <typename Word>
void add_gradients(const Work& work, Part part, bool mirrored, Scratch<Word>& scratch) {
  constexpr int64_t PER_WORD = Scratch<Word>::PER_WORD;
  const int64_t d = work.d;
  auto words = [](int64_t numbers) { return (numbers + PER_WORD - 1) / PER_WORD; };
  scratch.narrow_weights(part.rows, part.columns);
  if (work.grad_r) {
    multiply(scratch.weights(), scratch.weights_row(), 1,
             static_cast<const Word*>(work.down_c) + words(part.j) * PANEL, PANEL,
             words(work.m) * PANEL, part.rows, d, words(part.columns), true,
             work.grad_r + part.sums * d, d);
  }
  float* grad_c = mirrored ? work.grad_r : work.grad_c;
  if (grad_c) {
    multiply(scratch.weights_down(), 1, scratch.stride,
             static_cast<const Word*>(work.down_r) + words(part.i) * PANEL, PANEL,
             words(work.n) * PANEL, part.columns, d, words(part.rows), true, grad_c + part.j * d,
             d);
  }
}

// Everything that is to be done with a tile; `kept` is its part of what is kept.
template <typename Kind, typename Word>
void process(const Work& work, Part part, bool diagonal, KeptAs<Kind, Word>* kept,
             int64_t kept_stride, double* bias_sum, Scratch<Word>& scratch) {
  constexpr bool KEPT_AS_COMPUTED = std::is_same_v<KeptAs<Kind, Word>, float>;
  const bool adds = work.totals.rows, computes = adds || !kept;
  float *const weights = scratch.tile, *x = weights;
  int64_t stride = scratch.stride;
  if constexpr (KEPT_AS_COMPUTED) {
    if (kept && adds) x = kept, stride = kept_stride;
  }
  if (computes) logits<Word>(work, part, x, stride);
  if (adds) {
    Kind::add(x, stride, part.rows, part.columns, work.margin,
              work.totals.from(part.sums, part.j, !diagonal));
  } else if (computes) {
    Kind::again(x, stride, part.rows, part.columns, work.margin);
  }
  if constexpr (!KEPT_AS_COMPUTED) {
    if (kept && adds) keep(x, stride, part, kept, kept_stride);
  }
  if (!work.coefficients.a) return;
  const CoefficientsOf coefficients = work.coefficients.from(part.i, part.j);
  if (computes) {
    Kind::weigh(x, stride, part.rows, part.columns, coefficients, weights, scratch.stride);
  } else {
    Kind::weigh(kept, kept_stride, part.rows, part.columns, coefficients, weights, scratch.stride);
  }
  if (bias_sum) *bias_sum = sum(weights, scratch.stride, part);
  add_gradients(work, part, work.symmetric && !diagonal, scratch);
}

// Copies of what is added up along the rows, (copies, n) of each, where there are several.
class RowSums {
 public:
  RowSums(const Work& work, int64_t copies) : work_(work), copies_(copies) {
    const int64_t all = copies * work.n;
    if (work.totals.rows) totals_.resize(all);
    if (work.totals.row_largest) largest_.resize(all);
    if (work.grad_r) grad_ = thread_memory<RowSums, float>(all * work.d);
  }

  // The work that adds to them.
  Work work() {
    Work own = work_;
    if (own.totals.rows) own.totals.rows = totals_.data();
    if (own.totals.row_largest) own.totals.row_largest = largest_.data();
    own.grad_r = grad_;
    return own;
  }

  void clear(int64_t i) {
    for (int64_t row = i; row < copies_ * work_.n; row += work_.n) {
      if (work_.totals.row_largest) largest_[row] = work_.totals.row_largest[i];
      if (work_.grad_r) std::fill_n(&grad_[row * work_.d], work_.d, 0.f);
    }
  }

  template <typename Kind>
  void merge(int64_t i) {
    for (int64_t first = 0; first < copies_ * work_.n; first += work_.n) {
      if (work_.totals.rows) Kind::merge(work_.totals, work().totals.from(first, 0, false), i);
      if (!work_.grad_r) continue;
      const float* from = &grad_[(first + i) * work_.d];
      float* to = work_.grad_r + i * work_.d;
#pragma omp simd
      for (int64_t k = 0; k < work_.d; k++) to[k] += from[k];
    }
  }

 private:
  const Work& work_;
  const int64_t copies_;
  std::vector<double> totals_, largest_;
  float* grad_ = nullptr;
};

template <typename Kind, typename Word>
void go_over(const Work& given) {
  const Cut cut(given.n, given.m, given.symmetric);
  const Rounds rounds = cut.rounds;
  const bool several = rounds.copies > 1;
  RowSums sums(given, several ? rounds.copies : 0);
  const Work work = several ? sums.work() : given;
  std::vector<double> bias_sums(work.grad_bias ? rounds.all() : 0);
#pragma omp parallel if (work.n * work.m > PARALLEL_ELEMENTS)
  {
    Scratch<Word> scratch(cut.height, cut.width);
    if (several) {
#pragma omp for
      for (int64_t i = 0; i < work.n; i++) sums.clear(i);
    }
    for (int64_t round = 0; round < rounds.count(); round++) {
#pragma omp for schedule(dynamic)
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

extern "C" void in_batch_across(const uint32_t* from, int64_t rows, int64_t words, uint32_t* to) {
  across(from, rows, words, to);
}

extern "C" void in_batch_down_float32(const float* from, int64_t rows, int64_t d, float* to) {
  down(from, rows, d, to);
}

extern "C" void in_batch_down_bfloat16(const bfloat16* from, int64_t rows, int64_t d,
                                       bfloat16* to) {
  down(from, rows, d, to);
}

#define IN_BATCH(WORD, NAME)                                                                     \
  extern "C" void in_batch_exp_##NAME(const Work* work) {                                        \
    go_over<Sums<Exponential>, WORD>(*work);                                                     \
  }                                                                                              \
  extern "C" void in_batch_softplus_##NAME(const Work* work) {                                   \
    go_over<Sums<Softplus>, WORD>(*work);                                                        \
  }                                                                                              \
  extern "C" void in_batch_hinge_##NAME(const Work* work) { go_over<Sums<Hinge>, WORD>(*work); } \
  extern "C" void in_batch_logsumexp_##NAME(const Work* work) { go_over<LogSumExp, WORD>(*work); }

IN_BATCH(float, float32)
#ifdef __AVX512BF16__
IN_BATCH(Pair, bfloat16)
#endif
