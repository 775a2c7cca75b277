// What is added up along the rows, several times over.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "params.h"

// Copies of what is added up along the rows, (copies, n) of each, where there are several.
class RowSums {
 public:
  RowSums(const InBatchParams& work, int64_t copies) : work_(work), copies_(copies) {
    const int64_t all = copies * work.n;
    if (work.totals.rows) totals_.resize(all);
    if (work.totals.row_largest) largest_.resize(all);
    if (work.grad_r) grad_ = thread_memory<RowSums, float>(all * work.d);
  }

  // The work that adds to them.
  InBatchParams work() {
    InBatchParams own = work_;
    if (own.totals.rows) own.totals.rows = totals_.data();
    if (own.totals.row_largest) own.totals.row_largest = largest_.data();
    own.grad_r = grad_;
    return own;
  }

  void clear(int64_t i) {
    for (int64_t row = i; row < copies_ * work_.n; row += work_.n) {
      if (work_.totals.row_largest) largest_[row] = work_.totals.row_largest[i];
      if (work_.grad_r) std::fill_n(&grad_[row * work_.d], work_.d, 0.f);
    }
  }

  template <typename Kind>
  void merge(int64_t i) {
    for (int64_t first = 0; first < copies_ * work_.n; first += work_.n) {
      if (work_.totals.rows) Kind::merge(work_.totals, work().totals.from(first, 0, false), i);
      if (!work_.grad_r) continue;
      const float* from = &grad_[(first + i) * work_.d];
      float* to = work_.grad_r + i * work_.d;
#pragma omp simd
      for (int64_t k = 0; k < work_.d; k++) to[k] += from[k];
    }
  }

 private:
  const InBatchParams& work_;
  const int64_t copies_;
  std::vector<double> totals_, largest_;
  float* grad_ = nullptr;
};
