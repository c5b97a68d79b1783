// A block's part of attention by the processor's matrix tiles, AMX.
//
// Keys and values lie in memory as tiles want them: a row of a tile has some channels of a position. Tiles multiply
// pairs. A value's pair are two channels of one position, so there are two products: with pairs of a weight and a zero
// for the first channels, and of a zero and the weight for the second ones.
#pragma once
#include "amx.h"
#include "attention_vectors.h"

#ifdef DASH_AMX

// Takes up to 16 queries at once. Weights are rounded to bf16.
class TileBlock {
 public:
  static constexpr int kMostQueries = 16;

  static bool takes(const HeadShape &shape) { return amx::is_here && shape.head_dim % kChannels == 0; }

  explicit TileBlock(const HeadShape &shape) : shape_(shape), num_parts_(shape.head_dim / kChannels) {}
  ~TileBlock() { _tile_release(); }

  void fill(const BlockPlace &) {}

  void begin(const BlockPlace &place, int64_t num_queries) {
    const HeadBlock &block = block_ = block_of(shape_, place);
    num_tiles_ = (block.count + kPositions - 1) / kPositions;
    set_width(num_queries <= 4 ? 4 : num_queries <= 8 ? 8 : kMostQueries);
    has_turned_keys_ = num_queries >= kQueriesToTurn;
    if (has_turned_keys_) turn_keys(block_, shape_.head_dim, turned_keys_);
    const int64_t first = block.count / kPositions * kPositions;
    for (int64_t position = first; position < num_tiles_ * kPositions; ++position)
      for (int64_t place = 0; place < shape_.head_dim; place += kLanes) {
        const int64_t from = position * block.stride + place, to = (position - first) * shape_.head_dim + place;
        const bool is_written = position < block.count;
        store(last_keys_ + to, is_written ? load<Halves>(block.keys + from) : Halves{});
        store(last_values_ + to, is_written ? load<Halves>(block.values + from) : Halves{});
      }
  }

  // Writes the parts of up to `kMostQueries` queries.
  void write(int64_t num_queries, const BlockQuery *queries) {
    if (width_ == 4)
      write_all<4>(num_queries, queries);
    else if (width_ == 8)
      write_all<8>(num_queries, queries);
    else
      write_all<kMostQueries>(num_queries, queries);
  }

  void end() { block_.next.fetch_rest(); }

 private:
  static constexpr int kChannels = 32, kPositions = 16;  // of a tile of keys or values
  // Of a block, for which its keys are turned: then neither these queries nor their scores have to be. A score has the
  // same bits by both ways.
  static constexpr int kQueriesToTurn = 48;

  // Tile 0 has scores, 1 to 4 sums, 5 weights, 6 keys or values, 7 queries.
  void set_width(int width) {
    if (width == width_) return;
    width_ = width;
    const int row_bytes = width * int{sizeof(float)};
    amx::Sizes()
        .with(0, 1, kPositions, row_bytes)
        .with(1, 6, width)
        .with(6, 7, kPositions)
        .with(7, 8, 16, row_bytes)
        .set();
  }

  // Loads tile 6.
  void load_tile(const uint16_t *from, const uint16_t *last, int64_t tile, int64_t part) const {
    if ((tile + 1) * kPositions <= block_.count)
      _tile_loadd(6, from + tile * kPositions * block_.stride + part * kChannels, 2 * block_.stride);
    else
      _tile_loadd(6, last + part * kChannels, 2 * shape_.head_dim);
  }

  template <int kWidth>
  void write_all(int64_t num_queries, const BlockQuery *queries) {
    alignas(kLineBytes) float weights[kWidth][kBlockPositions];
    if (has_turned_keys_)
      write_scores_of_turned(num_queries, queries, weights[0]);
    else
      write_scores<kWidth>(num_queries, queries, weights);
    for (int64_t own = 0; own < num_queries; ++own) weigh(queries[own], weights[own]);
    int32_t pairs[2][kWidth][kBlockPositions];
    for (int64_t own = 0; own < num_queries; ++own)
      for (int64_t place = 0; place < kBlockPositions; place += kLanes) {
        const Ints bits = to_bf16_bits(load<Floats>(weights[own] + place));
        store(pairs[0][own] + place, bits >> 16 & 0xFFFF);
        store(pairs[1][own] + place, bits & ~0xFFFF);
      }
    int64_t part = 0;
    for (; part + 2 <= num_parts_; part += 2) write_sums<kWidth, 2>(num_queries, queries, pairs, part);
    if (part < num_parts_) write_sums<kWidth, 1>(num_queries, queries, pairs, part);
  }

