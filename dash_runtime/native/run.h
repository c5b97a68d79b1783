// Rows of a pass: how threads share them, and their products.
#pragma once
#include "attention.h"
#include "mixture.h"
#include "products.h"

struct ModelShape {
  HeadShape heads;
  int64_t hidden_size, intermediate_size, activation, num_layers;
  double eps, residual_multiplier;
  int64_t num_experts, num_chosen, expert_size;  // of mixtures; 0 if no layer has one

  int64_t query_size() const { return heads.num_heads * heads.head_dim; }
  int64_t kv_size() const { return heads.num_kv_heads * heads.head_dim; }
  int64_t fused_size() const { return query_size() + 2 * kv_size(); }
};

// Rows from which on each thread does what is done by row for its share of them, not for all. That takes more barriers.
constexpr int64_t kRowsToShare = 8;

// Rows of a thread from which on it multiplies them alone, with all of a layer's weights. Then no thread waits for what
// another one has made of the same rows.
constexpr int64_t kRowsApart = 32;

// Memory of a pass: what all threads see, and what each has for itself. Where threads share rows, they also share
// `queries`, `keys`, `values` and `choices`, and unless rows are apart `inputs`.
struct Shared {
  float *fused, *parts, *branch, *inner, *narrow;
};

struct Own {
  float *residual, *normed, *inputs, *queries, *keys, *values, *joined, *wide, *repeated, *gathered;
  Choice *choices;
  ExpertRows *experts;
};

// The rows whose norms, residuals and rotations a thread computes: all rows if they are few, or its share of them.
struct RowRange {
  int64_t first, last;
  bool is_shared, is_apart;

  int64_t count() const { return last - first; }

  // The rows that are this thread's alone, also where all threads have all rows.
  RowRange own(const Member &member) const {
    return is_shared ? *this : RowRange{member.first(last), member.last(last), false, false};
  }

  // Rows of a mixture are not apart: together more of them have one expert.
  static RowRange of(const Member &member, const ModelShape &shape, int64_t num_rows) {
    if (member.num_threads == 1 || num_rows < kRowsToShare) return {0, num_rows, false, false};
    if (num_rows < kRowsApart * member.num_threads || shape.num_chosen)
      return {member.first(num_rows), member.last(num_rows), true, false};
    // Rows that lie together are one thread's.
    const int64_t together = (num_rows + kRowsTogether - 1) / kRowsTogether;
    return {member.first(together) * kRowsTogether, std::min(member.last(together) * kRowsTogether, num_rows), true,
            true};
  }
};

inline void norm(const float *from, const float *weight, int64_t size, double eps, float *to) {
  const float scale = 1.0f / std::sqrt(dot(from, from, size) / size + static_cast<float>(eps));
  for (int64_t place = 0; place < size; place += kLanes)
    store(to + place, load<Floats>(from + place) * scale * load<Floats>(weight + place));
}

inline void norm_rows(const float *from, const float *weight, const RowRange &rows, int64_t size, double eps,
                      float *to) {
  for (int64_t row = rows.first; row < rows.last; ++row) {
    if (weight)
      norm(from + row * size, weight, size, eps, to + row * size);
    else
      std::memcpy(to + row * size, from + row * size, size * sizeof(float));
  }
}

// One thread's work in a part of a pass: its rows, and its share of each product.
class Run {
 public:
  Run(const Member &member, const ModelShape &shape, const Shared &shared, const Own &own, int64_t num_rows)
      : member_(member),
        shape_(shape),
        shared_(shared),
        own_(own),
        num_rows_(num_rows),
        rows_(RowRange::of(member, shape, num_rows)) {}

 protected:
  void multiply(const Matrix &matrix, const float *rows, int64_t first, int64_t last, float *outputs,
                int64_t stride) const {
    const Rows inputs = prepared(matrix, rows);
    const int64_t begin = first + member_.first(last - first), end = first + member_.last(last - first);
    product(matrix, inputs, 0, num_rows_, begin, end, outputs + begin * kLanes, stride);
  }

  // Prepares all rows for a product; of `rows` a thread needs no more than its own.
  Rows prepared(const Matrix &matrix, const float *rows) const {
    const Rows inputs = prepared_own(matrix, rows);
    if (rows_.is_shared) member_.wait();
    return inputs;
  }

  // Prepares this thread's rows, which all threads see after the next barrier.
  Rows prepared_own(const Matrix &matrix, const float *rows) const {
    const auto layout = static_cast<Layout>(matrix.layout);
    return prepare(layout, rows, num_rows_, matrix.num_inputs, own_.inputs, rows_.first, rows_.last);
  }

  const Member &member_;
  const ModelShape &shape_;
  const Shared &shared_;
  const Own &own_;
  int64_t num_rows_;
  RowRange rows_;
};
