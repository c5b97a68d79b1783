// Products of a few rows with a matrix in any precision, at the speed of memory. matrix.py lays matrices out.
//
// A row's sums have one order, whatever the number of rows, so its bits are the same alone and among others.
#pragma once
#include "amx.h"

constexpr int kBlockTiles = 4;  // tiles whose weights stay in the cache while all rows read them

// Rows from which on a block's weights are fetched ahead: a product waits for arithmetic as much as for memory.
// Processors with AMX foresee too little for a single row.
#ifdef DASH_AMX
constexpr int64_t kManyRows = 1;
#else
constexpr int64_t kManyRows = 8;
#endif

// Rows, and in FULL tiles of them, whose sums the registers hold: `kSumsAtOnce` are rows times tiles. Bytes of many
// rows are multiplied by `kTilesOfBytes` tiles at once, so that an input is read once for them; INT3 takes more
// registers.
#ifdef __AVX512F__
constexpr int kMostRows = 8, kPairsAtOnce = 1;
#else
constexpr int kMostRows = 2, kPairsAtOnce = 8;
#endif
#ifdef __AVX512VNNI__
constexpr int kRowsOfBytes = 4;
template <Layout kLayout>
constexpr int kTilesOfBytes = kLayout == kInt3 ? 2 : 4;
#else
constexpr int kRowsOfBytes = kMostRows;
template <Layout kLayout>
constexpr int kTilesOfBytes = 1;
#endif
#ifdef __AVX512BF16__
constexpr int kMostFullRows = 16, kFullSums = 1, kSumsAtOnce = 28;
#elif defined(__AVX512F__)
constexpr int kMostFullRows = kMostRows, kFullSums = 2, kSumsAtOnce = kMostFullRows;
#else
constexpr int kMostFullRows = 6, kFullSums = 2, kSumsAtOnce = kMostRows;
#endif

// The next block's weights, fetched while this one is multiplied by many rows. The processor foresees no more than it
// reads at the moment, and would wait for memory between two blocks.
struct Ahead {
  const char *next, *end;
  int64_t lines;  // for `kBlockTiles` tiles, in a turn of a kernel's loop over inputs; 0 for few rows

  // Does the part of a turn that multiplies so many tiles.
  void fetch(int64_t num_tiles) {
    const int64_t count = (lines * num_tiles + kBlockTiles - 1) / kBlockTiles;
    for (int64_t line = 0; line < count && next < end; ++line, next += kLineBytes) __builtin_prefetch(next);
  }
};

inline int64_t lines_of_tile(const Matrix &matrix) {
  return matrix.is_full() ? matrix.num_inputs / 2
                          : lines_before(static_cast<Layout>(matrix.layout), matrix.num_inputs / kGroup);
}

// A tile's cache lines that a turn of a kernel's loop reads, at most: of a pair of inputs in FULL, of a group
// elsewhere.
inline int64_t lines_in_turn(const Matrix &matrix) {
  return matrix.is_full() ? 1 : lines_before(static_cast<Layout>(matrix.layout), 1);
}

inline int64_t bytes_of_tile(const Matrix &matrix) { return lines_of_tile(matrix) * kLineBytes; }

// Lines that few rows fetch ahead in the tile that they read, past its end too: by itself the processor foresees too few
// of them where each takes many instructions.
template <Layout kLayout>
constexpr int64_t kLinesAhead = kLayout == kInt3 ? 32 : 40;
template <Layout kLayout>
constexpr int64_t kLinesOfGroup = lines_before(kLayout, 1);

inline void fetch_lines(const int32_t *words, int64_t count) {
#pragma GCC unroll 8
  for (int64_t line = 0; line < count; ++line) __builtin_prefetch(words + line * kLanes);
}

