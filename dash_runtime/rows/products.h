// Products of a few rows with a matrix in FULL, INT8 or INT4, at the speed of memory. row_matrix.py lays matrices out.
//
// A row's sums have one order, whatever the number of rows, so its bits are the same alone and among others.
#pragma once
#include "vectors.h"

constexpr int kGroup = 32;      // inputs that share an INT4 scale
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

// FULL has pairs of inputs in a word: blocks of tiles as oneDNN packs them, or tiles.
enum Layout : int64_t { kBlocks, kTiles, kInt8, kInt4 };

struct Matrix {
  const void *words;
  const float *scales;  // INT8: by output
  int64_t layout, num_inputs;
};

inline bool is_full(const Matrix &matrix) { return matrix.layout == kBlocks || matrix.layout == kTiles; }

// What products with one layout read of a row.
//
// `values` are `[rows, num_inputs]`; for rounded weights divided by the power of two that masking multiplies by. In
// FULL and INT4, where the processor multiplies bf16, they are pairs of such numbers, `[rows, num_inputs / 2]`.
struct Inputs {
  const float *values;
  const float *offsets;  // [rows, groups]: what a group's sum is too high by
  const float *sums;     // [rows, groups]
};

constexpr int bits_of(Layout layout) { return layout == kInt8 ? 8 : 4; }

inline int64_t inputs_size(int64_t num_rows, int64_t num_inputs) {
  return num_rows * (num_inputs + 2 * num_inputs / kGroup);
}

#ifdef __AVX512BF16__
constexpr int kRaised = 128 + 8;  // what INT4 weights are too high by as bf16 numbers

// Prepares rows for INT4: bf16 numbers in pairs as a word has weights in its halves, the first of eight with the fifth
// and so on.
inline Inputs prepare_pairs(const float *rows, int64_t num_rows, int64_t num_inputs, float *memory) {
  const __m512i order = _mm512_set4_epi32(0x0F0E0706, 0x0D0C0504, 0x0B0A0302, 0x09080100);  // bytes of every 16
  float *values = memory, *offsets = memory + num_rows * num_inputs / 2;
  float *sums = offsets + num_rows * num_inputs / kGroup;
  for (int64_t group = 0; group < num_rows * num_inputs / kGroup; ++group) {
    const Floats low = rounded_to_bf16(load<Floats>(rows + group * kGroup));
    const Floats high = rounded_to_bf16(load<Floats>(rows + group * kGroup + kLanes));
    const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    _mm512_storeu_si512(values + group * kLanes, _mm512_shuffle_epi8(both, order));
    sums[group] = sum(low + high);
    offsets[group] = kRaised * sums[group];
  }
  return {values, offsets, sums};
}
#endif

// Prepares rows for a layout in `memory`, `inputs_size` floats.
inline Inputs prepare(Layout layout, const float *rows, int64_t num_rows, int64_t num_inputs, float *memory) {
#ifdef __AVX512BF16__
  if (layout == kBlocks || layout == kTiles) {
    for (int64_t place = 0; place < num_rows * num_inputs; place += kLanes)
      write_bf16(reinterpret_cast<uint16_t *>(memory) + place, load<Floats>(rows + place));
    return {memory, nullptr, nullptr};
  }
#endif
  if (layout == kBlocks || layout == kTiles) return {rows, nullptr, nullptr};
#ifdef __AVX512BF16__
  if (layout == kInt4) return prepare_pairs(rows, num_rows, num_inputs, memory);
#endif
  const int bits = bits_of(layout), num_places = 32 / bits;
  float scales[kLanes], halves[kLanes];  // half a range for each value but a word's last
  for (int lane = 0; lane < kLanes; ++lane) {
    const int place = lane % num_places;
    scales[lane] = std::ldexp(1.0f, -bits * place);
    halves[lane] = place == num_places - 1 ? 0.0f : std::ldexp(1.0f, bits - 1);
  }
  const Floats scale = load<Floats>(scales), half = load<Floats>(halves);
  float *values = memory, *offsets = values + num_rows * num_inputs, *sums = offsets + num_rows * num_inputs / kGroup;
  for (int64_t group = 0; group < num_rows * num_inputs / kGroup; ++group) {
    const Floats low = load<Floats>(rows + group * kGroup), high = load<Floats>(rows + group * kGroup + kLanes);
    store(values + group * kGroup, low * scale);
    store(values + group * kGroup + kLanes, high * scale);
    offsets[group] = sum((low + high) * half);
    sums[group] = sum(low + high);
  }
  return {values, offsets, sums};
}

