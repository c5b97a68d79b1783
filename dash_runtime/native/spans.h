// The keys and values of a pass's sequences, and the blocks of positions that attention takes.
#pragma once
#include <algorithm>

#include "vectors.h"

constexpr int64_t kBlockPositions = 64;
constexpr int64_t kRoundedPositions = 16;         // whose rounded keys and values lie together
constexpr int64_t kMostChannels = 512;            // of a head
constexpr int64_t kLineNumbers = kLineBytes / 2;  // in bf16

struct HeadShape {
  int64_t num_heads, num_kv_heads, head_dim;
  double attention_scale;

  int64_t group() const { return num_heads / num_kv_heads; }
};

// The positions whose rounded keys and values are written, up to the one before `last`.
struct Filled {
  int64_t first, last;
};

// Consecutive rows of one sequence, and its keys and values from its first position on. A pass has one for each of its
// sequences.
struct Span {
  char *memory;                       // of layer 0
  int64_t layer_bytes, values_bytes;  // from layer to layer, and from keys to values
  int64_t num_tokens;                 // the rows' own among them
  int64_t first_row, num_rows;
  char *rounded;          // of layer 0; null for none
  int64_t rounded_bytes;  // from layer to layer
  Filled *filled;         // by layer
};

// The spans of a pass in one layer.
struct Memory {
  const Span *spans;
  int64_t num_spans, token_stride;  // token_stride in elements
  int64_t window;                   // 0 for none
  int64_t layer;

  uint16_t *keys(const Span &span) const {
    return reinterpret_cast<uint16_t *>(span.memory + layer * span.layer_bytes);
  }
  uint16_t *values(const Span &span) const {
    return reinterpret_cast<uint16_t *>(span.memory + layer * span.layer_bytes + span.values_bytes);
  }
  int64_t start(int64_t end) const { return window && end > window ? end - window : 0; }
  // The first position that a span's first row sees. Rounded keys and values are read in whole tiles.
  int64_t first_seen(const Span &span) const { return start(span.num_tokens - span.num_rows + 1); }
  int64_t first_block(const Span &span) const { return first_seen(span) / kBlockPositions; }
  int64_t first_rounded(const Span &span) const { return first_seen(span) / kRoundedPositions * kRoundedPositions; }
  int64_t num_blocks(const Span &span) const { return (span.num_tokens - 1) / kBlockPositions + 1 - first_block(span); }
};

// A block of one span's positions for one head, and how many of them there are.
struct BlockPlace {
  const Memory &memory;
  const Span &span;
  int64_t block, kv_head, count;

  static BlockPlace of(const Memory &memory, const Span &span, int64_t block, int64_t kv_head) {
    const int64_t count = std::min(span.num_tokens - block * kBlockPositions, kBlockPositions);
    return {memory, span, block, kv_head, count};
  }

  // The block that is read after this one; an empty one after the last.
  BlockPlace next() const {
    const bool is_last =
        (block + 1) * kBlockPositions >= span.num_tokens && &span + 1 < memory.spans + memory.num_spans;
    const Span &own = *(&span + is_last);
    return of(memory, own, is_last ? memory.first_block(own) : block + 1, kv_head);
  }
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

// Fetches the next block's keys and values while one is read, line by line: processors foresee what follows in memory,
// but not what lies in another sequence.
class NextBlock {
 public:
  NextBlock() = default;

  // So many of its lines of keys, and as many of values.
  NextBlock(const char *keys, const char *values, int64_t num_lines)
      : keys_(keys), values_(values), num_lines_(num_lines) {}

  // Fetches so many lines of keys and of values, if there are any left.
  void fetch(int64_t count) {
    for (const char *last = keys_ + kLineBytes * (count < num_lines_ ? count : num_lines_); keys_ < last;
         keys_ += kLineBytes, values_ += kLineBytes, --num_lines_) {
      __builtin_prefetch(keys_, 0, kCache);
      __builtin_prefetch(values_, 0, kCache);
    }
  }
  void fetch_rest() { fetch(num_lines_); }

 private:
#ifdef __AMX_BF16__
  static constexpr int kCache = 2;  // the second one, which has room for them
#else
  static constexpr int kCache = 3;  // the nearest: a Zen 5 is slower to fetch into the second
#endif
  const char *keys_ = nullptr, *values_ = nullptr;
  int64_t num_lines_ = 0;
};

// Keys and values of one head.
struct HeadBlock {
  const uint16_t *keys, *values;
  int64_t count, stride;  // positions, and numbers from one to the next
  NextBlock next;
};

// Returns the keys and values of a block. The heads share the lines of the next one.
inline HeadBlock block_of(const HeadShape &shape, const BlockPlace &place) {
  DASH_CHECK(place.block >= 0 && place.count >= 0 && place.kv_head >= 0 && place.kv_head < shape.num_kv_heads);
  DASH_CHECK(place.block * kBlockPositions + place.count <= place.span.num_tokens);
  const Memory &memory = place.memory;
  const int64_t stride = memory.token_stride,
                from = place.block * kBlockPositions * stride + place.kv_head * shape.head_dim;
  const BlockPlace next = place.next();
  const int64_t num_lines = std::max<int64_t>(next.count, 0) * stride / kLineNumbers;
  const int64_t first = num_lines * place.kv_head / shape.num_kv_heads,
                last = num_lines * (place.kv_head + 1) / shape.num_kv_heads;
  const int64_t next_from = next.block * kBlockPositions * stride + first * kLineNumbers;
  return {memory.keys(place.span) + from, memory.values(place.span) + from, place.count, stride,
          NextBlock(reinterpret_cast<const char *>(memory.keys(next.span) + next_from),
                    reinterpret_cast<const char *>(memory.values(next.span) + next_from), last - first)};
}

// One query's part of a block: the positions that it sees, from `first` to `last`, and the memory of its result: the
// largest score, the sum of the weights, and the weighted sum of values.
struct BlockQuery {
  const float *query;
  int64_t first, last;
  float *part;
};

constexpr int kWeights = 1, kSums = kLanes;  // where these lie in a part

inline int64_t part_size(int64_t head_dim) { return kSums + head_dim; }

// Turns one query's scores into weights, and begins its part.
inline void weigh(const BlockQuery &query, float *scores) {
  DASH_CHECK(query.first >= 0 && query.first < query.last && query.last <= kBlockPositions);
  if (query.first > 0 || query.last < kBlockPositions)
    for (int place = 0; place < kBlockPositions; place += kLanes) {
      const Ints number = kNumbers + place;
      const Ints is_seen = (number >= static_cast<int>(query.first)) & (number < static_cast<int>(query.last));
      store(scores + place, is_seen ? load<Floats>(scores + place) : filled(-INFINITY));
    }
  Floats most = load<Floats>(scores), total{};
  for (int64_t place = kLanes; place < kBlockPositions; place += kLanes)
    most = larger(most, load<Floats>(scores + place));
  query.part[0] = largest(most);
  for (int64_t place = 0; place < kBlockPositions; place += kLanes) {
    const Floats weights = exponential(load<Floats>(scores + place) - query.part[0]);
    store(scores + place, weights);
    total += weights;
  }
  query.part[kWeights] = sum(total);
}