namespace products {

// Each function writes a tile, or `kTilesAtOnce`, of `kRows` rows to outputs[row * stride + …].

// Adds two products of bf16 numbers, the halves of a word, for every lane.
inline void add_pair(Floats (&sums)[kFullSums], Ints weights, const float *inputs, int64_t pair) {
#ifdef __AVX512BF16__
  const auto both = (__m512bh)_mm512_castps_si512(_mm512_set1_ps(inputs[pair]));
  sums[0] = (Floats)_mm512_dpbf16_ps((__m512)sums[0], (__m512bh)weights, both);
#else
  sums[0] += (Floats)(weights << 16) * inputs[2 * pair];
  sums[1] += (Floats)(weights & ~0xFFFF) * inputs[2 * pair + 1];
#endif
}

template <int kRows, int kTilesAtOnce>
struct Sums {
  Floats of[kRows][kTilesAtOnce][kFullSums];
};

template <int kRows, int kTilesAtOnce>
inline void add_pairs(Sums<kRows, kTilesAtOnce> &sums, const int32_t *words, int64_t step, const Inputs &inputs,
                      int64_t pair) {
#pragma GCC unroll 8
  for (int next = 0; next < kPairsAtOnce; ++next, words += step) {
#pragma GCC unroll 4
    for (int part = 0; part < kTilesAtOnce; ++part) {
      // Of whole blocks the processor foresees too little, and nothing of those that are read a part at a time.
      __builtin_prefetch(words + (kTilesAtOnce < kBlockTiles ? 24 : 12) * step + part * kLanes);
      const Ints word = load<Ints>(words + part * kLanes);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row)
        add_pair(sums.of[row][part], word, inputs.values + row * inputs.row_stride, pair + next);
    }
  }
}

// The same for more rows than have registers for the sums of both halves of a word: these take turns.
template <int kRows>
inline void add_halves(Sums<kRows, 1> &sums, const int32_t *words, int64_t step, const Inputs &inputs, int64_t pair) {
#pragma GCC unroll 2
  for (int half = 0; half < kFullSums; ++half) {
    Floats own[kRows]{};
#pragma GCC unroll 8
    for (int next = 0; next < kPairsAtOnce; ++next) {
      const Ints word = load<Ints>(words + next * step);
      const auto weights = (Floats)(half ? word & ~0xFFFF : word << 16);
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row)
        own[row] += weights * inputs.values[row * inputs.row_stride + 2 * (pair + next) + half];
    }
    for (int row = 0; row < kRows; ++row) sums.of[row][0][half] += own[row];
  }
}

template <int kRows, int kTilesAtOnce>
inline void full(const Matrix &matrix, const Inputs &inputs, int64_t tile, float *outputs, int64_t stride,
                 Ahead &ahead) {
  const int64_t num_pairs = matrix.num_inputs / 2, together = matrix.block_tiles, step = together * kLanes;
  const auto *words = static_cast<const int32_t *>(matrix.words);
  words += tile / together * num_pairs * step + tile % together * kLanes;
  Sums<kRows, kTilesAtOnce> sums{};
  Ahead own_ahead = ahead;
  for (int64_t pair = 0; pair < num_pairs; pair += kPairsAtOnce) {
    if constexpr (kRows >= kManyRows) own_ahead.fetch(kTilesAtOnce);
#ifdef __AVX512F__
    add_pairs(sums, words, step, inputs, pair);
#else
    // A vector of several registers that a loop carries from turn to turn would lie in memory.
    if constexpr (kRows > kMostRows) {
      add_halves(sums, words, step, inputs, pair);
    } else {
      Sums<kRows, kTilesAtOnce> own{};
      add_pairs(own, words, step, inputs, pair);
      for (int row = 0; row < kRows; ++row)
        for (int part = 0; part < kTilesAtOnce; ++part)
          for (int sum = 0; sum < kFullSums; ++sum) sums.of[row][part][sum] += own.of[row][part][sum];
    }
#endif
    words += kPairsAtOnce * step;
  }
  ahead = own_ahead;
  for (int row = 0; row < kRows; ++row)
    for (int part = 0; part < kTilesAtOnce; ++part) {
      Floats total = sums.of[row][part][0];
      for (int sum = 1; sum < kFullSums; ++sum) total += sums.of[row][part][sum];
      store(outputs + row * stride + part * kLanes, total);
    }
}

