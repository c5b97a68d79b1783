// Products of a few rows with a matrix in FULL, INT8 or INT4, at the speed of memory. row_matrix.py lays matrices out.
//
// A row's sums have one order, whatever the number of rows, so its bits are the same alone and among others.
#pragma once
#include "inputs.h"

constexpr int kBlockTiles = 4;  // tiles of a block that oneDNN packed
constexpr int kWidest = 64;     // outputs of a block

// Rows, and in FULL tiles of them, whose sums the registers hold: `kSumsAtOnce` are rows times tiles.
#ifdef __AVX512F__
constexpr int kMostRows = 8, kPairsAtOnce = 1;
#else
constexpr int kMostRows = 2, kPairsAtOnce = 8;
#endif
#ifdef __AVX512BF16__
constexpr int kMostFullRows = 16, kFullSums = 1, kSumsAtOnce = 28;
#else
constexpr int kMostFullRows = kMostRows, kFullSums = 2, kSumsAtOnce = kMostFullRows;
#endif

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
      // Blocks are read a part at a time, which the processor does not foresee.
      if (kTilesAtOnce < kBlockTiles) __builtin_prefetch(words + 24 * step + part * kLanes);
      const Ints word = load<Ints>(words + part * kLanes);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row)
        add_pair(sums.of[row][part], word, inputs.values + row * inputs.row_stride, pair + next);
    }
  }
}

template <int kRows, int kTilesAtOnce>
inline void full(const Matrix &matrix, const Inputs &inputs, int64_t tile, float *outputs, int64_t stride) {
  const int64_t num_pairs = matrix.num_inputs / 2;
  const bool is_block = matrix.layout == kBlocks;
  const int64_t step = is_block ? kWidest : kLanes;
  const auto *words = static_cast<const int32_t *>(matrix.words);
  words +=
      is_block ? tile / kBlockTiles * num_pairs * kWidest + tile % kBlockTiles * kLanes : tile * num_pairs * kLanes;
  Sums<kRows, kTilesAtOnce> sums{};
  for (int64_t pair = 0; pair < num_pairs; pair += kPairsAtOnce) {
#ifdef __AVX512F__
    add_pairs(sums, words, step, inputs, pair);
#else
    // A vector of several registers that a loop carries from turn to turn would lie in memory.
    Sums<kRows, kTilesAtOnce> own{};
    add_pairs(own, words, step, inputs, pair);
    for (int row = 0; row < kRows; ++row)
      for (int part = 0; part < kTilesAtOnce; ++part)
        for (int sum = 0; sum < kFullSums; ++sum) sums.of[row][part][sum] += own.of[row][part][sum];
#endif
    words += kPairsAtOnce * step;
  }
  for (int row = 0; row < kRows; ++row)
    for (int part = 0; part < kTilesAtOnce; ++part) {
      Floats total = sums.of[row][part][0];
      for (int sum = 1; sum < kFullSums; ++sum) total += sums.of[row][part][sum];
      store(outputs + row * stride + part * kLanes, total);
    }
}

// Adds up a group's products, of weights that have no sign.
template <Layout kLayout, int kRows>
inline void add_group(const int32_t *words, const float *values, int64_t row_stride, Floats (&sums)[kRows]) {
  constexpr int kBits = bits_of(kLayout), kPlaces = 32 / kBits, kWords = kGroup / kPlaces;
#ifdef __AVX512VNNI__
  constexpr int kParts = kPlaces / 4;
  Ints totals[kRows]{};
#pragma GCC unroll 8
  for (int index = 0; index < kWords; ++index) {
    const Ints word = load<Ints>(words + index * kLanes) ^ INT32_MIN;  // the last weight has a sign
    const Ints parts[2] = {kParts == 1 ? word : word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F};
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part)
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const auto four = (__m512i)filled(values[row * kGroupFloats + index * kParts + part]);
        totals[row] = (Ints)_mm512_dpbusd_epi32((__m512i)totals[row], (__m512i)parts[part], four);
      }
  }
  for (int row = 0; row < kRows; ++row) sums[row] = __builtin_convertvector(totals[row], Floats);
#else
  Floats odd[kRows]{};
  for (int row = 0; row < kRows; ++row) sums[row] = Floats{};
#pragma GCC unroll 8
  for (int index = 0; index < kWords; ++index) {
    const Ints word = load<Ints>(words + index * kLanes);
#pragma GCC unroll 8
    for (int place = 0; place < kPlaces; ++place) {
      const auto mask = static_cast<int32_t>(((1u << kBits) - 1) << kBits * place);
      const Floats weights = __builtin_convertvector(word & mask, Floats);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row)
        (index % 2 ? odd : sums)[row] += weights * values[row * row_stride + index * kPlaces + place];
    }
  }
  for (int row = 0; row < kRows; ++row) sums[row] += odd[row];
#endif
}

