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

// Calls `work` with the rows of a pass from `first` to `last`: the row, its position and the number of its span.
template <class Work>
inline void for_rows(const Memory &memory, int64_t first, int64_t last, Work work) {
  for (int64_t number = 0; number < memory.num_spans; ++number) {
    const Span &span = memory.spans[number];
    const int64_t from = first > span.first_row ? first - span.first_row : 0;
    const int64_t to = last < span.first_row + span.num_rows ? last - span.first_row : span.num_rows;
    for (int64_t row = from; row < to; ++row) work(span.first_row + row, span.num_tokens - span.num_rows + row, number);
  }
}

// A block's part of one head of one row: the largest score, the sum of the weights, and the weighted sum of values.
inline int64_t part_size(int64_t head_dim) { return 2 * kLanes + head_dim; }

namespace attention_parts {

// Queries whose sums the registers hold.
#ifdef __AVX512F__
constexpr int kMostQueries = 4;
#else
constexpr int kMostQueries = 1;
#endif
constexpr int64_t kLineNumbers = 32;  // bf16 numbers of a cache line

// A block's keys of one head, turned: words[pair][position] have two channels each.
struct TurnedKeys {
  alignas(64) int32_t words[kMostChannels / 2][kBlockPositions];
};

// What one query sees of a block: the positions from `first` to `last`; and where its part goes.
struct BlockQuery {
  const float *query;
  int64_t first, last;
  float *part;
};

// Exchanges rows and columns.
template <int kWidth = 1>
inline void turn(Words (&rows)[kRegisterLanes]) {
  constexpr Words kLow = kLaneNumbers + (((kLaneNumbers & kWidth) != 0) & (kRegisterLanes - kWidth)),
                  kHigh = kLow + kWidth;
#pragma GCC unroll 16
  for (int row = 0; row < kRegisterLanes; ++row) {
    if (row & kWidth) continue;
    const Words one = rows[row], other = rows[row + kWidth];
    rows[row] = __builtin_shuffle(one, other, kLow);
    rows[row + kWidth] = __builtin_shuffle(one, other, kHigh);
  }
  if constexpr (2 * kWidth < kRegisterLanes) turn<2 * kWidth>(rows);
}

// The positions that a thread reads after these, in the next block or the next sequence. They are fetched meanwhile:
// what lies in another sequence, no processor foresees.
struct Ahead {
  const uint16_t *keys, *values;
  int64_t count, stride;

  void fetch_key(int64_t position, int64_t channel) const {
    if (position < count) __builtin_prefetch(keys + position * stride + channel);
  }
  void fetch_value(int64_t position, int64_t channel) const {
    if (position < count) __builtin_prefetch(values + position * stride + channel);
  }
  void fetch_rest(int64_t first, int64_t head_dim) const {
    for (int64_t position = first; position < count; ++position)
      for (int64_t channel = 0; channel < head_dim; channel += kLineNumbers) {
        fetch_key(position, channel);
        fetch_value(position, channel);
      }
  }
};

// Returns what follows a span's `block`, of the head that begins at `channel`.
inline Ahead ahead_of(const Memory &memory, const Span &span, int64_t block, int64_t channel) {
  const bool is_last = (block + 1) * kBlockPositions >= span.num_tokens && &span + 1 < memory.spans + memory.num_spans;
  const Span &next = *(&span + is_last);
  const int64_t first = (is_last ? memory.first_block(next) : block + 1) * kBlockPositions,
                from = first * memory.token_stride + channel, left = next.num_tokens - first;
  return {memory.keys(next) + from, memory.values(next) + from, left < kBlockPositions ? left : kBlockPositions,
          memory.token_stride};
}

// Turns the keys of `count` positions; words of others are anything.
inline void turn_keys(const HeadShape &shape, const uint16_t *keys, int64_t stride, int64_t count, const Ahead &ahead,
                      TurnedKeys &turned) {
  for (int64_t place = 0; place < count; place += kRegisterLanes)
    for (int64_t pair = 0; pair < shape.head_dim / 2; pair += kRegisterLanes) {
      Words rows[kRegisterLanes];
#pragma GCC unroll 16
      for (int row = 0; row < kRegisterLanes; ++row) {
        const int64_t position = place + row < count ? place + row : count - 1;
        const uint16_t *key = keys + position * stride + 2 * pair;
        ahead.fetch_key(place + row, 2 * pair);
        rows[row] = load<Words>(key);
      }
      turn(rows);
#pragma GCC unroll 16
      for (int row = 0; row < kRegisterLanes; ++row) store(turned.words[pair + row] + place, rows[row]);
    }
}

// Writes each query's scores of all positions of a block.
template <int kQueries>
inline void write_scores(const HeadShape &shape, const TurnedKeys &turned, const BlockQuery *queries,
                         float (*scores)[kBlockPositions]) {
  constexpr int kVectors = kBlockPositions / kRegisterLanes;
#ifdef __AVX512BF16__
  uint16_t rounded[kQueries][kMostChannels];
  for (int own = 0; own < kQueries; ++own)
    for (int64_t place = 0; place < shape.head_dim; place += kLanes)
      write_bf16(rounded[own] + place, load<Floats>(queries[own].query + place));
#endif
  Register sums[kQueries][kVectors]{};
  for (int64_t pair = 0; pair < shape.head_dim / 2; ++pair)
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector) {
      const Words words = load<Words>(turned.words[pair] + vector * kRegisterLanes);
#pragma GCC unroll 4
      for (int own = 0; own < kQueries; ++own) {
        Register &total = sums[own][vector];
#ifdef __AVX512BF16__
        const auto both = (__m512bh)_mm512_set1_epi32(load<int32_t>(rounded[own] + 2 * pair));
        total = (Register)_mm512_dpbf16_ps((__m512)total, (__m512bh)words, both);
#else
        total += (Register)(words << 16) * queries[own].query[2 * pair];
        total += (Register)(words & ~0xFFFF) * queries[own].query[2 * pair + 1];
#endif
      }
    }
  for (int own = 0; own < kQueries; ++own)
    for (int vector = 0; vector < kVectors; ++vector) store(scores[own] + vector * kRegisterLanes, sums[own][vector]);
}

