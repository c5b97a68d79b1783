// Which tiles of a row's logits to compute again: those that have the largest ones.
//
// Tiles are compared by their largest logit, as a whole number that grows with it (`tile_keys`).
#pragma once
#include "vectors.h"

constexpr int64_t kMostExact = 64;  // tiles of a row

inline int64_t padded(int64_t num_tiles) { return (num_tiles + kLanes - 1) / kLanes * kLanes; }

// Writes the keys of the tiles from `first` to `last`; the last thread's end with a row's padding.
inline void write_tile_keys(const float *logits, int64_t first, int64_t last, int64_t num_tiles, int32_t *keys) {
  for (int64_t tile = first; tile < last; ++tile) {
    const float most = largest(load<Floats>(logits + tile * kLanes));
    int32_t bits;
    std::memcpy(&bits, &most, sizeof bits);
    keys[tile] = bits ^ (bits >> 31 & INT32_MAX);
  }
  for (int64_t tile = num_tiles; last == num_tiles && tile < padded(num_tiles); ++tile) keys[tile] = INT32_MIN;
}

inline int64_t num_above(const int32_t *keys, int64_t num_tiles, int32_t key) {
  Words counts{};
  for (int64_t tile = 0; tile < padded(num_tiles); tile += kRegisterLanes)
    counts -= load<Words>(keys + tile) > (Words{} + key);
  int64_t count = 0;
  for (int lane = 0; lane < kRegisterLanes; ++lane) count += counts[lane];
  return count;
}

// Writes the `count` tiles with the largest keys, in their order; of equal ones the first. All threads find the same.
inline void choose_tiles(const int32_t *keys, int64_t num_tiles, int64_t count, int64_t *tiles) {
  // Finds the least key above which at most `count` tiles lie.
  int64_t low = INT32_MIN, high = INT32_MAX;
  int64_t above = 0;  // of the highest key
  while (low < high && above != count) {
    const int64_t middle = (low + high) >> 1;
    const int64_t own = num_above(keys, num_tiles, static_cast<int32_t>(middle));
    if (own > count)
      low = middle + 1;
    else
      high = middle, above = own;
  }
  for (int64_t tile = 0, taken = 0, equal = count - above; tile < num_tiles && taken < count; ++tile)
    if (keys[tile] > high || (keys[tile] == high && equal-- > 0)) tiles[taken++] = tile;
}
