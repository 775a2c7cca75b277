// The facts that Python asks a library for first: the sources that it was compiled from, and how
// the parameters of the in-batch engine are laid out.

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "gemm.h"
#include "params.h"

namespace {

struct Field {
  const char* name;
  std::size_t offset, size;
  char kind;  // a letter of Python's struct module
};

template <typename T>
constexpr char kind() {
  static_assert(std::is_pointer_v<T> || std::is_same_v<T, int64_t> || std::is_same_v<T, double>);
  return std::is_pointer_v<T> ? 'P' : std::is_same_v<T, int64_t> ? 'q' : 'd';
}

#define FIELD_AS(NAME, MEMBER)                                            \
  Field {                                                                 \
    NAME, offsetof(InBatchParams, MEMBER), sizeof(InBatchParams::MEMBER), \
        kind<decltype(InBatchParams::MEMBER)>()                           \
  }
#define FIELD(MEMBER) FIELD_AS(#MEMBER, MEMBER)

// clang-format off
constexpr Field FIELDS[] = {
    FIELD(rows), FIELD(packed_c), FIELD(packed_rows_of_r), FIELD(packed_rows_of_c),
    FIELD(first_row), FIELD(n), FIELD(m), FIELD(d),
    FIELD(symmetric),
    FIELD(diagonals),
    FIELD(offsets), FIELD(row_groups), FIELD(column_groups),
    FIELD(row_classes), FIELD(column_classes),
    FIELD(row_limits), FIELD(column_limits),
    FIELD(bias),
    FIELD(margin),
    FIELD_AS("row_stats", stats.rows), FIELD_AS("column_stats", stats.columns),
    FIELD_AS("row_max", stats.row_max), FIELD_AS("column_max", stats.column_max),
    FIELD(kept),
    FIELD_AS("d_rows", loss_grads.d_rows), FIELD_AS("d_columns", loss_grads.d_columns),
    FIELD_AS("row_shift", loss_grads.row_shift),
    FIELD_AS("column_shift", loss_grads.column_shift),
    FIELD_AS("d_row_pos", loss_grads.d_row_pos), FIELD_AS("d_column_pos", loss_grads.d_column_pos),
    FIELD_AS("row_class", loss_grads.row_class),
    FIELD_AS("column_class", loss_grads.column_class),
    FIELD(grad_r), FIELD(grad_c),
    FIELD(grad_bias),
    FIELD(prefixes), FIELD(all_rows), FIELD(ends),
    FIELD(row_links), FIELD(column_links),
    FIELD(along_rows), FIELD(along_columns),
};
// clang-format on

// Whether each field begins where the one before ends, up to the last: what Python lays out too.
constexpr bool every_field() {
  std::size_t end = 0;
  for (const Field& field : FIELDS) {
    if (field.offset != end) return false;
    end += field.size;
  }
  return end == sizeof(InBatchParams);
}

static_assert(every_field(), "FIELDS must be InBatchParams's, in their order");

}  // namespace

extern "C" const char* cosloss_stamp() { return COSLOSS_STAMP; }

// The fields of InBatchParams as "kind name", each on a line.
extern "C" const char* in_batch_params() {
  static const std::string lines = [] {
    std::string text;
    for (const Field& field : FIELDS) text += std::string{field.kind, ' '} + field.name + '\n';
    return text;
  }();
  return lines.c_str();
}

extern "C" int64_t in_batch_panel() { return PANEL; }
