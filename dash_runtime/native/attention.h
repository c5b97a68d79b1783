// Attention of the last rows of one sequence, each over all positions up to its own, or over a window of them.
//
// Positions are taken in blocks whose bounds depend on no row and no thread, and put together in their order, so a
// row's bits are the same alone and among others, with any number of threads.
#pragma once
#include "attention_rounded.h"
#include "attention_tiles.h"
#include "team.h"

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
  DASH_CHECK(position >= 0 && position < span.num_tokens && kv_head >= 0 && kv_head < shape.num_kv_heads);
  const int64_t to = position * memory.token_stride + kv_head * shape.head_dim;
  for (int64_t place = 0; place < shape.head_dim; place += kLanes) {
    write_bf16(memory.keys(span) + to + place, load<Floats>(key + place));
    write_bf16(memory.values(span) + to + place, load<Floats>(value + place));
  }
}

// Puts a row's parts of one head together.
inline void join(const HeadShape &shape, const float *parts, int64_t num_parts, int64_t stride, float *output) {
  float most = -INFINITY;
  for (int64_t part = 0; part < num_parts; ++part) most = parts[part * stride] > most ? parts[part * stride] : most;
  Floats weights{};
  Floats sums[kMostChannels / kLanes]{};
  const int64_t count = shape.head_dim / kLanes;
  for (int64_t part = 0; part < num_parts; ++part) {
    const float *own = parts + part * stride;
    const Floats factor = exponential(filled(own[0] - most));
    weights += factor * own[kWeights];
    for (int64_t place = 0; place < count; ++place) sums[place] += factor * load<Floats>(own + kSums + place * kLanes);
  }
  for (int64_t place = 0; place < count; ++place) store(output + place * kLanes, sums[place] / weights);
}

// The rows of a pass, and what attention makes of them: queries `[rows, num_heads, head_dim]`, rotated and scaled, keys
// and values `[rows, num_kv_heads, head_dim]`, known to all threads; parts; and `attended`, `[rows, num_heads,
// head_dim]`.
struct Attention {
  const HeadShape &shape;
  const Memory &memory;
  const float *queries, *keys, *values;
  float *parts, *attended;

  // Calls `work` with each span, where its parts begin, and the number of its first task.
  template <class Work>
  void for_spans(Work work) const {
    int64_t task = 0;
    float *own_parts = parts;
    for (int64_t index = 0; index < memory.num_spans; ++index) {
      const Span &span = memory.spans[index];
      const int64_t num_blocks = memory.num_blocks(span);
      work(span, own_parts, task);
      task += num_blocks * shape.num_kv_heads;
      own_parts += span.num_rows * shape.num_heads * num_blocks * part_size(shape.head_dim);
    }
  }

  // Writes new keys and values, and this thread's share of the parts: of so many blocks of a head.
  template <class WayOfBlock>
  void write_parts(const Member &member) const {
    const int64_t size = shape.head_dim, group = shape.group(), stride = part_size(size);
    int64_t num_tasks = 0;
    for_spans([&](const Span &span, float *, int64_t) { num_tasks += memory.num_blocks(span) * shape.num_kv_heads; });
    const int64_t first_task = member.first(num_tasks), last_task = member.last(num_tasks);
    WayOfBlock way(shape);
    for_spans([&](const Span &span, float *own_parts, int64_t task) {
      const int64_t first_block = memory.first_block(span), num_blocks = memory.num_blocks(span);
      const int64_t first_new = span.num_tokens - span.num_rows;
      for (int64_t own = task < first_task ? first_task - task : 0;
           own < num_blocks * shape.num_kv_heads && task + own < last_task; ++own) {
        const int64_t block = own / shape.num_kv_heads, kv_head = own % shape.num_kv_heads;
        const int64_t begin = (first_block + block) * kBlockPositions, end = begin + kBlockPositions;
        // New keys and values are written by whoever reads them.
        for (int64_t row = 0; row < span.num_rows; ++row) {
          const int64_t from = ((span.first_row + row) * shape.num_kv_heads + kv_head) * size;
          if (first_new + row >= begin && first_new + row < end)
            write_token(shape, memory, span, first_new + row, kv_head, keys + from, values + from);
        }
        way.begin(BlockPlace::of(memory, span, first_block + block, kv_head), span.num_rows * group);
        BlockQuery chosen[WayOfBlock::kMostQueries];
        int64_t num_chosen = 0;
        for (int64_t row = 0; row < span.num_rows; ++row) {
          const int64_t stop = first_new + row + 1, start = memory.start(stop);
          const int64_t first = start > begin ? start - begin : 0, last = (stop < end ? stop : end) - begin;
          for (int64_t head = kv_head * group; first < last && head < (kv_head + 1) * group; ++head) {
            chosen[num_chosen++] = {queries + ((span.first_row + row) * shape.num_heads + head) * size, first, last,
                                    own_parts + ((row * shape.num_heads + head) * num_blocks + block) * stride};
            if (num_chosen == WayOfBlock::kMostQueries) way.write(num_chosen, chosen), num_chosen = 0;
          }
        }
        if (num_chosen) way.write(num_chosen, chosen);
        way.end();
      }
    });
  }

  // Puts the parts of the rows from `first_row` to `last_row` together, after all threads' are written.
  void join_parts(int64_t first_row, int64_t last_row) const {
    const int64_t size = shape.head_dim, stride = part_size(size);
    for_spans([&](const Span &span, const float *own_parts, int64_t) {
      const int64_t first_block = memory.first_block(span), num_blocks = memory.num_blocks(span);
      for (int64_t row = 0; row < span.num_rows; ++row) {
        if (span.first_row + row < first_row || span.first_row + row >= last_row) continue;
        const int64_t stop = span.num_tokens - span.num_rows + row + 1;
        const int64_t own_first = memory.start(stop) / kBlockPositions - first_block,
                      own_last = (stop - 1) / kBlockPositions + 1 - first_block;
        DASH_CHECK(own_first >= 0 && own_first < own_last && own_last <= num_blocks);
        for (int64_t head = 0; head < shape.num_heads; ++head)
          join(shape, own_parts + ((row * shape.num_heads + head) * num_blocks + own_first) * stride,
               own_last - own_first, stride, attended + ((span.first_row + row) * shape.num_heads + head) * size);
      }
    });
  }

  // Writes the rows' keys and values and attends, to rounded ones if that is wanted and there are any. Each thread gets
  // the rows from `first_row` to `last_row`.
  void run(const Member &member, int64_t first_row, int64_t last_row, bool to_rounded) const {
    to_rounded = to_rounded && RoundedBlock::takes(memory);
    if (to_rounded)
      write_parts<RoundedBlock>(member);
    else if (TileBlock::takes(shape))
      write_parts<TileBlock>(member);
    else
      write_parts<VectorBlock>(member);
    member.wait();
    if (to_rounded && member.index == 0) note_filled();
    join_parts(first_row, last_row);
  }

  void note_filled() const {
    for (const Span *span = memory.spans; span < memory.spans + memory.num_spans; ++span) {
      const int64_t start = memory.first_rounded(*span);
      Filled &filled = span->filled[memory.layer];
      if (filled.first > start || filled.last < start) filled.first = start;
      filled.last = span->num_tokens;
    }
  }
};
