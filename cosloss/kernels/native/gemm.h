// Matrix products in blocks of vector registers, and the packing of their operands.
//
// A word is one lane's factor: a float, or two bfloat16 whose products are both added; a row of
// length d has d / PER_WORD words. Sums are float32, and every element of a result is added up in
// the order of the depth.
//
// Packing, as in BLIS: for logits, C goes by pack_b into panels of PANEL rows, each transposed,
// (m / PANEL, d / PER_WORD, PANEL). For gradients, R and C go by pack_bt into panels of PANEL
// columns, with as many rows in a word as it has numbers, (d / PANEL, n / PER_WORD, PANEL). The
// last panel and word are filled up with zeros.

#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "simd.h"

constexpr int64_t PANEL = 32;  // columns that are packed together
constexpr int64_t KC = 512;    // words of depth at once
// columns and rows of the micro-kernel: as many as there are registers for
constexpr int NR = 2 * LANES, MR = LANES == 16 ? 8 : 6;

struct Pair {
  uint32_t bits;
};

inline Vector load(const Pair* from) { return load(reinterpret_cast<const float*>(from)); }

inline void multiply_add(Vector& sum, float a, Vector b) { sum += a * b; }

#ifdef __AVX512BF16__
inline void multiply_add(Vector& sum, Pair a, Vector b) {
  sum = _mm512_dpbf16_ps(sum, __m512bh(_mm512_set1_epi32(a.bits)), __m512bh(b));
}
#endif

// out (ROWS, NR) = A B, or added to it; A_ik = a[i row + k step], B_kj = b[k stride + j].
template <int ROWS, typename Word>
void micro_kernel(const Word* a, int64_t row, int64_t step, const Word* b, int64_t stride,
                  int64_t depth, bool add, float* out, int64_t out_stride) {
  Vector sum[ROWS][2] = {};
  for (int64_t k = 0; k < depth; k++, a += step, b += stride) {
    const Vector left = load(b), right = load(b + LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      multiply_add(sum[i][0], a[i * row], left);
      multiply_add(sum[i][1], a[i * row], right);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++) {
    for (int half = 0; half < 2; half++) {
      float* to = out + i * out_stride + half * LANES;
      // added at the end: a long sum is rounded once for a block, not at each of its terms
      store(add ? load(to) + sum[i][half] : sum[i][half], to);
    }
  }
}

// The same for any number of rows.
template <typename Word>
void macro_kernel(const Word* a, int64_t row, int64_t step, const Word* b, int64_t stride,
                  int64_t rows, int64_t depth, bool add, float* out, int64_t out_stride) {
  int64_t i = 0;
#define ROWS_AT_ONCE(ROWS)                                                                  \
  for (; i + ROWS <= rows; i += ROWS)                                                       \
    micro_kernel<ROWS>(a + i * row, row, step, b, stride, depth, add, out + i * out_stride, \
                       out_stride);
  ROWS_AT_ONCE(MR)
  ROWS_AT_ONCE(4)
  ROWS_AT_ONCE(2)
  ROWS_AT_ONCE(1)
#undef ROWS_AT_ONCE
}

// The same for any number of columns that NR divides; b is `panel` words on for every PANEL.
template <typename Word>
void gemm(const Word* a, int64_t row, int64_t step, const Word* b, int64_t stride, int64_t panel,
          int64_t rows, int64_t columns, int64_t depth, bool add, float* out, int64_t out_stride) {
  for (int64_t k = 0; k < depth; k += KC) {
    const int64_t words = depth - k < KC ? depth - k : KC;
    for (int64_t j = 0; j < columns; j += NR) {
      const Word* from = b + j / PANEL * panel + j % PANEL + k * stride;
      macro_kernel(a + k * step, row, step, from, stride, rows, words, add || k > 0, out + j,
                   out_stride);
    }
  }
}

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

// A thread's tile of float32, and its d_logits as the two products of the gradients read them.
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

  // The place of row i's d_logits, which may overwrite its logits.
  struct Row {
    float* at;
    void put(int64_t j, const Vector (&d)[1]) const { store(d[0], at + j); }
  };
  Row row(int64_t i) { return {tile + i * stride}; }

  const float* d_logits() const { return tile; }
  int64_t d_logits_stride() const { return stride; }
  const float* d_logits_t() const { return tile; }
};

#ifdef __AVX512BF16__
template <>
struct Scratch<Pair> {
  static constexpr int PER_WORD = 2;
  using Number = bfloat16;
  const int64_t stride;
  float* const tile;
  Pair *const pairs, *const pairs_t;  // neighbours along the columns, and along the rows

  Scratch(int64_t rows, int64_t columns)
      : stride(columns + 16),
        tile(thread_memory<Scratch, float>(rows * stride)),
        pairs(thread_memory<Pair, Pair>((rows + 1) * stride)),
        pairs_t(pairs + (rows + 1) * stride / 2) {}

  // The places of the d_logits of rows i and i + 1, or of row i alone, the last.
  struct Row {
    bfloat16 *first, *second;
    Pair* both_rows;

    void put(int64_t j, const Vector (&d)[2]) const {
      const auto both = __m512i(_mm512_cvtne2ps_pbh(__m512(d[1]), __m512(d[0])));
      const __m256i halves[] = {_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1)};
      std::memcpy(first + j, &halves[0], sizeof halves[0]);
      std::memcpy(second + j, &halves[1], sizeof halves[1]);
      // lane k has number k of the first row and, above it, of the second
      const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const __m512i paired = _mm512_permutexvar_epi16(__m512i(lane | (lane + 16) << 16), both);
      std::memcpy(both_rows + j, &paired, sizeof paired);
    }
    void put(int64_t j, const Vector (&d)[1]) const { put(j, {d[0], Vector{}}); }
  };
  Row row(int64_t i) {
    Pair* at = pairs + i * d_logits_stride();
    return {reinterpret_cast<bfloat16*>(at), reinterpret_cast<bfloat16*>(at + d_logits_stride()),
            pairs_t + i / 2 * stride};
  }

  const Pair* d_logits() const { return pairs; }
  int64_t d_logits_stride() const { return stride / 2; }
  const Pair* d_logits_t() const { return pairs_t; }
};
#endif
