// How a matrix is cut into tiles, in which order they run, and sums that are split over columns.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gemm.h"
#include "params.h"

constexpr int64_t SMALLEST_BLOCK = 64, LARGEST_BLOCK = 256;  // rows or columns of a tile
constexpr int64_t MIN_PARALLEL_TILES = 8;                    // in a round, for as many threads
constexpr int64_t SKINNY_RATIO = 4;  // columns per row from which a row's sums are split

// A tile's block of rows and block of columns.
struct Tile {
  int64_t i, j;
};

// Rounds of tiles: no two of a round add to the same sums, so that its threads never meet, and
// every sum is added up in the order of the rounds, whatever thread does it.
//
// A symmetric matrix has only the blocks on and above the diagonal: first the diagonal itself, then
// every pair of blocks once, as in a round-robin tournament.
struct TileSchedule {
  int64_t rows, columns;  // how many blocks
  bool symmetric;
  // partial sums of each row, unless symmetric; block j of the columns adds to number j % splits
  int64_t splits;

  int64_t count() const {
    return symmetric ? 1 + (rows > 1 ? odd() : 0) : std::max(rows, groups());
  }

  int64_t tiles(int64_t round) const {
    if (!symmetric) return std::min(rows, groups()) * splits;
    return round == 0 ? rows : rows / 2;
  }

  // A tile's blocks; its column may be beyond the last where splits do not divide their number.
  Tile tile(int64_t round, int64_t k) const {
    if (!symmetric) {
      const int64_t one = k / splits, split = k % splits;
      if (rows <= groups()) return {one, (one + round) % groups() * splits + split};
      return {(one + round) % rows, one * splits + split};
    }
    if (round == 0) return {k, k};
    const int64_t last = rows - 1, turn = round - 1;
    if (k == odd() / 2) return {turn, last};  // an even number of blocks: the last stays in place
    const int64_t one = (turn + k + 1) % odd(), other = (turn - k - 1 + odd()) % odd();
    return {std::min(one, other), std::max(one, other)};
  }

  // The tile's number among all.
  int64_t index(Tile tile) const {
    return symmetric ? tile.j * (tile.j + 1) / 2 + tile.i : tile.i * columns + tile.j;
  }

  int64_t all() const { return symmetric ? rows * (rows + 1) / 2 : rows * columns; }

 private:
  // A group is as many blocks of columns as there are splits.
  int64_t groups() const { return (columns + splits - 1) / splits; }

  int64_t odd() const { return rows % 2 ? rows : rows - 1; }
};

// Rows of a block: MIN_PARALLEL_TILES of them in a round, unless that makes them too small.
inline int64_t block_of(int64_t n, bool symmetric) {
  const int64_t blocks = symmetric ? 2 * MIN_PARALLEL_TILES : MIN_PARALLEL_TILES;
  const int64_t size = std::clamp((n + blocks - 1) / blocks, SMALLEST_BLOCK, LARGEST_BLOCK);
  return (size + PANEL - 1) / PANEL * PANEL;
}

// The size of a matrix's tiles, and their schedule.
struct Tiling {
  int64_t height, width;
  TileSchedule schedule;

  Tiling(int64_t n, int64_t m, bool symmetric, int64_t prefixes)
      : height(block_of(n, symmetric)), width(block_of(m, symmetric)) {
    // a skinny matrix gets its parallel tiles from split sums, not from low tiles
    const bool skinny = !symmetric && !prefixes && SKINNY_RATIO * n <= m;
    if (skinny) height = std::min((n + PANEL - 1) / PANEL * PANEL, LARGEST_BLOCK);
    const int64_t rows = (n + height - 1) / height, columns = (m + width - 1) / width;
    const int64_t splits = skinny ? std::clamp<int64_t>(MIN_PARALLEL_TILES / rows, 1, columns) : 1;
    schedule = {rows, columns, symmetric, splits};
  }
};

// A tile's first row and column, and how many of each; its rows' sums are those from `sums` on.
struct TileBounds {
  int64_t i, j, rows, columns, sums;
};

// The rows' statistics and gradients in `splits` partial sums, (splits, n) of each.
class SplitSums {
 public:
  SplitSums(const InBatchParams& params, int64_t splits) : params_(params), splits_(splits) {
    const int64_t all = splits * params.n;
    if (params.stats.rows) stats_.resize(all);
    if (params.stats.row_max) largest_.resize(all);
    if (params.grad_r) grad_ = thread_memory<SplitSums, float>(all * params.d);
  }

  // The parameters of a run that adds to the partial sums.
  InBatchParams params() {
    InBatchParams own = params_;
    if (own.stats.rows) own.stats.rows = stats_.data();
    if (own.stats.row_max) own.stats.row_max = largest_.data();
    own.grad_r = grad_;
    return own;
  }

  void clear(int64_t i) {
    for (int64_t row = i; row < splits_ * params_.n; row += params_.n) {
      if (params_.stats.row_max) largest_[row] = params_.stats.row_max[i];
      if (params_.grad_r) std::fill_n(&grad_[row * params_.d], params_.d, 0.f);
    }
  }

  template <typename Kind>
  void merge(int64_t i) {
    for (int64_t first = 0; first < splits_ * params_.n; first += params_.n) {
      if (params_.stats.rows) Kind::merge(params_.stats, params().stats.from(first, 0, false), i);
      if (!params_.grad_r) continue;
      const float* from = &grad_[(first + i) * params_.d];
      float* to = params_.grad_r + i * params_.d;
#pragma omp simd
      for (int64_t k = 0; k < params_.d; k++) to[k] += from[k];
    }
  }

 private:
  const InBatchParams& params_;
  const int64_t splits_;
  std::vector<double> stats_, largest_;
  float* grad_ = nullptr;
};
