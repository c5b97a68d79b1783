// Products with rounded weights.
#pragma once
#include "ahead.h"

namespace products {

// Each function writes a tile, or `kTilesAtOnce`, of `kRows` rows to outputs[row * stride + …].

// A group's weights in the first of some tiles, and the words to those in the next ones.
template <Layout kLayout, bool kIsUnpacked>
struct GroupWords {
  TileWords tile;
  int64_t stride, further_stride;
  const UnpackedGroup *unpacked;

  Ints bytes(int place, int index) const {
    if constexpr (kIsUnpacked) return load<Ints>(unpacked[place * kMostUnpacked].words[index]);
    return bytes_of<kLayout>(tile.words + place * stride, tile.further + place * further_stride, index);
  }

  KeptGrid grid(const TileWords &first, int64_t group, int place) const {
    if constexpr (kIsUnpacked) return unpacked[place * kMostUnpacked].grid;
    return grid_of<kLayout>(first.words + place * stride, group);
  }
};

// Adds up a group's products with some tiles, of weights that have no sign.
template <Layout kLayout, bool kIsUnpacked, int kRows, int kTiles>
inline void add_group(const GroupWords<kLayout, kIsUnpacked> &own, const float *values,
                      [[maybe_unused]] int64_t row_stride, Floats (&sums)[kRows][kTiles]) {
#ifdef __AVX512VNNI__
  Ints totals[kRows][kTiles]{};
#pragma GCC unroll 8
  for (int index = 0; index < kFours; ++index) {
    Ints weights[kTiles];
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) weights[tile] = own.bytes(tile, index);
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
    // A refined weight may have its byte's highest bit, which is a sign here.
    Ints word;
    if constexpr (is_unpacked(kLayout))
      word = own.bytes(0, index) ^ (kLayout == kRefined ? INT32_MIN : 0);
    else
      word = load<Ints>(own.tile.words + index * kLanes);
#pragma GCC unroll 8
    for (int place = 0; place < kPlaces; ++place) {
      const auto mask = static_cast<int32_t>(((1u << kBits) - 1) << kBits * place);
      const Floats weights = __builtin_convertvector(word & mask, Floats);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row)
        (index % 2 ? odd : even)[row] += weights * values[row * row_stride + weight_at<kLayout>(index, place)];
    }
  }
  for (int row = 0; row < kRows; ++row) sums[row][0] = even[row] + odd[row];
#endif
}

// Adds some groups, or all of them, from the words or `unpacked` before.
template <Layout kLayout, int kRows, int kTiles, bool kIsUnpacked = false>
inline void rounded(const Matrix &matrix, const Inputs &inputs, int64_t tile, const Groups &groups,
                    const UnpackedGroup *unpacked, float *outputs, int64_t stride, Ahead &ahead) {
  const int64_t num_groups = Groups::all(matrix).last, tile_stride = lines_before(kLayout, num_groups) * kLanes;
  const int64_t further_stride = further_lines(kLayout, num_groups) * kLanes;
  const TileWords words = TileWords::of<kLayout>(matrix, tile);
  const Inputs own_inputs = inputs.from_group(groups.first);
  const float *values = own_inputs.values;
  const Facts *facts = own_inputs.facts;
  Ahead own_ahead = ahead;
  Floats total[kRows][kTiles]{};
  if (kIsUnpacked && groups.first)
    for (int row = 0; row < kRows; ++row)
      for (int own = 0; own < kTiles; ++own) total[row][own] = load<Floats>(outputs + row * stride + own * kLanes);
  for (int64_t group = groups.first; group < groups.last; ++group) {
    const TileWords own_words = words.from<kLayout>(group);
    if constexpr (kTiles > 1) {
      own_ahead.fetch(kTiles);
    } else if constexpr (!kIsUnpacked) {
      fetch_lines(own_words.words + kLinesAhead<kLayout> * kLanes, kLinesOfGroup<kLayout>);
      fetch_lines(own_words.further + kLinesAhead<kLayout> * kLanes, further_lines(kLayout, 1));
    }
    Floats sums[kRows][kTiles];
    const GroupWords<kLayout, kIsUnpacked> own_group{own_words, tile_stride, further_stride,
                                                     kIsUnpacked ? unpacked + (group - groups.first) : nullptr};
    add_group<kLayout, kIsUnpacked, kRows, kTiles>(own_group, values, inputs.row_stride, sums);
#pragma GCC unroll 4
    for (int own = 0; own < kTiles; ++own) {
      const KeptGrid grid = own_group.grid(words, group, own);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) add_sum<kLayout>(sums[row][own], facts[row], grid, total[row][own]);
    }
    values += inputs.group_stride, facts += inputs.facts_stride;
  }
  ahead = own_ahead;
  const bool is_last = !kIsUnpacked || groups.last == num_groups;
  for (int row = 0; row < kRows; ++row)
    for (int own = 0; own < kTiles; ++own)
      store(outputs + row * stride + own * kLanes,
            is_last ? total[row][own] * load<Floats>(matrix.scales + (tile + own) * kLanes) : total[row][own]);
}

// Writes some tiles, at most a block of them, of many rows: their weights are unpacked once. Returns how many rows it
// took.
template <Layout kLayout>
inline int64_t unpacked_tiles(const Matrix &matrix, const Rows &rows, int64_t first_row, int64_t num_rows,
                              int64_t first, int64_t last, float *outputs, int64_t stride, Ahead &ahead) {
  constexpr int kRows = kRowsOfBytes, kTogether = kTilesUnpacked;
  const int64_t num_taken = num_rows / kRows * kRows;
  UnpackedGroup unpacked[kBlockTiles][kMostUnpacked];
  Groups::for_each(matrix, [&](const Groups &groups) {
    for (int64_t tile = first; tile < last; ++tile)
      unpack<kLayout>(TileWords::of<kLayout>(matrix, tile), groups, unpacked[tile - first]);
    for (int64_t row = 0; row < num_taken; row += kRows) {
      const Inputs inputs = rows.from(first_row + row);
      float *own = outputs + row * stride;
      int64_t tile = first;
      if constexpr (kTogether > 1)
        for (; last - tile >= kTogether; tile += kTogether)
          rounded<kLayout, kRows, kTogether, true>(matrix, inputs, tile, groups, unpacked[tile - first],
                                                   own + (tile - first) * kLanes, stride, ahead);
      for (; tile < last; ++tile)
        rounded<kLayout, kRows, 1, true>(matrix, inputs, tile, groups, unpacked[tile - first],
                                         own + (tile - first) * kLanes, stride, ahead);
    }
  });
  return num_taken;
}

// Does the same for all tiles.
template <Layout kLayout, int kRows>
inline void rounded_tiles(const Matrix &matrix, const Inputs &inputs, int64_t first, int64_t last, float *outputs,
                          int64_t stride, Ahead &ahead) {
  constexpr int kTogether = kRows <= kRowsOfBytes ? kTilesOfBytes<kLayout> : 1;
  int64_t tile = first;
  if constexpr (kTogether > 1)
    for (; ahead.lines && last - tile >= kTogether; tile += kTogether)
      rounded<kLayout, kRows, kTogether>(matrix, inputs, tile, Groups::all(matrix), nullptr, outputs + (tile - first) * kLanes, stride, ahead);
  for (; tile < last; ++tile)
    rounded<kLayout, kRows, 1>(matrix, inputs, tile, Groups::all(matrix), nullptr, outputs + (tile - first) * kLanes, stride, ahead);
}

}  // namespace products
