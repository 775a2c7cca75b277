// Rows scaled to one length, r = scale z / |z|, the inner products of paired rows, and the
// gradient.
//
// Norms are taken in float64, where no square of a narrower number overflows or vanishes.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "rows.h"

namespace {

double dot(const float* x, const float* y, int64_t d) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; k++) sum += double(x[k]) * y[k];
  return sum;
}

}  // namespace

// A zero row stays zero, and has the inverse norm 0: its gradient is 0.
extern "C" void unit_rows_forward_float32(const float* z, int64_t stride, int64_t n, int64_t d,
                                          double scale, float* r, double* inverse) {
#pragma omp parallel for schedule(static) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < n; i++) {
    const float* from = z + i * stride;
    float* to = r + i * d;
    const double norm = std::sqrt(dot(from, from, d));
    inverse[i] = norm == 0 ? 0 : 1 / norm;
    const double factor = scale * inverse[i];
#pragma omp simd
    for (int64_t k = 0; k < d; k++) to[k] = float(from[k] * factor);
  }
}

// products_i = <r_i, r_i+n>, twice.
extern "C" void paired_products_float32(const float* r, int64_t n, int64_t d, float* products) {
#pragma omp parallel for schedule(static) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < n; i++)
    products[i] = products[n + i] = float(dot(r + i * d, r + (n + i) * d, d));
}

// The gradient on rows first to first + n of z, of which row i's pair is row i + pairs or i -
// pairs.
//
// h = grad_r + grad_product r_pair is the gradient on r = scale u, and (h - <h, u> u) scale / |z|
// the one on z. Either gradient may be missing.
extern "C" void unit_rows_backward_float32(const float* grad_r, const float* grad_products,
                                           const float* r, const double* inverse, int64_t pairs,
                                           int64_t first, int64_t n, int64_t d, double scale,
                                           float* grad_z) {
#pragma omp parallel for schedule(static) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = first; i < first + n; i++) {
    const int64_t other = i < pairs ? i + pairs : i - pairs;
    const float* own = r + i * d;
    float* h = grad_z + (i - first) * d;
    if (grad_products) {
      const double g = double(grad_products[i]) + grad_products[other];
      const float* pair = r + other * d;
#pragma omp simd
      for (int64_t k = 0; k < d; k++) h[k] = float(g * pair[k]);
    }
    if (grad_r) {
      const float* grad = grad_r + i * d;
#pragma omp simd
      for (int64_t k = 0; k < d; k++) h[k] = grad_products ? grad[k] + h[k] : grad[k];
    }
    const double square = dot(own, own, d);  // 0 for a zero row, and scale^2 to rounding
    const double along = square == 0 ? 0 : dot(h, own, d) / square;
    const double factor = d == 1 ? 0 : scale * inverse[i];  // rounding alone, in one dimension
#pragma omp simd
    for (int64_t k = 0; k < d; k++) h[k] = float((h[k] - along * own[k]) * factor);
  }
}
