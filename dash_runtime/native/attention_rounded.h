// A block's part of attention by products of bytes, over keys and values in INT8: half of what bf16 ones take to read.
//
// These are written from the bf16 ones, by whoever reads them first, and depend on nothing else. They lie as the
// processor multiplies four bytes: for 16 positions, a head's keys by four channels, and its values by four positions.
#pragma once
#include "attention_vectors.h"

#ifdef __AVX512VNNI__

// Returns the largest absolute value of a head's channels, of which `read` returns 16.
template <class Read>
inline float bound_of(const HeadShape &shape, Read read) {
  Floats most{};
  for (int64_t channel = 0; channel < shape.head_dim; channel += kLanes) {
    const Floats own = read(channel);
    most = larger(most, larger(own, -own));
  }
  return largest(most);
}

// Keys and values of 16 positions of one head. Keys are what is added to the first of them: much of a key is what all
// have in common.
struct RoundedTile {
  uint8_t *keys;                     // [head_dim / 4, 16 positions, 4], 128 higher
  int8_t *values;                    // [4, head_dim, 4 positions]
  float *key_scales, *value_scales;  // [16 positions]
  uint16_t *first_key;               // bf16

  static int64_t size(const HeadShape &shape) {
    const int64_t size = 2 * (kRoundedPositions * (shape.head_dim + int64_t{sizeof(float)}) + shape.head_dim);
    return (size + kLineBytes - 1) / kLineBytes * kLineBytes;
  }

  RoundedTile(const HeadShape &shape, char *memory)
      : keys(reinterpret_cast<uint8_t *>(memory)),
        values(reinterpret_cast<int8_t *>(memory + kRoundedPositions * shape.head_dim)),
        key_scales(reinterpret_cast<float *>(memory + 2 * kRoundedPositions * shape.head_dim)),
        value_scales(key_scales + kLanes),
        first_key(reinterpret_cast<uint16_t *>(value_scales + kLanes)) {}

  // Writes those of the position `place`, from bf16 ones and the first key.
  void write(const HeadShape &shape, int64_t place, const uint16_t *key, const uint16_t *value, const uint16_t *first) {
    if (!place) std::memcpy(first_key, first, shape.head_dim * sizeof *first);
    int32_t fours[kMostChannels / 4];
    key_scales[place] = write_rounded(
        shape, [&](int64_t channel) { return from_bf16(key + channel) - from_bf16(first + channel); },
        [&](int64_t channel, __m512i numbers) {
          store(fours + channel / 4, _mm_xor_si128(_mm512_cvtepi32_epi8(numbers), _mm_set1_epi8(-128)));
        });
    for (int64_t own = 0; own < shape.head_dim / 4; ++own)
      store(keys + (own * kRoundedPositions + place) * 4, fours[own]);
    const int shift = static_cast<int>(place % 4 * 8);
    const __m512i byte = _mm512_set1_epi32(0xFF << shift);
    value_scales[place] = write_rounded(
        shape, [&](int64_t channel) { return from_bf16(value + channel); },
        [&](int64_t channel, __m512i numbers) {
          int8_t *to = values + (place / 4 * shape.head_dim + channel) * 4;
          const __m512i moved = _mm512_and_si512(_mm512_slli_epi32(numbers, shift), byte);
          store(to, _mm512_or_si512(_mm512_andnot_si512(byte, load<__m512i>(to)), moved));
        });
  }

 private:
  // Calls `write` with numbers of 16 channels; returns what they are multiples of.
  template <class Read, class Write>
  static float write_rounded(const HeadShape &shape, Read read, Write write) {
    const float bound = bound_of(shape, read), factor = bound > 0 ? 127 / bound : 0;
    for (int64_t channel = 0; channel < shape.head_dim; channel += kLanes)
      write(channel, _mm512_cvtps_epi32((__m512)(read(channel) * factor)));
    return bound / 127;
  }
};

// Takes up to `kMostQueries` queries at once.
class RoundedBlock {
 public:
  static constexpr bool is_here = true;
  static constexpr int kMostQueries = 4;

  static bool takes(const Memory &memory) { return memory.num_spans && memory.spans->rounded; }

  explicit RoundedBlock(const HeadShape &shape) : shape_(shape) {}

  // Writes what a block lacks: new positions, and those that were only needed in bf16 so far.
  void fill(const BlockPlace &place) {
    set_tiles(place);
    const Memory &memory = place.memory;
    const Span &span = place.span;
    const Filled &filled = span.filled[memory.layer];
    const int64_t first = place.block * kBlockPositions, last = first + place.count;
    const int64_t needed = std::max(first, memory.first_rounded(span)), first_new = span.num_tokens - span.num_rows;
    const int64_t missing = filled.first <= needed ? std::max(needed, std::min(filled.last, first_new)) : needed;
    for (int64_t position = missing; position < last; ++position) {
      const int64_t in_tile = position % kRoundedPositions;
      const int64_t from = position * memory.token_stride + place.kv_head * shape_.head_dim;
      const uint16_t *key = memory.keys(span) + from, *value = memory.values(span) + from;
      own_tile((position - first) / kRoundedPositions)
          .write(shape_, in_tile, key, value, key - in_tile * memory.token_stride);
    }
  }

