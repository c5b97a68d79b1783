// Attention of the last rows of one sequence, each over all positions up to its own, or over a window of them.
//
// Positions are taken in blocks whose bounds depend on no row and no thread, and put together in their order, so a
// row's bits are the same alone and among others, with any number of threads.
#pragma once
#include "attention_rounded.h"
#include "attention_tiles.h"
#include "team.h"

// Rows of a span from which on a thread takes some of them through all blocks. Parts of fewer rows are put together
// once all threads have written theirs.
constexpr int64_t kManyRowsOfSpan = 16;
constexpr int64_t kQueriesTogether = 128;  // that a thread takes through all blocks
constexpr int64_t kMostAtOnce = 16;        // that a block takes at once, at most
constexpr int64_t kTasksOfThread = 4;      // so that threads end at about the same time

inline bool has_many_rows(const Span &span) { return span.num_rows >= kManyRowsOfSpan; }

// Floats of the parts of a span with few rows.
inline int64_t parts_size(const HeadShape &shape, const Span &span) {
  const int64_t num_blocks = (span.num_tokens - 1) / kBlockPositions + 1;
  return has_many_rows(span) ? 0 : span.num_rows * shape.num_heads * num_blocks * part_size(shape.head_dim);
}

// Floats that a thread needs for the queries that it takes through all blocks.
inline int64_t joined_size(const HeadShape &shape) {
  return (std::max(kQueriesTogether, shape.group()) + kMostAtOnce) * part_size(shape.head_dim);
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

// Parts of one query, put together in the order of their blocks, are a part again. Joined to this empty one, the first
// is as it was, and its zeros keep their signs.
inline void begin_joined(const HeadShape &shape, float *joined) {
  for (int64_t place = 0; place < part_size(shape.head_dim); place += kLanes) store(joined + place, filled(-0.0f));
  joined[0] = -INFINITY;
}

// Adds a part to what each of up to `kLanes` queries has.
inline void join(const HeadShape &shape, int64_t count, const BlockQuery *parts, float *const *joined) {
  float befores[kLanes]{}, factors[kLanes]{};
  for (int64_t own = 0; own < count; ++own) {
    const float before = joined[own][0], most = parts[own].part[0] > before ? parts[own].part[0] : before;
    befores[own] = before - most, factors[own] = parts[own].part[0] - most, joined[own][0] = most;
  }
  store(befores, exponential(load<Floats>(befores)));
  store(factors, exponential(load<Floats>(factors)));
  for (int64_t own = 0; own < count; ++own) {
    float *to = joined[own];
    const float *part = parts[own].part, before = befores[own], factor = factors[own];
    to[kWeights] = to[kWeights] * before + part[kWeights] * factor;
    for (int64_t place = kSums; place < kSums + shape.head_dim; place += kLanes)
      store(to + place, load<Floats>(to + place) * before + load<Floats>(part + place) * factor);
  }
}

inline void finish_joined(const HeadShape &shape, const float *joined, float *output) {
  for (int64_t place = 0; place < shape.head_dim; place += kLanes)
    store(output + place, load<Floats>(joined + kSums + place) / joined[kWeights]);
}

// Runs a thread's share of tasks: `list` calls what it gets with the work that each is, and with what it does.
template <class List>
inline void share(const Member &member, List list) {
  int64_t all = 0, done = 0;
  list([&](int64_t work, auto) { all += work; });
  const int64_t first = member.first(all), last = member.last(all);
  list([&](int64_t work, auto run) {
    if (done >= first && done < last) run();
    done += work;
  });
}

// The rows of a pass, and what attention makes of them: queries `[rows, num_heads, head_dim]`, rotated and scaled,
// whose place the results take; keys and values `[rows, num_kv_heads, head_dim]`. All threads know them. Parts are all
// threads', `joined` is this one's.
struct Attention {
  const HeadShape &shape;
  const Memory &memory;
  float *queries;
  const float *keys, *values;
  float *parts, *joined;

  // Writes the rows' keys and values and attends, to rounded ones if that is wanted and there are any. Each thread gets
  // the rows from `first_row` to `last_row`.
  void run(const Member &member, int64_t first_row, int64_t last_row, bool to_rounded) const {
    to_rounded = to_rounded && RoundedBlock::takes(memory);
    if (to_rounded)
      attend<RoundedBlock>(member);
    else if (TileBlock::takes(shape))
      attend<TileBlock>(member);
    else
      attend<VectorBlock>(member);
    member.wait();
    if (to_rounded && member.index == 0) note_filled();
    join_parts(first_row, last_row);
  }

 private:
  template <class WayOfBlock>
  void attend(const Member &member) const {
    WayOfBlock way(shape);
    const Span *begin = memory.spans, *end = begin + memory.num_spans;
    if (std::any_of(begin, end, has_many_rows)) {
      share(member, [&](auto add) {
        for (const Span *span = begin; span < end; ++span)
          if (has_many_rows(*span))
            for_blocks(*span, [&](const BlockPlace &place) { add(1, [&] { way.fill(written(place)); }); });
      });
      member.wait();
    }
    share(member, [&](auto add) {
      float *own_parts = parts;
      for (const Span *span = begin; span < end; ++span) {
        const int64_t rows = rows_together(*span, member.num_threads);
        if (has_many_rows(*span))
          for (int64_t first = 0; first < span->num_rows; first += rows)
            for (int64_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head)
              add(first_new(*span) + first + rows - memory.start(first_new(*span) + first + 1),
                  [&] { take_through(way, *span, kv_head, first, std::min(first + rows, span->num_rows)); });
        else
          for_blocks(*span, [&](const BlockPlace &place) {
            add(1, [&] { write_parts(way, written(place), own_parts); });
          });
        own_parts += parts_size(shape, *span);
      }
    });
  }

  // The rows of a span that a thread takes through all blocks at once: fewer where threads would get too few tasks.
  int64_t rows_together(const Span &span, int64_t num_threads) const {
    const int64_t group = shape.group(), even = span.num_rows * shape.num_kv_heads / (kTasksOfThread * num_threads);
    return std::max(std::min(kQueriesTogether / group, even), (kMostAtOnce + group - 1) / group);
  }

  static int64_t first_new(const Span &span) { return span.num_tokens - span.num_rows; }

  template <class Work>
  void for_blocks(const Span &span, Work work) const {
    for (int64_t block = memory.first_block(span); block * kBlockPositions < span.num_tokens; ++block)
      for (int64_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head)
        work(BlockPlace::of(memory, span, block, kv_head));
  }

  // Writes the new keys and values of a block.
  const BlockPlace &written(const BlockPlace &place) const {
    const Span &span = place.span;
    const int64_t begin = place.block * kBlockPositions;
    for (int64_t position = std::max(begin, first_new(span)); position < begin + place.count; ++position) {
      const int64_t row = span.first_row + position - first_new(span);
      const int64_t from = (row * shape.num_kv_heads + place.kv_head) * shape.head_dim;
      write_token(shape, memory, span, position, place.kv_head, keys + from, values + from);
    }
    return place;
  }

  // Calls `work` with each of some rows' queries that see something of a block: its number in the pass, and what it
  // sees.
  template <class Work>
  void for_queries(const BlockPlace &place, int64_t first_row, int64_t last_row, Work work) const {
    const int64_t begin = place.block * kBlockPositions, end = begin + kBlockPositions, group = shape.group();
    for (int64_t row = first_row; row < last_row; ++row) {
      const int64_t stop = first_new(place.span) + row + 1, start = memory.start(stop);
      const int64_t first = start > begin ? start - begin : 0, last = (stop < end ? stop : end) - begin;
      const int64_t query = (place.span.first_row + row) * shape.num_heads + place.kv_head * group;
      for (int64_t own = query; first < last && own < query + group; ++own)
        work(own, BlockQuery{queries + own * shape.head_dim, first, last, nullptr});
    }
  }

  template <class WayOfBlock>
  void write_parts(WayOfBlock &way, const BlockPlace &place, float *own_parts) const {
    const Span &span = place.span;
    const int64_t num_blocks = memory.num_blocks(span), block = place.block - memory.first_block(span);
    way.fill(place);
    way.begin(place, span.num_rows * shape.group());
    BlockQuery chosen[WayOfBlock::kMostQueries];
    int64_t count = 0;
    for_queries(place, 0, span.num_rows, [&](int64_t query, BlockQuery own) {
      const int64_t number = query - span.first_row * shape.num_heads;
      own.part = own_parts + (number * num_blocks + block) * part_size(shape.head_dim);
      chosen[count++] = own;
      if (count == WayOfBlock::kMostQueries) way.write(count, chosen), count = 0;
    });
    if (count) way.write(count, chosen);
    way.end();
  }

  // Takes a head's queries of some rows of a span through all blocks.
  template <class WayOfBlock>
  void take_through(WayOfBlock &way, const Span &span, int64_t kv_head, int64_t first_row, int64_t last_row) const {
    static_assert(WayOfBlock::kMostQueries <= kMostAtOnce && kMostAtOnce <= kLanes);
    const int64_t group = shape.group(), stride = part_size(shape.head_dim);
    const int64_t num_queries = (last_row - first_row) * group, last_position = first_new(span) + last_row;
    const int64_t first_query = (span.first_row + first_row) * shape.num_heads + kv_head * group;
    // A query's place among these.
    const auto place_of = [&](int64_t query) {
      const int64_t number = query - first_query;
      return joined + (number / shape.num_heads * group + number % shape.num_heads) * stride;
    };
    float *own_parts = joined + num_queries * stride;
    for (int64_t own = 0; own < num_queries; ++own) begin_joined(shape, joined + own * stride);
    const int64_t first_position = memory.start(first_new(span) + first_row + 1);
    for (int64_t block = first_position / kBlockPositions; block * kBlockPositions < last_position; ++block) {
      const BlockPlace place = BlockPlace::of(memory, span, block, kv_head);
      way.begin(place, num_queries);
      BlockQuery chosen[WayOfBlock::kMostQueries];
      float *places[WayOfBlock::kMostQueries];
      int64_t count = 0;
      const auto attend_chosen = [&] {
        way.write(count, chosen);
        join(shape, count, chosen, places);
        count = 0;
      };
      for_queries(place, first_row, last_row, [&](int64_t query, BlockQuery own) {
        own.part = own_parts + count * stride;
        chosen[count] = own, places[count++] = place_of(query);
        if (count == WayOfBlock::kMostQueries) attend_chosen();
      });
      if (count) attend_chosen();
      way.end();
    }
    for (int64_t row = 0; row < last_row - first_row; ++row)
      for (int64_t head = 0; head < group; ++head) {
        const int64_t query = first_query + row * shape.num_heads + head;
        finish_joined(shape, place_of(query), queries + query * shape.head_dim);
      }
  }

  // Puts the parts of the rows from `first_row` to `last_row` together, after all threads' are written.
  void join_parts(int64_t first_row, int64_t last_row) const {
    const int64_t stride = part_size(shape.head_dim);
    float *own_parts = parts;
    for (const Span *span = memory.spans; span < memory.spans + memory.num_spans; ++span) {
      const int64_t first_block = memory.first_block(*span), num_blocks = memory.num_blocks(*span);
      for (int64_t row = 0; row < (has_many_rows(*span) ? 0 : span->num_rows); ++row) {
        if (span->first_row + row < first_row || span->first_row + row >= last_row) continue;
        const int64_t stop = first_new(*span) + row + 1;
        const int64_t own_first = memory.start(stop) / kBlockPositions - first_block,
                      own_last = (stop - 1) / kBlockPositions + 1 - first_block;
        DASH_CHECK(own_first >= 0 && own_first < own_last && own_last <= num_blocks);
        for (int64_t head = 0, count; head < shape.num_heads; head += count) {
          count = std::min(shape.num_heads - head, kMostAtOnce);
          BlockQuery own[kMostAtOnce];
          float *places[kMostAtOnce];
          for (int64_t next = 0; next < count; ++next) {
            places[next] = joined + next * stride;
            own[next].part = own_parts + ((row * shape.num_heads + head + next) * num_blocks + own_first) * stride;
            std::memcpy(places[next], own[next].part, stride * sizeof *joined);
          }
          for (int64_t part = own_first + 1; part < own_last; ++part) {
            for (int64_t next = 0; next < count; ++next) own[next].part += stride;
            join(shape, count, own, places);
          }
          const int64_t query = (span->first_row + row) * shape.num_heads + head;
          for (int64_t next = 0; next < count; ++next)
            finish_joined(shape, places[next], queries + (query + next) * shape.head_dim);
        }
      }
      own_parts += parts_size(shape, *span);
    }
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
