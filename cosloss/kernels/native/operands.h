// The operands of the in-batch engine's products, in words (products.h), of which d / PER_WORD make
// a row of length d.
//
// For logits, C "across": PANEL rows together, transposed, (m / PANEL, d / PER_WORD, PANEL). For
// gradients, R and C "down": PANEL columns together, as many rows as a word has numbers in a word,
// (d / PANEL, n / PER_WORD, PANEL). What is missing in the last panel or word is 0.

#pragma once

#include <algorithm>
#include <cstdint>

#include "memory.h"
#include "numbers.h"
#include "products.h"
#include "rows.h"

inline void pack_b(const uint32_t* from, int64_t rows, int64_t words, uint32_t* to) {
#pragma omp parallel for schedule(static) if (rows * words > PARALLEL_ELEMENTS)
  for (int64_t first = 0; first < rows; first += PANEL) {
    const int64_t own = std::min(PANEL, rows - first);
    for (int64_t k = 0; k < words; k++) {
      uint32_t* row = to + first * words + k * PANEL;
      for (int64_t j = 0; j < own; j++) row[j] = from[(first + j) * words + k];
      std::fill(row + own, row + PANEL, 0);
    }
  }
}

template <typename Number>
void pack_bt(const Number* from, int64_t rows, int64_t d, Number* to) {
  constexpr int64_t PER_WORD = 4 / sizeof(Number);
  const int64_t words = (rows + PER_WORD - 1) / PER_WORD;
#pragma omp parallel for schedule(static) if (rows * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < words * PER_WORD; i++) {
    const Number* row = from + i * d;
    for (int64_t panel = 0; panel < d; panel += PANEL) {
      Number* lane = to + panel * words * PER_WORD + i / PER_WORD * PER_WORD * PANEL + i % PER_WORD;
      for (int64_t k = 0; k < PANEL; k++) lane[k * PER_WORD] = i < rows ? row[panel + k] : Number{};
    }
  }
}

// A thread's tile of float32, and its weights as the two products of a gradient read them.
template <typename Word>
struct Scratch;

template <>
struct Scratch<float> {
  static constexpr int PER_WORD = 1;
  using Number = float;
  // not a multiple of a page: the tile's columns are read too
  const int64_t stride;
  float* const tile;

  Scratch(int64_t rows, int64_t columns)
      : stride(columns + 16), tile(thread_memory<Scratch, float>(rows * stride)) {}

  // Where the weights of row i go; they may take the place of what is there.
  struct Row {
    float* at;
    void put(int64_t j, const Vector (&weights)[1]) const { store(weights[0], at + j); }
  };
  Row row(int64_t i) { return {tile + i * stride}; }

  const float* weights() const { return tile; }
  int64_t weights_row() const { return stride; }
  const float* weights_down() const { return tile; }
};

#ifdef __AVX512BF16__
template <>
struct Scratch<Pair> {
  static constexpr int PER_WORD = 2;
  using Number = bfloat16;
  const int64_t stride;
  float* const tile;
  Pair *const pairs, *const pairs_down;  // of columns, and of rows

  Scratch(int64_t rows, int64_t columns)
      : stride(columns + 16),
        tile(thread_memory<Scratch, float>(rows * stride)),
        pairs(thread_memory<Pair, Pair>((rows + 1) * stride)),
        pairs_down(pairs + (rows + 1) * stride / 2) {}

  // Where the weights of rows i and i + 1 go, or of row i alone, the last.
  struct Row {
    bfloat16 *first, *second;
    Pair* down;

    void put(int64_t j, const Vector (&weights)[2]) const {
      const auto both = __m512i(_mm512_cvtne2ps_pbh(__m512(weights[1]), __m512(weights[0])));
      const __m256i halves[] = {_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1)};
      std::memcpy(first + j, &halves[0], sizeof halves[0]);
      std::memcpy(second + j, &halves[1], sizeof halves[1]);
      // lane k has number k of the first row and, above it, of the second
      const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const __m512i paired = _mm512_permutexvar_epi16(__m512i(lane | (lane + 16) << 16), both);
      std::memcpy(down + j, &paired, sizeof paired);
    }
    void put(int64_t j, const Vector (&weights)[1]) const { put(j, {weights[0], Vector{}}); }
  };
  Row row(int64_t i) {
    Pair* at = pairs + i * weights_row();
    return {reinterpret_cast<bfloat16*>(at), reinterpret_cast<bfloat16*>(at + weights_row()),
            pairs_down + i / 2 * stride};
  }

  const Pair* weights() const { return pairs; }
  int64_t weights_row() const { return stride / 2; }
  const Pair* weights_down() const { return pairs_down; }
};
#endif