// The floats from one row of `Inputs::values` to the next.
inline int64_t row_stride(const Matrix &matrix) {
#ifdef __AVX512BF16__
  if (is_full(matrix) || matrix.layout == kInt4) return matrix.num_inputs / 2;
#endif
  return matrix.num_inputs;
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
inline void add_pairs(Sums<kRows, kTilesAtOnce> &sums, const int32_t *words, int64_t step, const float *rows,
                      int64_t row_stride, int64_t pair) {
#pragma GCC unroll 8
  for (int next = 0; next < kPairsAtOnce; ++next, words += step) {
#pragma GCC unroll 4
    for (int part = 0; part < kTilesAtOnce; ++part) {
      // Blocks are read a part at a time, which the processor does not foresee.
      if (kTilesAtOnce < kBlockTiles) __builtin_prefetch(words + 24 * step + part * kLanes);
      const Ints word = load<Ints>(words + part * kLanes);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) add_pair(sums.of[row][part], word, rows + row * row_stride, pair + next);
    }
  }
}

template <int kRows, int kTilesAtOnce>
inline void full(const Matrix &matrix, const float *rows, int64_t tile, float *outputs, int64_t stride) {
  const int64_t num_pairs = matrix.num_inputs / 2, own_stride = row_stride(matrix);
  const bool is_block = matrix.layout == kBlocks;
  const int64_t step = is_block ? kWidest : kLanes;
  const auto *words = static_cast<const int32_t *>(matrix.words);
  words +=
      is_block ? tile / kBlockTiles * num_pairs * kWidest + tile % kBlockTiles * kLanes : tile * num_pairs * kLanes;
  Sums<kRows, kTilesAtOnce> sums{};
  for (int64_t pair = 0; pair < num_pairs; pair += kPairsAtOnce) {
#ifdef __AVX512F__
    add_pairs(sums, words, step, rows, own_stride, pair);
#else
    // A vector of several registers that a loop carries from turn to turn would lie in memory.
    Sums<kRows, kTilesAtOnce> own{};
    add_pairs(own, words, step, rows, own_stride, pair);
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

template <Layout kLayout, int kRows>
inline void rounded(const Matrix &matrix, const Inputs &inputs, int64_t tile, float *outputs, int64_t stride) {
  constexpr int kBits = bits_of(kLayout), kPlaces = 32 / kBits, kWords = kGroup / kPlaces;
  constexpr int kStored = kWords + (kLayout == kInt4);  // an INT4 group ends with its scales and zeros
  const int64_t num_groups = matrix.num_inputs / kGroup;
  const auto *words = static_cast<const int32_t *>(matrix.words) + tile * num_groups * kStored * kLanes;
  Floats total[kRows]{};
  for (int64_t group = 0; group < num_groups; ++group, words += kStored * kLanes) {
    Floats even[kRows]{}, odd[kRows]{};
#pragma GCC unroll 8
    for (int index = 0; index < kWords; ++index) {
      const Ints word = load<Ints>(words + index * kLanes);
#pragma GCC unroll 8
      for (int place = 0; place < kPlaces; ++place) {
        const auto mask = static_cast<int32_t>(((1u << kBits) - 1) << kBits * place);
        const Floats weights = __builtin_convertvector(word & mask, Floats);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          const float input = inputs.values[row * matrix.num_inputs + group * kGroup + index * kPlaces + place];
          (index % 2 ? odd : even)[row] += weights * input;
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      const Floats values = even[row] + odd[row] - inputs.offsets[row * num_groups + group];
      if (kLayout == kInt8) {
        total[row] += values;
      } else {
        const Ints grid = load<Ints>(words + kWords * kLanes);
        total[row] += (Floats)(grid & ~0xFFFF) * values;
        total[row] += (Floats)(grid << 16) * inputs.sums[row * num_groups + group];
      }
    }
  }
  for (int row = 0; row < kRows; ++row)
    store(outputs + row * stride,
          kLayout == kInt8 ? total[row] * load<Floats>(matrix.scales + tile * kLanes) : total[row]);
}

#ifdef __AVX512BF16__
// Does the same in INT4 with products of bf16 pairs: a weight and 128 more is a bf16 number whose last bits are it.
template <int kRows>
inline void pairs(const Matrix &matrix, const Inputs &inputs, int64_t tile, float *outputs, int64_t stride) {
  constexpr int kWords = kGroup / 8, kStored = kWords + 1;
  const int64_t num_groups = matrix.num_inputs / kGroup;
  const auto *words = static_cast<const int32_t *>(matrix.words) + tile * num_groups * kStored * kLanes;
  const Ints mask = Ints{} + 0x000F000F, raised = Ints{} + 0x43004300, last = Ints{} + 0x43084300;
  Floats total[kRows]{};
  for (int64_t group = 0; group < num_groups; ++group, words += kStored * kLanes) {
    Floats even[kRows]{}, odd[kRows]{};
#pragma GCC unroll 4
    for (int index = 0; index < kWords; ++index) {
      const Ints word = load<Ints>(words + index * kLanes);
#pragma GCC unroll 4
      for (int place = 0; place < 4; ++place) {
        const Ints shifted = (Ints)_mm512_srli_epi32((__m512i)word, 4 * place);
        const Ints weights = (shifted & mask) ^ (place == 3 ? last : raised);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          const float *own = inputs.values + row * (matrix.num_inputs / 2) + group * kLanes + index * 4 + place;
          const auto both = (__m512bh)_mm512_castps_si512(_mm512_set1_ps(*own));
          Floats &sum = (place % 2 ? odd : even)[row];
          sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, both);
        }
      }
    }
    const Ints grid = load<Ints>(words + kWords * kLanes);
    const Floats scale = (Floats)(grid & ~0xFFFF), zero = (Floats)(grid << 16);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      total[row] += scale * (even[row] + odd[row] - inputs.offsets[row * num_groups + group]);
      total[row] += zero * inputs.sums[row * num_groups + group];
    }
  }
  for (int row = 0; row < kRows; ++row) store(outputs + row * stride, total[row]);
}
#endif

