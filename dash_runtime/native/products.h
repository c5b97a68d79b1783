// Products of a few rows with a matrix in any precision, at the speed of memory. matrix.py lays matrices out.
//
// A row's sums have one order, whatever the number of rows, so its bits are the same alone and among others.
#pragma once
#include "rounded_products.h"

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
    int64_t row = num_by_amx;
    if (!matrix.is_full() && num_rows - row >= kRowsToUnpack)
      with_layout(matrix.layout, [&](auto layout) {
        constexpr Layout kLayout = decltype(layout)::value;
        if constexpr (unpacks_once(kLayout))
          row += products::unpacked_tiles<kLayout>(matrix, rows, first_row + row, num_rows - row, tile, end,
                                                   own + row * stride, stride, ahead);
      });
    for (int64_t taken; row < num_rows; row += taken) {
      taken = num_rows - row < most ? num_rows - row : most;
      products::any_rows(taken, matrix, rows.from(first_row + row), tile, end, own + row * stride, stride, ahead);
    }
  }
}
