// Attention of the last rows of one sequence, each over all positions up to its own, or over a window of them.
//
// Positions are taken in blocks whose bounds depend on no row and no thread, and put together in their order, so a
// row's bits are the same alone and among others, with any number of threads.
#pragma once
#include "team.h"
#include "vectors.h"

constexpr int64_t kBlockPositions = 64;
constexpr int64_t kMostChannels = 512;  // of a head

struct HeadShape {
  int64_t num_heads, num_kv_heads, head_dim;
  double scale;

  int64_t group() const { return num_heads / num_kv_heads; }
};

// Consecutive rows of one sequence, and its keys and values from its first position on. A pass has one for each of its
// sequences.
struct Span {
  char *memory;        // of layer 0
  int64_t num_tokens;  // the rows' own among them
  int64_t first_row, num_rows;
};

// The spans of a pass in one layer.
struct Memory {
  const Span *spans;
  int64_t num_spans, layer_bytes, values_bytes, token_stride;  // token_stride in elements
  int64_t window;                                              // 0 for none
  int64_t layer;

  uint16_t *keys(const Span &span) const { return reinterpret_cast<uint16_t *>(span.memory + layer * layer_bytes); }
  uint16_t *values(const Span &span) const {
    return reinterpret_cast<uint16_t *>(span.memory + layer * layer_bytes + values_bytes);
  }
  int64_t start(int64_t end) const { return window && end > window ? end - window : 0; }
  int64_t first_block(const Span &span) const { return start(span.num_tokens - span.num_rows + 1) / kBlockPositions; }
  int64_t num_blocks(const Span &span) const { return (span.num_tokens - 1) / kBlockPositions + 1 - first_block(span); }
};

// A block's part of one head of one row: the largest score, the sum of the weights, and the weighted sum of values.
inline int64_t part_size(int64_t head_dim) { return 2 * kLanes + head_dim; }

namespace attention_parts {

inline void write(const HeadShape &shape, const uint16_t *keys, const uint16_t *values, int64_t stride,
                  const float *query, int64_t first, int64_t last, float *part) {
  const int64_t size = shape.head_dim;
  float scores[kBlockPositions];
  float most = -INFINITY;
  for (int64_t position = first; position < last; ++position) {
    const uint16_t *key = keys + position * stride;
    Floats total{};
    for (int64_t place = 0; place < size; place += kLanes)
      total += load<Floats>(query + place) * from_bf16(key + place);
    const float score = sum(total);
    scores[position - first] = score;
    most = score > most ? score : most;
  }
  for (int64_t place = last - first; place % kLanes; ++place) scores[place] = -INFINITY;
  Floats weights{};
  for (int64_t place = 0; place < last - first; place += kLanes) {
    const Floats own = exponential(load<Floats>(scores + place) - most);
    store(scores + place, own);
    weights += own;
  }
  part[0] = most;
  part[kLanes] = sum(weights);
  for (int64_t place = 0; place < size; place += 4 * kLanes) {
    const int count = size - place < 4 * kLanes ? (size - place) / kLanes : 4;
    Floats sums[4]{};
    for (int64_t position = first; position < last; ++position) {
      const uint16_t *value = values + position * stride + place;
      for (int own = 0; own < count; ++own) sums[own] += from_bf16(value + own * kLanes) * scores[position - first];
    }
    for (int own = 0; own < count; ++own) store(part + 2 * kLanes + place + own * kLanes, sums[own]);
  }
}

inline void join(const HeadShape &shape, const float *parts, int64_t num_parts, int64_t stride, float *output) {
  float most = -INFINITY;
  for (int64_t part = 0; part < num_parts; ++part) most = parts[part * stride] > most ? parts[part * stride] : most;
  Floats weights{};
  Floats sums[kMostChannels / kLanes]{};
  const int64_t count = shape.head_dim / kLanes;
  for (int64_t part = 0; part < num_parts; ++part) {
    const float *own = parts + part * stride;
    const Floats factor = exponential(filled(own[0] - most));
    weights += factor * own[kLanes];
    for (int64_t place = 0; place < count; ++place)
      sums[place] += factor * load<Floats>(own + 2 * kLanes + place * kLanes);
  }
  for (int64_t place = 0; place < count; ++place) store(output + place * kLanes, sums[place] / weights);
}

}  // namespace attention_parts

// Floats that `attend` needs in `parts`.
inline int64_t parts_size(const HeadShape &shape, const Span *spans, int64_t num_spans) {
  int64_t size = 0;
  for (const Span *span = spans; span < spans + num_spans; ++span)
    size +=
        span->num_rows * shape.num_heads * ((span->num_tokens - 1) / kBlockPositions + 1) * part_size(shape.head_dim);
  return size;
}

