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

// r_i = scale x_i / norm_i; returns whether x_i was in range, without which r_i is wrong.
template <typename T>
bool normalise(const T* x, int64_t d, double eps, double scale, T* r, double* norm) {
  const double square = dot(x, x, d), length = std::sqrt(square);
  *norm = square == 0 ? 0 : length <= eps ? eps : length;
  const double factor = square == 0 ? 0 : scale / *norm;
#pragma omp simd
  for (int64_t k = 0; k < d; k++) r[k] = T(x[k] * factor);
  return in_range(square, x, d);
}

// The rows of one view, or of two and products_i = <r_i, r_i+n>, twice. Returns whether all rows
// were in range.
template <typename T>
bool forward(const T* x1, int64_t stride1, const T* x2, int64_t stride2, int64_t n, int64_t d,
             double eps, double scale, T* r, double* norm, T* products) {
  bool all = true;
#pragma omp parallel for schedule(static) reduction(&& : all) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < n; i++) {
    T *own = r + i * d, *other = own + n * d;
    all = normalise(x1 + i * stride1, d, eps, scale, own, norm + i) && all;
    if (!x2) continue;
    all = normalise(x2 + i * stride2, d, eps, scale, other, norm + n + i) && all;
    products[i] = products[n + i] = T(dot(own, other, d));
  }
  return all;
}

// The gradient on one row of x, h the one on r = scale u without its share of grad_product:
//
//     (h - <h, u> u [norm > eps]) scale / norm,    h += grad_product r_pair.
//
// h may be missing.
template <typename T>
void through(const T* h, double grad_product, const T* pair, const T* r, double norm, int64_t d,
             double eps, double scale, T* grad_x) {
  if (norm == 0) {
    std::fill(grad_x, grad_x + d, T(0));
    return;
  }
#pragma omp simd
  for (int64_t k = 0; k < d; k++)
    grad_x[k] = (h ? h[k] : T(0)) + (pair ? T(grad_product * pair[k]) : T(0));
  const bool free = norm > eps;
  const double along = free ? dot(grad_x, r, d) / dot(r, r, d) : 0;
  // in one dimension nothing but rounding is left of a free row's gradient
  const double factor = free && d == 1 ? 0 : scale / norm;
#pragma omp simd
  for (int64_t k = 0; k < d; k++) grad_x[k] = T((grad_x[k] - along * r[k]) * factor);
}

// The gradients on the views that are asked for; those on r and on the products may be missing.
template <typename T>
void backward(const T* grad_r, const T* grad_products, const T* r, const double* norm, int64_t n,
              int64_t d, double eps, double scale, T* grad_x1, T* grad_x2) {
#pragma omp parallel for schedule(static) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < n; i++) {
    for (int view = 0; view < 2; view++) {
      T* grad_x = view ? grad_x2 : grad_x1;
      if (!grad_x) continue;
      const int64_t own = i + view * n, other = i + (1 - view) * n;
      const T* pair = grad_products ? r + other * d : nullptr;
      const double g = grad_products ? double(grad_products[own]) + grad_products[other] : 0;
      through(grad_r ? grad_r + own * d : nullptr, g, pair, r + own * d, norm[own], d, eps, scale,
              grad_x + i * d);
    }
  }
}

}  // namespace

#define UNIT_ROWS(T, NAME)                                                                        \
  extern "C" int64_t unit_rows_forward_##NAME(const T* x1, int64_t stride1, const T* x2,          \
                                              int64_t stride2, int64_t n, int64_t d, double eps,  \
                                              double scale, T* r, double* norm, T* products) {    \
    return forward(x1, stride1, x2, stride2, n, d, eps, scale, r, norm, products);                \
  }                                                                                               \
  extern "C" void unit_rows_backward_##NAME(const T* grad_r, const T* grad_products, const T* r,  \
                                            const double* norm, int64_t n, int64_t d, double eps, \
                                            double scale, T* grad_x1, T* grad_x2) {               \
    backward(grad_r, grad_products, r, norm, n, d, eps, scale, grad_x1, grad_x2);                 \
  }

UNIT_ROWS(float, float32)
UNIT_ROWS(double, float64)