// Adds up a group's products with some tiles, of weights that have no sign.
template <Layout kLayout, int kRows, int kTiles>
inline void add_group(const int32_t *words, [[maybe_unused]] int64_t tile_stride, const float *values,
                      [[maybe_unused]] int64_t row_stride, Floats (&sums)[kRows][kTiles]) {
#ifdef __AVX512VNNI__
  Ints totals[kRows][kTiles]{};
#pragma GCC unroll 8
  for (int index = 0; index < kFours; ++index) {
    Ints weights[kTiles];
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) weights[tile] = bytes_of<kLayout>(words + tile * tile_stride, index);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const auto four = (__m512i)filled(values[row * kGroupFloats + index]);
#pragma GCC unroll 4
      for (int tile = 0; tile < kTiles; ++tile)
        totals[row][tile] = (Ints)_mm512_dpbusd_epi32((__m512i)totals[row][tile], (__m512i)weights[tile], four);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int tile = 0; tile < kTiles; ++tile) sums[row][tile] = __builtin_convertvector(totals[row][tile], Floats);
#else
  static_assert(kTiles == 1);
  constexpr int kBits = bits_of_place(kLayout), kPlaces = 32 / kBits, kWords = kGroup / kPlaces;
  Floats even[kRows]{}, odd[kRows]{};
#pragma GCC unroll 8
  for (int index = 0; index < kWords; ++index) {
    const Ints word = kLayout == kInt3 ? bytes_of<kLayout>(words, index) : load<Ints>(words + index * kLanes);
#pragma GCC unroll 8
    for (int place = 0; place < kPlaces; ++place) {
      const auto mask = static_cast<int32_t>(((1u << kBits) - 1) << kBits * place);
      const Floats weights = __builtin_convertvector(word & mask, Floats);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row)
        (index % 2 ? odd : even)[row] += weights * values[row * row_stride + index * kPlaces + place];
    }
  }
  for (int row = 0; row < kRows; ++row) sums[row][0] = even[row] + odd[row];
#endif
}

template <Layout kLayout, int kRows, int kTiles>
inline void rounded(const Matrix &matrix, const Inputs &inputs, int64_t tile, float *outputs, int64_t stride,
                    Ahead &ahead) {
  const int64_t num_groups = matrix.num_inputs / kGroup, tile_stride = lines_before(kLayout, num_groups) * kLanes;
  const auto *words = static_cast<const int32_t *>(matrix.words) + tile * tile_stride;
  const float *values = inputs.values;
  const Facts *facts = inputs.facts;
  Ahead own_ahead = ahead;
  Floats total[kRows][kTiles]{};
  for (int64_t group = 0; group < num_groups; ++group) {
    if constexpr (kTiles > 1)
      own_ahead.fetch(kTiles);
    else
      fetch_lines(words + (weights_line(kLayout, group) + kLinesAhead<kLayout>) * kLanes, kLinesOfGroup<kLayout>);
    Floats sums[kRows][kTiles];
    add_group<kLayout, kRows, kTiles>(words + weights_line(kLayout, group) * kLanes, tile_stride, values,
                                      inputs.row_stride, sums);
#pragma GCC unroll 4
    for (int own = 0; own < kTiles; ++own) {
      const Ints grid = grids_of<kLayout>(words + own * tile_stride, group);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) add_sum<kLayout>(sums[row][own], facts[row], grid, total[row][own]);
    }
    values += inputs.group_stride, facts += inputs.facts_stride;
  }
  ahead = own_ahead;
  for (int row = 0; row < kRows; ++row)
    for (int own = 0; own < kTiles; ++own)
      store(outputs + row * stride + own * kLanes,
            total[row][own] * load<Floats>(matrix.scales + (tile + own) * kLanes));
}

// Does the same for all tiles.
template <Layout kLayout, int kRows>
inline void rounded_tiles(const Matrix &matrix, const Inputs &inputs, int64_t first, int64_t last, float *outputs,
                          int64_t stride, Ahead &ahead) {
  constexpr int kTogether = kRows <= kRowsOfBytes ? kTilesOfBytes<kLayout> : 1;
  int64_t tile = first;
  if constexpr (kTogether > 1)
    for (; ahead.lines && last - tile >= kTogether; tile += kTogether)
      rounded<kLayout, kRows, kTogether>(matrix, inputs, tile, outputs + (tile - first) * kLanes, stride, ahead);
  for (; tile < last; ++tile)
    rounded<kLayout, kRows, 1>(matrix, inputs, tile, outputs + (tile - first) * kLanes, stride, ahead);
}