// Writes a row's keys and values of one head, `[head_dim]`.
inline void write_token(const HeadShape &shape, const Memory &memory, const Span &span, int64_t position,
                        int64_t kv_head, const float *key, const float *value) {
  const int64_t to = position * memory.token_stride + kv_head * shape.head_dim;
  for (int64_t place = 0; place < shape.head_dim; place += kLanes) {
    write_bf16(memory.keys(span) + to + place, load<Floats>(key + place));
    write_bf16(memory.values(span) + to + place, load<Floats>(value + place));
  }
}

// Writes the rows' keys and values and attends.
//
// `queries` are `[rows, num_heads, head_dim]`, rotated and scaled, `keys` and `values` `[rows, num_kv_heads,
// head_dim]`, known to all threads; each thread gets the rows from `first_row` to `last_row` of `attended`, `[rows,
// num_heads, head_dim]`, in memory of its own.
inline void attend(const Member &member, const HeadShape &shape, const Memory &memory, const float *queries,
                   const float *keys, const float *values, float *parts, float *attended, int64_t first_row,
                   int64_t last_row) {
  const int64_t size = shape.head_dim, group = shape.group(), stride = part_size(size);
  int64_t num_tasks = 0;
  for (int64_t index = 0; index < memory.num_spans; ++index)
    num_tasks += memory.num_blocks(memory.spans[index]) * shape.num_kv_heads;
  const int64_t first_task = member.first(num_tasks), last_task = member.last(num_tasks);
  int64_t task = 0;
  float *own_parts = parts;
  for (int64_t index = 0; index < memory.num_spans; ++index) {
    const Span &span = memory.spans[index];
    const int64_t first_block = memory.first_block(span), num_blocks = memory.num_blocks(span),
                  span_tasks = num_blocks * shape.num_kv_heads;
    const int64_t first_new = span.num_tokens - span.num_rows;
    for (int64_t own = task < first_task ? first_task - task : 0; own < span_tasks && task + own < last_task; ++own) {
      const int64_t block = own / shape.num_kv_heads, kv_head = own % shape.num_kv_heads;
      const int64_t begin = (first_block + block) * kBlockPositions, end = begin + kBlockPositions;
      // New keys and values are written by whoever reads them.
      for (int64_t row = 0; row < span.num_rows; ++row) {
        const int64_t from = ((span.first_row + row) * shape.num_kv_heads + kv_head) * size;
        if (first_new + row >= begin && first_new + row < end)
          write_token(shape, memory, span, first_new + row, kv_head, keys + from, values + from);
      }
      for (int64_t row = 0; row < span.num_rows; ++row) {
        const int64_t stop = first_new + row + 1, start = memory.start(stop);
        const int64_t first = start > begin ? start : begin, last = stop < end ? stop : end;
        for (int64_t head = kv_head * group; first < last && head < (kv_head + 1) * group; ++head)
          attention_parts::write(shape, memory.keys(span) + kv_head * size, memory.values(span) + kv_head * size,
                                 memory.token_stride,
                                 queries + ((span.first_row + row) * shape.num_heads + head) * size, first, last,
                                 own_parts + ((row * shape.num_heads + head) * num_blocks + block) * stride);
      }
    }
    task += span_tasks;
    own_parts += span.num_rows * shape.num_heads * num_blocks * stride;
  }
  member.wait();
  own_parts = parts;
  for (int64_t index = 0; index < memory.num_spans; ++index) {
    const Span &span = memory.spans[index];
    const int64_t first_block = memory.first_block(span), num_blocks = memory.num_blocks(span);
    for (int64_t row = 0; row < span.num_rows; ++row) {
      if (span.first_row + row < first_row || span.first_row + row >= last_row) continue;
      const int64_t stop = span.num_tokens - span.num_rows + row + 1;
      const int64_t own_first = memory.start(stop) / kBlockPositions - first_block,
                    own_last = (stop - 1) / kBlockPositions + 1 - first_block;
      for (int64_t head = 0; head < shape.num_heads; ++head)
        attention_parts::join(shape, own_parts + ((row * shape.num_heads + head) * num_blocks + own_first) * stride,
                              own_last - own_first, stride,
                              attended + ((span.first_row + row) * shape.num_heads + head) * size);
    }
    own_parts += span.num_rows * shape.num_heads * num_blocks * stride;
  }
}
