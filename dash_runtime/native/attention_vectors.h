// A block's part of attention by vectors.
#pragma once
#include "spans.h"

// Exchanges the lanes whose number has the bit `kWidth` with those of the rows whose number has the bit `kRows`.
template <int kRows, int kWidth, int kCount>
inline void exchange(Words (&rows)[kCount]) {
  constexpr Words kLow = kLaneNumbers + (((kLaneNumbers & kWidth) != 0) & (kRegisterLanes - kWidth)),
                  kHigh = kLow + kWidth;
#pragma GCC unroll 16
  for (int row = 0; row < kCount; ++row) {
    if (row & kRows) continue;
    const Words one = rows[row], other = rows[row + kRows];
    rows[row] = __builtin_shuffle(one, other, kLow);
    rows[row + kRows] = __builtin_shuffle(one, other, kHigh);
  }
}

// Exchanges the bits of the rows' numbers with the highest bits of the lanes' numbers.
template <int kRows = 1, int kCount>
inline void turn(Words (&rows)[kCount]) {
  exchange<kRows, kRows *(kRegisterLanes / kCount)>(rows);
  if constexpr (2 * kRows < kCount) turn<2 * kRows>(rows);
}

// Writes the words of a block's keys, two channels each, as [pair][position]. Words of positions that it does not have
// are anything.
inline void turn_keys(HeadBlock &block, int64_t head_dim, int32_t (*turned)[kBlockPositions]) {
  for (int64_t place = 0; place < block.count; place += kRegisterLanes)
    for (int64_t pair = 0; pair < head_dim / 2; pair += kRegisterLanes) {
      block.next.fetch(kRegisterLanes / 2);
      Words rows[kRegisterLanes];
#pragma GCC unroll 16
      for (int row = 0; row < kRegisterLanes; ++row) {
        const int64_t position = std::min(place + row, block.count - 1);
        rows[row] = load<Words>(block.keys + position * block.stride + 2 * pair);
      }
      turn(rows);
#pragma GCC unroll 16
      for (int row = 0; row < kRegisterLanes; ++row) store(turned[pair + row] + place, rows[row]);
    }
}

// Takes up to `kMostQueries` queries at once, whose sums registers hold.
class VectorBlock {
 public:
#ifdef __AVX512F__
  static constexpr int kMostQueries = 4;
#else
  static constexpr int kMostQueries = 2;
#endif

  explicit VectorBlock(const HeadShape &shape) : shape_(shape) {}

  void fill(const BlockPlace &) {}

  void begin(const BlockPlace &place, int64_t) {
    block_ = block_of(shape_, place);
    turn_keys(block_, shape_.head_dim, turned_);
  }

  // Writes the parts of up to `kMostQueries` queries.
  template <int kQueries = kMostQueries>
  void write(int64_t num_queries, const BlockQuery *queries) {
    if (num_queries == kQueries) {
      float weights[kQueries][kBlockPositions];
      write_scores<kQueries>(queries, weights);
      int64_t first = kBlockPositions, last = 0;
      for (int own = 0; own < kQueries; ++own) {
        weigh(queries[own], weights[own]);
        first = queries[own].first < first ? queries[own].first : first;
        last = queries[own].last > last ? queries[own].last : last;
      }
      write_sums<kQueries>(queries, weights, first, last);
    } else if constexpr (kQueries > 1) {
      write<kQueries - 1>(num_queries, queries);
    }
  }

  void end() { block_.next.fetch_rest(); }

 private:
  // Writes each query's scores of all positions.
  template <int kQueries>
  void write_scores(const BlockQuery *queries, float (*scores)[kBlockPositions]) const {
    constexpr int kVectors = kBlockPositions / kRegisterLanes;
#ifdef __AVX512BF16__
    uint16_t rounded[kQueries][kMostChannels];
    for (int own = 0; own < kQueries; ++own)
      for (int64_t place = 0; place < shape_.head_dim; place += kLanes)
        write_bf16(rounded[own] + place, load<Floats>(queries[own].query + place));
#endif
    Register sums[kQueries][kVectors]{};
    for (int64_t pair = 0; pair < shape_.head_dim / 2; ++pair)
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector) {
        const Words words = load<Words>(turned_[pair] + vector * kRegisterLanes);
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

  // Writes the weighted sums of the values from `first` to `last`, which have all that the queries see.
  template <int kQueries>
  void write_sums(const BlockQuery *queries, const float (*weights)[kBlockPositions], int64_t first, int64_t last) {
    constexpr int kVectors = 64 / kRegisterLanes;
    for (int64_t place = 0; place < shape_.head_dim; place += kVectors * kRegisterLanes) {
      const int64_t left = (shape_.head_dim - place) / kRegisterLanes, count = left < kVectors ? left : kVectors;
      Register sums[kQueries][kVectors]{};
      for (int64_t position = first; position < last; ++position) {
        const uint16_t *value = block_.values + position * block_.stride + place;
        block_.next.fetch(1);
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
          store(queries[own].part + kSums + place + vector * kRegisterLanes, sums[own][vector]);
    }
  }

  const HeadShape &shape_;
  HeadBlock block_;
  // Keys: [pair][position] have two channels each.
  alignas(64) int32_t turned_[kMostChannels / 2][kBlockPositions];
};
