// The parameters of a run of the in-batch engine, in the notation of in_batch.cpp.

#pragma once

#include <cstdint>

// The statistics that a tile is added to, from its first row and column on; columns may have none.
// The maxima of the logits so far are an lse's alone.
struct StatsPointers {
  double *rows, *columns, *row_max, *column_max;

  StatsPointers from(int64_t i, int64_t j, bool of_columns) const {
    auto ahead = [](double* x, int64_t by) { return x ? x + by : nullptr; };
    double* columns_j = of_columns ? ahead(columns, j) : nullptr;
    return {rows + i, columns_j, ahead(row_max, i), ahead(column_max, j)};
  }
};

// The gradient of the loss on the statistics, in the form that gives the one on a logit:
// cosloss/kernels/stats.py has the formula. Positives are the unmasked pairs of one class.
struct LossGrads {
  const float *d_rows, *d_columns, *row_shift, *column_shift, *d_row_pos, *d_column_pos;
  const int32_t *row_class, *column_class;
};

// A null pointer stands for what is missing, or not asked for.
struct InBatchParams {
  const void *rows, *packed_c, *packed_rows_of_r,
      *packed_rows_of_c;       // R; C and R packed as in gemm.h
  int64_t first_row, n, m, d;  // the run is over n rows of R from first_row on
  int64_t symmetric;
  // masked are the pairs with column - row = an offset, those whose logit is above their row's or
  // column's limit, and those of one group; where there are classes, only those of a group whose
  // classes differ
  int64_t diagonals;
  const int64_t *offsets, *row_groups, *column_groups, *row_classes, *column_classes;
  const float *row_limits, *column_limits;
  const float* bias;
  double margin;
  StatsPointers stats;  // the statistics to accumulate in
  void* kept;  // the tiles' stashes: written where statistics are accumulated, read where not
  LossGrads loss_grads;
  float *grad_r, *grad_c;
  float* grad_bias;
  // the nested prefixes of R and C, each with logits, statistics and loss_grads of its own, one
  // after the other; 0 of them where there is one logit matrix
  int64_t prefixes, all_rows;  // statistics of rows are all_rows apart, whatever rows the run is of
  const int64_t* ends;         // the columns of R where they end
  const float *row_links, *column_links;  // what scales the logits of the prefix before
  double *along_rows, *along_columns;     // sums of d_logit (x - bias)

  // The run of one prefix: what is its own of the statistics and their gradients.
  InBatchParams of_prefix(int64_t k) const {
    auto at = [k](auto* x, int64_t apart) { return x ? x + k * apart : x; };
    InBatchParams own = *this;
    own.stats = {at(stats.rows, all_rows), at(stats.columns, m), at(stats.row_max, all_rows),
                 at(stats.column_max, m)};
    const LossGrads& of = loss_grads;
    own.loss_grads = {at(of.d_rows, n),       at(of.d_columns, m), at(of.row_shift, n),
                      at(of.column_shift, m), at(of.d_row_pos, n), at(of.d_column_pos, m),
                      of.row_class,           of.column_class};
    own.row_links = at(row_links, all_rows);
    own.column_links = at(column_links, m);
    own.along_rows = at(along_rows, all_rows);
    own.along_columns = at(along_columns, m);
    return own;
  }

  // The same run with every pointer at first_row; loss_grads are already. Without loss_grads there
  // is no gradient.
  InBatchParams from_first_row(int64_t bytes_of_a_row) const {
    auto ahead = [this](auto* x, int64_t size) { return x ? x + first_row * size : x; };
    InBatchParams own = *this;
    own.rows = ahead(static_cast<const char*>(rows), bytes_of_a_row);
    own.row_groups = ahead(row_groups, 1);
    own.row_classes = ahead(row_classes, 1);
    own.row_limits = ahead(row_limits, 1);
    own.stats.rows = ahead(stats.rows, 1);
    own.stats.row_max = ahead(stats.row_max, 1);
    own.grad_r = ahead(grad_r, d);
    own.row_links = ahead(row_links, 1);
    own.along_rows = ahead(along_rows, 1);
    if (!loss_grads.d_rows) own.grad_r = own.grad_c = own.grad_bias = nullptr;
    return own;
  }
};