// Turns one query's scores into weights, and begins its part.
inline void weigh(const BlockQuery &query, float *scores) {
  for (int64_t place = 0; place < kBlockPositions; ++place)
    if (place < query.first || place >= query.last) scores[place] = -INFINITY;
  Floats most = load<Floats>(scores), total{};
  for (int64_t place = kLanes; place < kBlockPositions; place += kLanes)
    most = larger(most, load<Floats>(scores + place));
  query.part[0] = largest(most);
  for (int64_t place = 0; place < kBlockPositions; place += kLanes) {
    const Floats weights = exponential(load<Floats>(scores + place) - query.part[0]);
    store(scores + place, weights);
    total += weights;
  }
  query.part[kLanes] = sum(total);
}

// Writes the weighted sums of the values from `first` to `last`, which have all that the queries see.
template <int kQueries>
inline void write_sums(const HeadShape &shape, const uint16_t *values, int64_t stride, const Ahead &ahead,
                       const BlockQuery *queries, const float (*weights)[kBlockPositions], int64_t first,
                       int64_t last) {
  constexpr int kVectors = 64 / kRegisterLanes;
  for (int64_t place = 0; place < shape.head_dim; place += kVectors * kRegisterLanes) {
    const int64_t left = (shape.head_dim - place) / kRegisterLanes, count = left < kVectors ? left : kVectors;
    Register sums[kQueries][kVectors]{};
    for (int64_t position = first; position < last; ++position) {
      const uint16_t *value = values + position * stride + place;
      ahead.fetch_value(position, place);
      ahead.fetch_value(position, place + kLineNumbers);
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector) {
        if (vector == count) break;
        const Register own_value = register_from_bf16(value + vector * kRegisterLanes);
#pragma GCC unroll 4
        for (int own = 0; own < kQueries; ++own) sums[own][vector] += own_value * weights[own][position];
      }
    }
    for (int own = 0; own < kQueries; ++own)
      for (int vector = 0; vector < count; ++vector)
        store(queries[own].part + 2 * kLanes + place + vector * kRegisterLanes, sums[own][vector]);
  }
}

// Writes the parts of up to `kMostQueries` queries.
template <int kQueries = kMostQueries>
inline void write(int64_t num_queries, const HeadShape &shape, const TurnedKeys &turned, const uint16_t *values,
                  int64_t stride, const Ahead &ahead, const BlockQuery *queries) {
  if (num_queries == kQueries) {
    float weights[kQueries][kBlockPositions];
    write_scores<kQueries>(shape, turned, queries, weights);
    int64_t first = kBlockPositions, last = 0;
    for (int own = 0; own < kQueries; ++own) {
      weigh(queries[own], weights[own]);
      first = queries[own].first < first ? queries[own].first : first;
      last = queries[own].last > last ? queries[own].last : last;
    }
    write_sums<kQueries>(shape, values, stride, ahead, queries, weights, first, last);
  } else if constexpr (kQueries > 1) {
    write<kQueries - 1>(num_queries, shape, turned, values, stride, ahead, queries);
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
  attention_parts::TurnedKeys turned;
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
      const int64_t num_written = (span.num_tokens < end ? span.num_tokens : end) - begin;
      const int64_t from = begin * memory.token_stride + kv_head * size;
      const auto ahead = attention_parts::ahead_of(memory, span, first_block + block, kv_head * size);
      attention_parts::turn_keys(shape, memory.keys(span) + from, memory.token_stride, num_written, ahead, turned);
      attention_parts::BlockQuery chosen[attention_parts::kMostQueries];
      int64_t num_chosen = 0;
      const auto write_chosen = [&] {
        attention_parts::write(num_chosen, shape, turned, memory.values(span) + from, memory.token_stride, ahead,
                               chosen);
        num_chosen = 0;
      };
      for (int64_t row = 0; row < span.num_rows; ++row) {
        const int64_t stop = first_new + row + 1, start = memory.start(stop);
        const int64_t first = start > begin ? start - begin : 0, last = (stop < end ? stop : end) - begin;
        for (int64_t head = kv_head * group; first < last && head < (kv_head + 1) * group; ++head) {
          chosen[num_chosen++] = {queries + ((span.first_row + row) * shape.num_heads + head) * size, first, last,
                                  own_parts + ((row * shape.num_heads + head) * num_blocks + block) * stride};
          if (num_chosen == attention_parts::kMostQueries) write_chosen();
        }
      }
      write_chosen();
      ahead.fetch_rest(num_written, size);
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
