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
// h may be missing, and pair, the other view's row, of length pair_norm. given_along: <h, r>, where
// it is not of these columns alone; or null.
template <typename T>
void through(const T* h, double grad_product, const T* pair, double pair_norm, const T* x,
             double norm, const double* given_along, int64_t d, double eps, double scale,
             T* grad_x) {
  if (norm == 0) {
    std::fill(grad_x, grad_x + d, T(0));
    return;
  }
  const double pull = pair && pair_norm != 0 ? grad_product * scale / pair_norm : 0;
  if (pair) {
#pragma omp simd
    for (int64_t k = 0; k < d; k++) grad_x[k] = T((h ? double(h[k]) : 0) + pull * pair[k]);
  } else {
#pragma omp simd
    for (int64_t k = 0; k < d; k++) grad_x[k] = h ? h[k] : T(0);
  }
  const bool free = norm > eps;
  const double along = !free         ? 0
                       : given_along ? *given_along / scale / norm
                                     : dot(grad_x, x, d) / dot(x, x, d);
  // in one dimension nothing but rounding is left of a free row's gradient
  const double factor = free && !given_along && d == 1 ? 0 : scale / norm;
#pragma omp simd
  for (int64_t k = 0; k < d; k++) grad_x[k] = T((grad_x[k] - along * x[k]) * factor);
}

// The gradients on the views that are asked for; those on r and on the products may be missing.
template <typename T>
void backward(const T* grad_r1, const T* grad_r2, const T* grad_products, const T* x1,
              int64_t stride1, const T* x2, int64_t stride2, const double* norm,
              const double* along, int64_t n, int64_t d, double eps, double scale, T* grad_x1,
              T* grad_x2) {
  auto along_of = [along](int64_t row) { return along ? along + row : nullptr; };
#pragma omp parallel for schedule(static) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < n; i++) {
    const T *first = x1 + i * stride1, *second = grad_products ? x2 + i * stride2 : nullptr;
    const double g = grad_products ? double(grad_products[i]) + grad_products[i + n] : 0;
    if (grad_x1) {
      through(grad_r1 ? grad_r1 + i * d : nullptr, g, second, second ? norm[i + n] : 0, first,
              norm[i], along_of(i), d, eps, scale, grad_x1 + i * d);
    }
    if (grad_x2) {
      through(grad_r2 ? grad_r2 + i * d : nullptr, g, grad_products ? first : nullptr, norm[i],
              x2 + i * stride2, norm[i + n], along_of(i + n), d, eps, scale, grad_x2 + i * d);
    }
  }
}

}  // namespace

#define UNIT_ROWS(T, NAME)                                                                         \
  extern "C" int64_t unit_rows_forward_##NAME(const T* x1, int64_t stride1, const T* x2,           \
                                              int64_t stride2, int64_t n, int64_t d, double eps,   \
                                              double scale, T* r, double* norm, T* products) {     \
    return forward(x1, stride1, x2, stride2, n, d, eps, scale, r, norm, products);                 \
  }                                                                                                \
  extern "C" void unit_rows_backward_##NAME(                                                       \
      const T* grad_r1, const T* grad_r2, const T* grad_products, const T* x1, int64_t stride1,    \
      const T* x2, int64_t stride2, const double* norm, const double* along, int64_t n, int64_t d, \
      double eps, double scale, T* grad_x1, T* grad_x2) {                                          \
    backward(grad_r1, grad_r2, grad_products, x1, stride1, x2, stride2, norm, along, n, d, eps,    \
             scale, grad_x1, grad_x2);                                                             \
  }

UNIT_ROWS(float, float32)
UNIT_ROWS(double, float64)
