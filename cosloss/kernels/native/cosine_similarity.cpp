// Row-wise cosine similarity and its gradient: one pass over the rows each.
//
// Sums and factors are in float64. There the squares of narrower dtypes neither overflow nor
// vanish, and S near +-1, at which the gradient cancels, leaves enough digits. `stride` is the
// distance of two rows, in elements. A row's statistics are n = max(|x|, eps), m likewise, and S.

#include <cmath>
#include <cstdint>

#include "rows.h"

namespace {

constexpr double NEAR_ONE = 0.9375;  // up to this S, 1 - S loses at most 4 bits

enum { NORM1, NORM2, SIMILARITY, STATISTICS };

struct Products {
  double xx, yy, xy;
};

template <typename T>
Products products(const T* x, const T* y, int64_t d) {
  double xx = 0, yy = 0, xy = 0;
#pragma omp simd reduction(+ : xx, yy, xy)
  for (int64_t k = 0; k < d; k++) {
    const double a = wide(x[k]), b = wide(y[k]);
    xx += a * a;
    yy += b * b;
    xy += a * b;
  }
  return {xx, yy, xy};
}

// 1 - <u, v> is |u - v|^2 / 2 for unit rows; the square of a clamped one lacks half of 1 - |u|^2.
template <typename T>
double small_distance(const T* x, double norm1, double clamped1, const T* y, double norm2,
                      double clamped2, int64_t d) {
  const double inverse1 = 1 / clamped1, inverse2 = 1 / clamped2;
  double apart = 0;
#pragma omp simd reduction(+ : apart)
  for (int64_t k = 0; k < d; k++) {
    const double difference = wide(x[k]) * inverse1 - wide(y[k]) * inverse2;
    apart += difference * difference;
  }
  if (norm1 < clamped1) apart += 1 - norm1 * norm1 * inverse1 * inverse1;
  if (norm2 < clamped2) apart += 1 - norm2 * norm2 * inverse2 * inverse2;
  return apart / 2;
}

// Returns whether all rows were in range; the values are right only if they were.
template <typename T>
bool forward(const T* x1, int64_t stride1, const T* x2, int64_t stride2, int64_t n, int64_t d,
             double eps, bool distance, T* value, double* statistics) {
  bool all_in_range = true;
#pragma omp parallel for schedule(static) \
    reduction(&& : all_in_range) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < n; i++) {
    const T *x = x1 + i * stride1, *y = x2 + i * stride2;
    const Products p = products(x, y, d);
    all_in_range = all_in_range && in_range(p.xx, x, d) && in_range(p.yy, y, d);
    const double norm1 = std::sqrt(p.xx), norm2 = std::sqrt(p.yy);
    const double clamped1 = norm1 <= eps ? eps : norm1, clamped2 = norm2 <= eps ? eps : norm2;
    double s = p.xy;  // 0 for a zero row, or NaN
    if (p.xx != 0 && p.yy != 0) {
      // sqrt(xx xx) is xx: the similarity of a row with itself is exactly 1
      s /= norm1 > eps && norm2 > eps ? std::sqrt(p.xx * p.yy) : clamped1 * clamped2;
      s = s > 1 ? 1 : s < -1 ? -1 : s;
    }
    double* row = statistics + i * STATISTICS;
    row[NORM1] = p.xx == 0 ? INFINITY : clamped1;  // a zero row's gradient is 0
    row[NORM2] = p.yy == 0 ? INFINITY : clamped2;
    row[SIMILARITY] = s;
    if (distance)
      s = s > NEAR_ONE ? small_distance(x, norm1, clamped1, y, norm2, clamped2, d) : 1 - s;
    value[i] = narrow<T>(s);
  }
  return all_in_range;
}

// grad_x = a y - b1 x and grad_y = a x - b2 y: those that are asked for, in one pass.
template <bool FIRST, bool SECOND, typename T>
void row_backward(const T* x, const T* y, int64_t d, double a, double b1, double b2, T* grad_x,
                  T* grad_y) {
#pragma omp simd
  for (int64_t k = 0; k < d; k++) {
    const double u = wide(x[k]), v = wide(y[k]);
    if (FIRST) grad_x[k] = narrow<T>(a * v - b1 * u);
    if (SECOND) grad_y[k] = narrow<T>(a * u - b2 * v);
  }
}

template <bool FIRST, bool SECOND, typename T>
void backward(const T* grad, const T* x1, int64_t stride1, const T* x2, int64_t stride2, int64_t n,
              int64_t d, double eps, double sign, const double* statistics, T* grad1, T* grad2) {
#pragma omp parallel for schedule(static) if (n * d > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < n; i++) {
    const double* row = statistics + i * STATISTICS;
    const double norm1 = row[NORM1], norm2 = row[NORM2], s = row[SIMILARITY];
    const double g = sign * wide(grad[i]);
    const double b1 = norm1 <= eps ? 0 : g * s / norm1 / norm1;
    const double b2 = norm2 <= eps ? 0 : g * s / norm2 / norm2;
    row_backward<FIRST, SECOND>(x1 + i * stride1, x2 + i * stride2, d, g / norm1 / norm2, b1, b2,
                                grad1 + i * d, grad2 + i * d);
  }
}

}  // namespace

#define COSINE_SIMILARITY(T, NAME)                                                          \
  extern "C" int64_t cosine_similarity_forward_##NAME(                                      \
      const T* x1, int64_t stride1, const T* x2, int64_t stride2, int64_t n, int64_t d,     \
      double eps, int distance, T* value, double* statistics) {                             \
    return forward(x1, stride1, x2, stride2, n, d, eps, distance, value, statistics);       \
  }                                                                                         \
  extern "C" void cosine_similarity_backward_##NAME(                                        \
      const T* grad, const T* x1, int64_t stride1, const T* x2, int64_t stride2, int64_t n, \
      int64_t d, double eps, double sign, const double* statistics, T* grad1, T* grad2) {   \
    const auto kernel = grad1 && grad2 ? backward<true, true, T>                            \
                        : grad1        ? backward<true, false, T>                           \
                                       : backward<false, true, T>;                          \
    kernel(grad, x1, stride1, x2, stride2, n, d, eps, sign, statistics, grad1, grad2);      \
  }

COSINE_SIMILARITY(float, float32)
COSINE_SIMILARITY(double, float64)
COSINE_SIMILARITY(bfloat16, bfloat16)
