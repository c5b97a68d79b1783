// Rounded weights as bytes, in a memory that stays in the nearest caches while many rows read them.
#pragma once
#include "inputs.h"

constexpr int kMostUnpacked = 24;  // groups of a tile

// A group's weights for a tile of outputs, as bytes without a sign.
struct alignas(kLineBytes) UnpackedGroup {
  int32_t words[kFours][kLanes];
  KeptGrid grid;
};

// Where a tile's words begin, and its lower bits.
struct TileWords {
  const int32_t *words, *further;

  template <Layout kLayout>
  static TileWords of(const Matrix &matrix, int64_t tile) {
    const int64_t num_groups = matrix.num_inputs / kGroup;
    const int64_t lines = tile * lines_before(kLayout, num_groups), lower = tile * further_lines(kLayout, num_groups);
    const auto *words = static_cast<const int32_t *>(matrix.words);
    return {words + lines * kLanes, static_cast<const int32_t *>(matrix.further) + lower * kLanes};
  }

  // The same from a group on.
  template <Layout kLayout>
  TileWords from(int64_t group) const {
    return {words + weights_line(kLayout, group) * kLanes, further + further_lines(kLayout, group) * kLanes};
  }
};

// Some of a matrix's groups. Two groups share a line of grids, so that a part begins with an even one.
struct Groups {
  int64_t first, last;

  int64_t count() const { return last - first; }

  static Groups all(const Matrix &matrix) { return {0, matrix.num_inputs / kGroup}; }

  // Calls the function with parts of all groups that fit into the memory.
  template <class Function>
  static void for_each(const Matrix &matrix, const Function &function) {
    const int64_t num_groups = matrix.num_inputs / kGroup, num_pairs = (num_groups + 1) / 2;
    const int64_t num_parts = (num_groups + kMostUnpacked - 1) / kMostUnpacked;
    for (int64_t part = 0; part < num_parts; ++part) {
      const int64_t next = 2 * (num_pairs * (part + 1) / num_parts);
      function(Groups{2 * (num_pairs * part / num_parts), next < num_groups ? next : num_groups});
    }
  }
};

template <Layout kLayout>
inline void unpack(const TileWords &tile, const Groups &groups, UnpackedGroup *unpacked) {
  constexpr int64_t kFurther = further_lines(kLayout, 1);
  for (int64_t group = groups.first; group < groups.last; ++group, ++unpacked) {
    const TileWords own = tile.from<kLayout>(group);
    unpacked->grid = grid_of<kLayout>(tile.words, group);
    for (int64_t line = 0; line < kFurther; ++line)
      __builtin_prefetch(own.further + (kMostUnpacked * kFurther + line) * kLanes);
#pragma GCC unroll 8
    for (int index = 0; index < kFours; ++index)
      store(unpacked->words[index], bytes_of<kLayout>(own.words, own.further, index));
  }
}