template <Layout kLayout, int kRows>
inline void rounded(const Matrix &matrix, const Inputs &inputs, int64_t tile, float *outputs, int64_t stride) {
  constexpr int kWords = bits_of(kLayout);              // of a group
  constexpr int kStored = kWords + (kLayout == kInt4);  // an INT4 group ends with its scales and zeros
  const int64_t num_groups = matrix.num_inputs / kGroup;
  const auto *words = static_cast<const int32_t *>(matrix.words) + tile * num_groups * kStored * kLanes;
  const float *values = inputs.values, *offsets = inputs.offsets, *inputs_sums = inputs.sums, *scales = inputs.scales;
  Floats total[kRows]{};
  for (int64_t group = 0; group < num_groups; ++group) {
    Floats sums[kRows];
    add_group<kLayout, kRows>(words, values, inputs.row_stride, sums);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#ifdef __AVX512VNNI__
      sums[row] *= scales[row];
#endif
      sums[row] -= offsets[row];
      if (kLayout == kInt8) {
        total[row] += sums[row];
      } else {
        const Ints grid = load<Ints>(words + kWords * kLanes);
        total[row] += (Floats)(grid & ~0xFFFF) * sums[row];
        total[row] += (Floats)(grid << 16) * inputs_sums[row];
      }
    }
    words += kStored * kLanes, values += inputs.group_stride;
    offsets += inputs.num_rows, inputs_sums += inputs.num_rows, scales += inputs.num_rows;
  }
  for (int row = 0; row < kRows; ++row)
    store(outputs + row * stride,
          kLayout == kInt8 ? total[row] * load<Floats>(matrix.scales + tile * kLanes) : total[row]);
}

// Does the same in FULL for several tiles.
template <int kRows>
inline void full_tiles(const Matrix &matrix, const Inputs &inputs, int64_t first, int64_t last, float *outputs,
                       int64_t stride) {
  for (int64_t tile = first, taken; tile < last; tile += taken) {
    float *own = outputs + (tile - first) * kLanes;
    const int64_t together = matrix.layout == kBlocks ? kBlockTiles - tile % kBlockTiles : 1;
    const int64_t left = last - tile < together ? last - tile : together;
    taken = 0;
    if constexpr (kRows * 4 <= kSumsAtOnce)
      if (left == 4) taken = 4, full<kRows, 4>(matrix, inputs, tile, own, stride);
    if constexpr (kRows * 3 <= kSumsAtOnce && kRows * 4 > kSumsAtOnce)
      if (!taken && left >= 3) taken = 3, full<kRows, 3>(matrix, inputs, tile, own, stride);
    if constexpr (kRows * 2 <= kSumsAtOnce)
      if (!taken && left >= 2) taken = 2, full<kRows, 2>(matrix, inputs, tile, own, stride);
    if (!taken) taken = 1, full<kRows, 1>(matrix, inputs, tile, own, stride);
  }
}

template <int kRows>
inline void some_rows(const Matrix &matrix, const Inputs &inputs, int64_t first, int64_t last, float *outputs,
                      int64_t stride) {
  if (is_full(matrix)) return full_tiles<kRows>(matrix, inputs, first, last, outputs, stride);
  if constexpr (kRows <= kMostRows)
    for (int64_t tile = first; tile < last; ++tile) {
      float *own = outputs + (tile - first) * kLanes;
      if (matrix.layout == kInt8)
        rounded<kInt8, kRows>(matrix, inputs, tile, own, stride);
      else
        rounded<kInt4, kRows>(matrix, inputs, tile, own, stride);
    }
}

// Calls the function for a number of rows.
template <int kRows = kMostFullRows>
inline void any_rows(int64_t num_rows, const Matrix &matrix, const Inputs &inputs, int64_t first, int64_t last,
                     float *outputs, int64_t stride) {
  if (num_rows == kRows) return some_rows<kRows>(matrix, inputs, first, last, outputs, stride);
  if constexpr (kRows > 1) any_rows<kRows - 1>(num_rows, matrix, inputs, first, last, outputs, stride);
}

}  // namespace products

// Writes outputs[row * stride + …] for the tiles from `first` to `last`, `kLanes` outputs each.
inline void product(const Matrix &matrix, const Inputs &inputs, int64_t num_rows, int64_t first, int64_t last,
                    float *outputs, int64_t stride) {
  const int64_t most = is_full(matrix) ? kMostFullRows : kMostRows;
  // A block's weights stay in the cache while all rows read them.
  for (int64_t tile = first, end; tile < last; tile = end) {
    end = tile + kBlockTiles - tile % kBlockTiles < last ? tile + kBlockTiles - tile % kBlockTiles : last;
    for (int64_t row = 0, taken; row < num_rows; row += taken) {
      taken = num_rows - row < most ? num_rows - row : most;
      products::any_rows(taken, matrix, inputs.from(row), tile, end, outputs + row * stride + (tile - first) * kLanes,
                         stride);
    }
  }
}