// Does the same in FULL for all tiles.
template <int kRows>
inline void full_tiles(const Matrix &matrix, const Inputs &inputs, int64_t first, int64_t last, float *outputs,
                       int64_t stride, Ahead &ahead) {
  for (int64_t tile = first, taken; tile < last; tile += taken) {
    float *own = outputs + (tile - first) * kLanes;
    const int64_t together = matrix.block_tiles - tile % matrix.block_tiles;
    const int64_t left = last - tile < together ? last - tile : together;
    taken = 0;
    if constexpr (kRows * 4 <= kSumsAtOnce)
      if (left == 4) taken = 4, full<kRows, 4>(matrix, inputs, tile, own, stride, ahead);
    if constexpr (kRows * 3 <= kSumsAtOnce && kRows * 4 > kSumsAtOnce)
      if (!taken && left >= 3) taken = 3, full<kRows, 3>(matrix, inputs, tile, own, stride, ahead);
    if constexpr (kRows * 2 <= kSumsAtOnce)
      if (!taken && left >= 2) taken = 2, full<kRows, 2>(matrix, inputs, tile, own, stride, ahead);
    if (!taken) taken = 1, full<kRows, 1>(matrix, inputs, tile, own, stride, ahead);
  }
}

template <int kRows>
inline void some_rows(const Matrix &matrix, const Inputs &inputs, int64_t first, int64_t last, float *outputs,
                      int64_t stride, Ahead &ahead) {
  if (matrix.is_full()) return full_tiles<kRows>(matrix, inputs, first, last, outputs, stride, ahead);
  if constexpr (kRows <= kMostRows)
    with_layout(matrix.layout, [&](auto layout) {
      rounded_tiles<decltype(layout)::value, kRows>(matrix, inputs, first, last, outputs, stride, ahead);
    });
}

// Calls the function for a number of rows.
template <int kRows = kMostFullRows>
inline void any_rows(int64_t num_rows, const Matrix &matrix, const Inputs &inputs, int64_t first, int64_t last,
                     float *outputs, int64_t stride, Ahead &ahead) {
  if (num_rows == kRows) return some_rows<kRows>(matrix, inputs, first, last, outputs, stride, ahead);
  if constexpr (kRows > 1) any_rows<kRows - 1>(num_rows, matrix, inputs, first, last, outputs, stride, ahead);
}

}  // namespace products

inline int64_t block_end(int64_t tile, int64_t last) {
  const int64_t end = tile + kBlockTiles - tile % kBlockTiles;
  return end < last ? end : last;
}

// Writes, for some rows from `first_row` on, outputs[row * stride + …] of the tiles from `first` to `last`, `kLanes`
// outputs each.
inline void product(const Matrix &matrix, const Rows &rows, int64_t first_row, int64_t num_rows, int64_t first,
                    int64_t last, float *outputs, int64_t stride) {
  DASH_CHECK(matrix.words && first >= 0 && first <= last && last <= matrix.num_tiles);
  DASH_CHECK(first_row >= 0 && num_rows > 0 && first_row + num_rows <= rows.num_rows);
  if (amx::is_here && matrix.is_full())
    return amx::full_product(matrix, rows, first_row, num_rows, first, last, outputs, stride);
  const bool has_many = num_rows >= kManyRows;
  const int64_t num_by_amx = amx::is_here ? amx::num_rounded_rows(num_rows) : 0;
  const int64_t most = matrix.is_full() ? kMostFullRows : has_many ? kRowsOfBytes : kMostRows;
  const int64_t num_chunks = (num_rows + most - 1) / most;
  const int64_t lines = has_many ? (kBlockTiles * lines_in_turn(matrix) + num_chunks - 1) / num_chunks : 0;
  const int64_t tile_bytes = bytes_of_tile(matrix);
  const char *words = static_cast<const char *>(matrix.words);
  // A block's weights stay in the cache while all rows read them.
  for (int64_t tile = first, end; tile < last; tile = end) {
    end = block_end(tile, last);
    float *own = outputs + (tile - first) * kLanes;
    if (num_by_amx) amx::rounded_product(matrix, rows, first_row, num_by_amx, tile, end, last, own, stride);
    Ahead ahead{words + end * tile_bytes, words + (end < last ? block_end(end, last) : end) * tile_bytes, lines};
    for (int64_t row = num_by_amx, taken; row < num_rows; row += taken) {
      taken = num_rows - row < most ? num_rows - row : most;
      products::any_rows(taken, matrix, rows.from(first_row + row), tile, end, own + row * stride, stride, ahead);
    }
  }
}