  void begin(const BlockPlace &place, int64_t) {
    set_tiles(place);
    const BlockPlace next = place.next();
    next_ = {};
    if (next.count <= 0) return;
    // The heads share its lines.
    const int64_t num_lines = num_tiles(next) * step_ / kLineBytes;
    const int64_t first = num_lines * place.kv_head / shape_.num_kv_heads,
                  last = num_lines * (place.kv_head + 1) / shape_.num_kv_heads;
    const char *lines = tiles_of(next) + first * kLineBytes;
    const int64_t half = (last - first) / 2;
    next_ = NextBlock(lines, lines + half * kLineBytes, half);
  }

  // Writes the parts of up to `kMostQueries` queries.
  template <int kQueries = kMostQueries>
  void write(int64_t num_queries, const BlockQuery *queries) {
    if (num_queries == kQueries) {
      float weights[kQueries][kBlockPositions];
      write_scores<kQueries>(queries, weights);
      for (int own = 0; own < kQueries; ++own) weigh(queries[own], weights[own]);
      write_sums<kQueries>(queries, weights);
    } else if constexpr (kQueries > 1) {
      write<kQueries - 1>(num_queries, queries);
    }
  }

  void end() { next_.fetch_rest(); }

 private:
  void set_tiles(const BlockPlace &place) {
    step_ = RoundedTile::size(shape_) * shape_.num_kv_heads;
    tiles_ = tiles_of(place) + place.kv_head * RoundedTile::size(shape_);
    num_tiles_ = num_tiles(place);
  }

  // Returns the first byte of a block, all heads together.
  char *tiles_of(const BlockPlace &place) const {
    return place.span.rounded + place.memory.layer * place.span.rounded_bytes +
           place.block * (kBlockPositions / kRoundedPositions) * step_;
  }
  static int64_t num_tiles(const BlockPlace &place) {
    return (place.count + kRoundedPositions - 1) / kRoundedPositions;
  }

  RoundedTile own_tile(int64_t number) const {
    DASH_CHECK(number >= 0 && number < num_tiles_);
    return {shape_, tiles_ + number * step_};
  }

  static __m512i four(const void *bytes) { return _mm512_set1_epi32(load<int32_t>(bytes)); }

  // A query's numbers of two bytes, each with a sign, and what they are multiplied by.
  struct Query {
    int8_t bytes[2][kMostChannels];  // the high ones first
    int32_t firsts[2];               // what sums with keys that are 128 too high begin with
    float scale;

