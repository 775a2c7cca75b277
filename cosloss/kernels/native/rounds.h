// How a matrix is cut into tiles, and the order in which they are gone through.

#pragma once

#include <algorithm>
#include <cstdint>

#include "products.h"

constexpr int64_t SMALLEST_BLOCK = 64, LARGEST_BLOCK = 256;  // rows or columns of a tile
constexpr int64_t TOGETHER = 8, FEW = 4;

struct Tile {
  int64_t i, j;  // blocks of rows and of columns
};

// Rounds of tiles, no two of which in a round share a column or a copy of a row. Threads that each
// take tiles of one round never add to the same sum, and what is added to a sum comes in the order
// of the rounds, whatever thread adds it.
//
// Of a symmetric matrix, the blocks on and above the diagonal: first the diagonal, then every pair
// of blocks once, as in a tournament where in a round each plays one other.
struct Rounds {
  int64_t rows, columns;  // how many blocks
  bool symmetric;
  // of what is added up along a row, if not symmetric: block j of the columns adds to j % copies
  int64_t copies;

  int64_t count() const {
    return symmetric ? 1 + (rows > 1 ? odd() : 0) : std::max(rows, groups());
  }

  int64_t tiles(int64_t round) const {
    if (!symmetric) return std::min(rows, groups()) * copies;
    return round == 0 ? rows : rows / 2;
  }

  // Beyond the columns there are tiles too, where copies do not divide their number.
  Tile tile(int64_t round, int64_t k) const {
    if (!symmetric) {
      const int64_t one = k / copies, copy = k % copies;
      if (rows <= groups()) return {one, (one + round) % groups() * copies + copy};
      return {(one + round) % rows, one * copies + copy};
    }
    if (round == 0) return {k, k};
    const int64_t last = rows - 1, turn = round - 1;
    if (k == odd() / 2) return {turn, last};  // an even number of blocks: the last stays in place
    const int64_t one = (turn + k + 1) % odd(), other = (turn - k - 1 + odd()) % odd();
    return {std::min(one, other), std::max(one, other)};
  }

  // Where the tile is among all.
  int64_t place(Tile tile) const {
    return symmetric ? tile.j * (tile.j + 1) / 2 + tile.i : tile.i * columns + tile.j;
  }

  int64_t all() const { return symmetric ? rows * (rows + 1) / 2 : rows * columns; }

 private:
  // Blocks of columns, one for each copy, are a group.
  int64_t groups() const { return (columns + copies - 1) / copies; }

  int64_t odd() const { return rows % 2 ? rows : rows - 1; }
};

// Rows of a block: so that TOGETHER tiles make a round, if that leaves them large enough.
inline int64_t block_of(int64_t n, bool symmetric) {
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
