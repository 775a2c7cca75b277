// Rows scaled to one length, r = scale x / max(|x|, eps), the inner products of paired rows, and
// the gradient.
//
// Sums are in float64, where no square of a narrower number overflows or vanishes. `stride` is the
// distance of two rows, in elements. A row's norm is max(|x|, eps), and 0 for a zero row, which
// stays zero and has the gradient 0; it is clamped where it is at most eps.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "rows.h"

namespace {

template <typename T>
double dot(const T* x, const T* y, int64_t d) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; k++) sum += double(x[k]) * y[k];
  return sum;
}

// Returns whether all rows were in range; r is right only if they were.
template <typename T>
bool forward(const T* x, int64_t stride, int64_t n, int64_t d, double eps, double scale, T* r,
             double* norm) {
  bool all_in_range = true;
#pragma omp parallel for schedule(static) \
    reduction(&& : all_in_range) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < n; i++) {
    const T* from = x + i * stride;
    T* to = r + i * d;
    const double square = dot(from, from, d), length = std::sqrt(square);
    all_in_range = all_in_range && in_range(square, from, d);
    norm[i] = square == 0 ? 0 : length <= eps ? eps : length;
    const double factor = square == 0 ? 0 : scale / norm[i];
#pragma omp simd
    for (int64_t k = 0; k < d; k++) to[k] = T(from[k] * factor);
  }
  return all_in_range;
}

// products_i = <r_i, r_i+n>, twice.
template <typename T>
void paired_products(const T* r, int64_t n, int64_t d, T* products) {
#pragma omp parallel for schedule(static) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < n; i++)
    products[i] = products[n + i] = T(dot(r + i * d, r + (n + i) * d, d));
}

// The gradient on rows first to first + n of x; the pair of row i is i + pairs or i - pairs.
//
// h = grad_r + grad_product r_pair is the gradient on r = scale u, and
// (h - <h, u> u [norm > eps]) scale / norm the one on x. Either gradient may be missing.
template <typename T>
void backward(const T* grad_r, const T* grad_products, const T* r, const double* norm,
              int64_t pairs, int64_t first, int64_t n, int64_t d, double eps, double scale,
              T* grad_x) {
#pragma omp parallel for schedule(static) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = first; i < first + n; i++) {
    const T* own = r + i * d;
    T* h = grad_x + (i - first) * d;
    if (norm[i] == 0) {
      std::fill(h, h + d, T(0));
      continue;
    }
    if (grad_r) std::copy(grad_r + i * d, grad_r + (i + 1) * d, h);
    if (grad_products) {
      const int64_t other = i < pairs ? i + pairs : i - pairs;
      const double g = double(grad_products[i]) + grad_products[other];
      const T* pair = r + other * d;
#pragma omp simd
      for (int64_t k = 0; k < d; k++) h[k] = (grad_r ? h[k] : 0) + T(g * pair[k]);
    }
    const bool free = norm[i] > eps;
    const double along = free ? dot(h, own, d) / dot(own, own, d) : 0;
    // in one dimension nothing but rounding is left of a free row's gradient
    const double factor = free && d == 1 ? 0 : scale / norm[i];
#pragma omp simd
    for (int64_t k = 0; k < d; k++) h[k] = T((h[k] - along * own[k]) * factor);
  }
}

}  // namespace

#define UNIT_ROWS(T, NAME)                                                                      \
  extern "C" int64_t unit_rows_forward_##NAME(const T* x, int64_t stride, int64_t n, int64_t d, \
                                              double eps, double scale, T* r, double* norm) {   \
    return forward(x, stride, n, d, eps, scale, r, norm);                                       \
  }                                                                                             \
  extern "C" void paired_products_##NAME(const T* r, int64_t n, int64_t d, T* products) {       \
    paired_products(r, n, d, products);                                                         \
  }                                                                                             \
  extern "C" void unit_rows_backward_##NAME(                                                    \
      const T* grad_r, const T* grad_products, const T* r, const double* norm, int64_t pairs,   \
      int64_t first, int64_t n, int64_t d, double eps, double scale, T* grad_x) {               \
    backward(grad_r, grad_products, r, norm, pairs, first, n, d, eps, scale, grad_x);           \
  }

UNIT_ROWS(float, float32)
UNIT_ROWS(double, float64)
