// The order in which a matrix's blocks are gone through: rounds of tiles, no two of which in a
// round share a column or a copy of a row. Threads that each take tiles of one round never add to
// the same sum, and what is added to a sum comes in the order of the rounds, whatever thread adds
// it.

#pragma once

#include <algorithm>
#include <cstdint>

struct Tile {
  int64_t i, j;  // blocks of rows and of columns
};

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