    void round(const HeadShape &shape, const float *query) {
      constexpr float kMost = 32512;  // its high byte is 127
      const float bound = bound_of(shape, [&](int64_t channel) { return load<Floats>(query + channel); });
      const float factor = bound > 0 ? kMost / bound : 0;
      __m512i totals[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t channel = 0; channel < shape.head_dim; channel += kLanes) {
        const __m512i own = _mm512_cvtps_epi32((__m512)(load<Floats>(query + channel) * factor));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(own, _mm512_set1_epi32(128)), 8);
        const __m512i halves[] = {high, _mm512_sub_epi32(own, _mm512_slli_epi32(high, 8))};
        for (int half = 0; half < 2; ++half) {
          totals[half] = _mm512_add_epi32(totals[half], halves[half]);
          store(bytes[half] + channel, _mm512_cvtepi32_epi8(halves[half]));
        }
      }
      for (int half = 0; half < 2; ++half)
        firsts[half] = sum(_mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), totals[half]), 7));
      scale = bound / kMost;
    }
  };

  // Writes each query's scores of all positions.
  template <int kQueries>
  void write_scores(const BlockQuery *queries, float (*scores)[kBlockPositions]) {
    Query rounded[kQueries];
    for (int own = 0; own < kQueries; ++own) rounded[own].round(shape_, queries[own].query);
    int64_t number = 0;
    for (; number + 2 <= num_tiles_; number += 2) write_scores<kQueries, 2>(number, queries, rounded, scores);
    if (number < num_tiles_) write_scores<kQueries, 1>(number, queries, rounded, scores);
  }

  template <int kQueries, int kTiles>
  void write_scores(int64_t number, const BlockQuery *queries, const Query *rounded, float (*scores)[kBlockPositions]) {
    __m512i sums[kTiles][kQueries][2];
    for (auto &tile : sums)
      for (int own = 0; own < kQueries; ++own)
        for (int half = 0; half < 2; ++half) tile[own][half] = _mm512_set1_epi32(rounded[own].firsts[half]);
    const uint8_t *keys[] = {own_tile(number).keys, own_tile(number + kTiles - 1).keys};
    for (int64_t channel = 0; channel < shape_.head_dim; channel += 4) {
      next_.fetch(1);
#pragma GCC unroll 2
      for (int next = 0; next < kTiles; ++next) {
        const auto own_keys = load<__m512i>(keys[next] + channel * kRoundedPositions);
#pragma GCC unroll 4
        for (int own = 0; own < kQueries; ++own)
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
            sums[next][own][half] =
                _mm512_dpbusd_epi32(sums[next][own][half], own_keys, four(rounded[own].bytes[half] + channel));
      }
    }
    for (int next = 0; next < kTiles; ++next) {
      const RoundedTile tile = own_tile(number + next);
      const Floats key_scales = load<Floats>(tile.key_scales);
      for (int own = 0; own < kQueries; ++own) {
        Floats first{};
        for (int64_t channel = 0; channel < shape_.head_dim; channel += kLanes)
          first += from_bf16(tile.first_key + channel) * load<Floats>(queries[own].query + channel);
        const Floats high = (Floats)_mm512_cvtepi32_ps(sums[next][own][0]),
                     low = (Floats)_mm512_cvtepi32_ps(sums[next][own][1]);
        // By name: where a product and its sum become one instruction differs between kernels, if compilers choose.
        store(scores[own] + (number + next) * kRoundedPositions,
              _mm512_fmadd_ps((__m512)((high * 256.0f + low) * rounded[own].scale), (__m512)key_scales,
                              (__m512)filled(sum(first))));
      }
    }
  }

  // Writes the weighted sums of values. Weights are rounded to two bytes.
  template <int kQueries>
  void write_sums(const BlockQuery *queries, const float (*weights)[kBlockPositions]) {
    uint8_t high[kQueries][kBlockPositions], low[kQueries][kBlockPositions];
    float scales[kQueries];
    for (int own = 0; own < kQueries; ++own) scales[own] = round_weights(weights[own], high[own], low[own]);
    for (int64_t channel = 0; channel < shape_.head_dim; channel += 2 * kLanes) {
      if (channel + kLanes < shape_.head_dim)
        write_sums<kQueries, 2>(queries, channel, high, low, scales);
      else
        write_sums<kQueries, 1>(queries, channel, high, low, scales);
    }
  }

  // Returns what the numbers of two bytes are multiplied by.
  float round_weights(const float *weights, uint8_t *high, uint8_t *low) const {
    constexpr float kMost = 65535;
    Floats scaled[kBlockPositions / kLanes]{}, most{};
    for (int64_t number = 0; number < num_tiles_; ++number) {
      const Floats own = load<Floats>(weights + number * kLanes);
      // Scales of positions that nobody sees may be anything.
      scaled[number] = own == 0.0f ? own : own * load<Floats>(own_tile(number).value_scales);
      most = larger(most, scaled[number]);
    }
    const float bound = largest(most), factor = bound > 0 ? kMost / bound : 0;
    for (int64_t number = 0; number < num_tiles_; ++number) {
      const __m512i own = _mm512_cvtps_epi32((__m512)(scaled[number] * factor));
      store(high + number * kLanes, _mm512_cvtepi32_epi8(_mm512_srli_epi32(own, 8)));
      store(low + number * kLanes, _mm512_cvtepi32_epi8(own));
    }
    return bound / kMost;
  }

  // Adds up `kVectors` times 16 channels.
  template <int kQueries, int kVectors>
  void write_sums(const BlockQuery *queries, int64_t channel, const uint8_t (*high)[kBlockPositions],
                  const uint8_t (*low)[kBlockPositions], const float *scales) {
    __m512i sums[2][kVectors][kQueries];
    for (auto &half : sums)
      for (auto &vector : half)
        for (auto &own : vector) own = _mm512_setzero_si512();
    for (int64_t number = 0; number < num_tiles_; ++number)
      for (int64_t place = 0; place < kRoundedPositions / 4; ++place) {
        next_.fetch(1);
        const int64_t position = number * kRoundedPositions + 4 * place;
        const int8_t *values = own_tile(number).values + (place * shape_.head_dim + channel) * 4;
#pragma GCC unroll 2
        for (int vector = 0; vector < kVectors; ++vector) {
          const auto own_values = load<__m512i>(values + vector * kLineBytes);
#pragma GCC unroll 4
          for (int own = 0; own < kQueries; ++own) {
            sums[0][vector][own] = _mm512_dpbusd_epi32(sums[0][vector][own], four(high[own] + position), own_values);
            sums[1][vector][own] = _mm512_dpbusd_epi32(sums[1][vector][own], four(low[own] + position), own_values);
          }
        }
      }
    for (int own = 0; own < kQueries; ++own)
      for (int vector = 0; vector < kVectors; ++vector) {
        const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(sums[0][vector][own], 8), sums[1][vector][own]);
        store(queries[own].part + kSums + channel + vector * kLanes, (Floats)_mm512_cvtepi32_ps(both) * scales[own]);
      }
  }

  const HeadShape &shape_;
  char *tiles_;
  int64_t num_tiles_, step_;  // bytes from a tile to the next one
  NextBlock next_;
};

#else

class RoundedBlock : public VectorBlock {
 public:
  static constexpr bool is_here = false;
  using VectorBlock::VectorBlock;
  static bool takes(const Memory &) { return false; }
};

#endif