// Does the same in FULL for several tiles.
template <int kRows>
inline void full_tiles(const Matrix &matrix, const float *rows, int64_t first, int64_t last, float *outputs,
                       int64_t stride) {
  for (int64_t tile = first, taken; tile < last; tile += taken) {
    float *own = outputs + (tile - first) * kLanes;
    const int64_t together = matrix.layout == kBlocks ? kBlockTiles - tile % kBlockTiles : 1;
    const int64_t left = last - tile < together ? last - tile : together;
    taken = 0;
    if constexpr (kRows * 4 <= kSumsAtOnce)
      if (left == 4) taken = 4, full<kRows, 4>(matrix, rows, tile, own, stride);
    if constexpr (kRows * 3 <= kSumsAtOnce && kRows * 4 > kSumsAtOnce)
      if (!taken && left >= 3) taken = 3, full<kRows, 3>(matrix, rows, tile, own, stride);
    if constexpr (kRows * 2 <= kSumsAtOnce)
      if (!taken && left >= 2) taken = 2, full<kRows, 2>(matrix, rows, tile, own, stride);
    if (!taken) taken = 1, full<kRows, 1>(matrix, rows, tile, own, stride);
  }
}

template <int kRows>
inline void some_rows(const Matrix &matrix, const Inputs &inputs, int64_t first, int64_t last, float *outputs,
                      int64_t stride) {
  if (is_full(matrix)) return full_tiles<kRows>(matrix, inputs.values, first, last, outputs, stride);
  if constexpr (kRows <= kMostRows)
    for (int64_t tile = first; tile < last; ++tile) {
      float *own = outputs + (tile - first) * kLanes;
      if (matrix.layout == kInt8)
        rounded<kInt8, kRows>(matrix, inputs, tile, own, stride);
      else
#ifdef __AVX512BF16__
        pairs<kRows>(matrix, inputs, tile, own, stride);
#else
        rounded<kInt4, kRows>(matrix, inputs, tile, own, stride);
#endif
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
  const int64_t num_groups = matrix.num_inputs / kGroup, most = is_full(matrix) ? kMostFullRows : kMostRows;
  // A block's weights stay in the cache while all rows read them.
  for (int64_t tile = first, end; tile < last; tile = end) {
    end = tile + kBlockTiles - tile % kBlockTiles < last ? tile + kBlockTiles - tile % kBlockTiles : last;
    for (int64_t row = 0, taken; row < num_rows; row += taken) {
      taken = num_rows - row < most ? num_rows - row : most;
      const Inputs own{inputs.values + row * row_stride(matrix), inputs.offsets + row * num_groups,
                       inputs.sums + row * num_groups};
      products::any_rows(taken, matrix, own, tile, end, outputs + row * stride + (tile - first) * kLanes, stride);
    }
  }
}