  void write_scores_of_turned(int64_t num_queries, const BlockQuery *queries, float *scores) {
    uint16_t rounded[kMostQueries * kMostChannels];
    const int64_t size = shape_.head_dim;
    for (int64_t own = 0; own < num_queries; ++own)
      for (int64_t place = 0; place < size; place += kLanes)
        write_bf16(rounded + own * size + place, load<Floats>(queries[own].query + place));
    asm volatile("" ::: "memory");  // GCC does not know what tiles read and write
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      _tile_zero(0);
      for (int64_t part = 0; part < num_parts_; ++part) {
        _tile_loadd(7, rounded + part * kChannels, 2 * size);
        _tile_loadd(6, turned_keys_[part * kChannels / 2] + tile * kPositions, sizeof *turned_keys_);
        _tile_dpbf16ps(0, 7, 6);
      }
      _tile_stored(0, scores + tile * kPositions, kBlockPositions * sizeof *scores);
    }
    asm volatile("" ::: "memory");
  }

  // Tiles want queries side by side, [pair of channels][query], and give [position][query].
  template <int kWidth>
  void write_scores(int64_t num_queries, const BlockQuery *queries, float (*scores)[kBlockPositions]) {
    constexpr int kInner = kLanes / kWidth;
    constexpr Ints kAside = kNumbers % kWidth * kInner + kNumbers / kWidth,
                   kBack = kNumbers % kInner * kWidth + kNumbers / kInner;
    alignas(kLineBytes) int32_t pairs[kMostChannels / kChannels][kLanes * kWidth];
    for (int64_t part = 0; part < num_parts_; ++part) {
      Words rows[kWidth]{};
#pragma GCC unroll 16
      for (int own = 0; own < kWidth; ++own) {
        if (own == num_queries) break;
        uint16_t rounded[kChannels];
        for (int place = 0; place < kChannels; place += kLanes)
          write_bf16(rounded + place, load<Floats>(queries[own].query + part * kChannels + place));
        rows[own] = load<Words>(rounded);
      }
      turn(rows);
#pragma GCC unroll 16
      for (int row = 0; row < kWidth; ++row) store(pairs[part] + row * kLanes, __builtin_shuffle(rows[row], kAside));
    }
    alignas(kLineBytes) float turned[kBlockPositions * kWidth];
    constexpr int kTileSize = kPositions * kWidth, kRowBytes = kWidth * int{sizeof(float)};
    asm volatile("" ::: "memory");  // GCC does not know what tiles read and write
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      block_.next.fetch(shape_.head_dim / 4);
      _tile_zero(0);
      for (int64_t part = 0; part < num_parts_; ++part) {
        load_tile(block_.keys, last_keys_, tile, part);
        _tile_loadd(7, pairs[part], kRowBytes);
        _tile_dpbf16ps(0, 6, 7);
      }
      _tile_stored(0, turned + tile * kTileSize, kRowBytes);
    }
    asm volatile("" ::: "memory");
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      Words rows[kWidth];
#pragma GCC unroll 16
      for (int row = 0; row < kWidth; ++row)
        rows[row] = __builtin_shuffle(load<Words>(turned + tile * kTileSize + row * kLanes), kBack);
      turn(rows);
#pragma GCC unroll 16
      for (int own = 0; own < kWidth; ++own) store(scores[own] + tile * kPositions, rows[own]);
    }
  }

  // Writes the weighted sums of `kParts` times 32 channels.
  template <int kWidth, int kParts>
  void write_sums(int64_t num_queries, const BlockQuery *queries, const int32_t (*pairs)[kWidth][kBlockPositions],
                  int64_t part) {
    constexpr int kPairsBytes = kBlockPositions * int{sizeof(int32_t)};
    alignas(kLineBytes) float sums[2 * kParts][kWidth][kLanes];
    asm volatile("" ::: "memory");
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      block_.next.fetch(kParts * kPositions / 2);
      load_tile(block_.values, last_values_, tile, part);
      _tile_loadd(5, pairs[0][0] + tile * kPositions, kPairsBytes);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(5, pairs[1][0] + tile * kPositions, kPairsBytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kParts > 1) {
        load_tile(block_.values, last_values_, tile, part + 1);
        _tile_dpbf16ps(4, 5, 6);
        _tile_loadd(5, pairs[0][0] + tile * kPositions, kPairsBytes);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
    _tile_stored(1, sums[0], kLineBytes);
    _tile_stored(2, sums[1], kLineBytes);
    if constexpr (kParts > 1) {
      _tile_stored(3, sums[2], kLineBytes);
      _tile_stored(4, sums[3], kLineBytes);
    }
    asm volatile("" ::: "memory");
    constexpr Ints kLow = kNumbers / 2 + kNumbers % 2 * kLanes, kHigh = kLow + kLanes / 2;
    for (int64_t own = 0; own < num_queries; ++own)
      for (int next = 0; next < kParts; ++next) {
        float *to = queries[own].part + kSums + (part + next) * kChannels;
        const Floats first = load<Floats>(sums[2 * next][own]), second = load<Floats>(sums[2 * next + 1][own]);
        store(to, __builtin_shuffle(first, second, kLow));
        store(to + kLanes, __builtin_shuffle(first, second, kHigh));
      }
  }

  const HeadShape &shape_;
  const int64_t num_parts_;  // of 32 channels
  HeadBlock block_;
  int width_ = 0;  // queries that tiles have room for
  int64_t num_tiles_ = 0;
  // A copy of the last positions, padded with zeros, for tiles that they do not fill.
  uint16_t last_keys_[kPositions * kMostChannels], last_values_[kPositions * kMostChannels];
  bool has_turned_keys_ = false;
  alignas(kLineBytes) int32_t turned_keys_[kMostChannels / 2][kBlockPositions];  // [pair of channels][position]
};

#else

class TileBlock : public VectorBlock {
 public:
  using VectorBlock::VectorBlock;
  static bool takes(const HeadShape &) { return false; }
};

#endif
