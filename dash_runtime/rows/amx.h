// Products in FULL by the processor's matrix tiles, AMX: 16 rows in little more than the time of one.
//
// A row's sums have one order here too, but another one than that of vectors: a process uses the one or the other.
#pragma once
#include "inputs.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amx {

#ifdef __AMX_BF16__

constexpr int kMostRows = 16, kPairs = 16;  // rows and pairs of inputs that a tile holds
constexpr int kRowBytes = 64;
constexpr int kTilesAtOnce = 4;  // of outputs
constexpr int kTurnsAhead = 3;   // weights are fetched so many turns of the loop before they are needed

// Asks the system to keep tiles for this process. Without that their first use would end it.
inline bool is_permitted() {
  constexpr int kAskForState = 0x1023, kStateOfTiles = 18;
  return syscall(SYS_arch_prctl, kAskForState, kStateOfTiles) == 0;
}

inline const bool is_here = is_permitted();

// How large the eight tiles are: 0 to 3 hold sums, 4 inputs, 5 and 6 weights.
struct alignas(64) Sizes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit Sizes(int64_t num_rows) {
    for (int tile = 0; tile < 7; ++tile)
      row_bytes[tile] = kRowBytes, rows[tile] = static_cast<uint8_t>(tile < 5 ? num_rows : kPairs);
  }
};

// Where the weights of a few tiles of outputs begin, and the bytes from one pair of inputs to the next.
struct Weights {
  const char *tiles[kTilesAtOnce];
  int64_t step;

  Weights(const Matrix &matrix, int64_t first, int64_t count) : step(matrix.block_tiles * kRowBytes) {
    const char *words = static_cast<const char *>(matrix.words);
    for (int64_t tile = first; tile < first + count; ++tile)
      tiles[tile - first] =
          words + tile / matrix.block_tiles * (matrix.num_inputs / 2) * step + tile % matrix.block_tiles * kRowBytes;
  }
};

// Writes `kCount` tiles of outputs for up to 16 rows.
template <int kCount>
inline void write_outputs(Weights weights, int64_t num_pairs, const Inputs &inputs, float *outputs, int64_t stride,
                          bool fetches) {
  const int64_t step = weights.step, turn = kPairs * step;
  const char *rows = reinterpret_cast<const char *>(inputs.values);
  const int64_t row_bytes = inputs.row_stride * int64_t{sizeof(float)};
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t pair = 0; pair < num_pairs; pair += kPairs) {
    if (fetches)
      for (int row = 0; row < kPairs; ++row)
        for (int tile = 0; tile < kCount; ++tile)
          __builtin_prefetch(weights.tiles[tile] + kTurnsAhead * turn + row * step);
    _tile_loadd(4, rows, row_bytes);
    _tile_loadd(5, weights.tiles[0], step);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kCount > 1) {
      _tile_loadd(6, weights.tiles[1], step);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (kCount > 2) {
      _tile_loadd(5, weights.tiles[2], step);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (kCount > 3) {
      _tile_loadd(6, weights.tiles[3], step);
      _tile_dpbf16ps(3, 4, 6);
    }
    for (int tile = 0; tile < kCount; ++tile) weights.tiles[tile] += turn;
    rows += kRowBytes;
  }
  const int64_t output_bytes = stride * int64_t{sizeof(float)};
  _tile_stored(0, outputs, output_bytes);
  if constexpr (kCount > 1) _tile_stored(1, outputs + kLanes, output_bytes);
  if constexpr (kCount > 2) _tile_stored(2, outputs + 2 * kLanes, output_bytes);
  if constexpr (kCount > 3) _tile_stored(3, outputs + 3 * kLanes, output_bytes);
}

constexpr decltype(&write_outputs<1>) kWriteOutputs[] = {write_outputs<1>, write_outputs<2>, write_outputs<3>,
                                                         write_outputs<4>};

// products.h's `product`.
inline void product(const Matrix &matrix, const Inputs &inputs, int64_t num_rows, int64_t first, int64_t last,
                    float *outputs, int64_t stride) {
  const int64_t rows_at_once = num_rows < kMostRows ? num_rows : kMostRows;
  const Sizes sizes(rows_at_once);
  asm volatile("" ::: "memory");  // GCC does not know what tiles read
  _tile_loadconfig(&sizes);
  for (int64_t tile = first, count; tile < last; tile += count) {
    count = last - tile < kTilesAtOnce ? last - tile : kTilesAtOnce;
    const Weights weights(matrix, tile, count);
    for (int64_t next = 0; next < num_rows; next += kMostRows) {
      // The last rows, some of them again: all tiles keep their sizes.
      const int64_t row = next < num_rows - rows_at_once ? next : num_rows - rows_at_once;
      kWriteOutputs[count - 1](weights, matrix.num_inputs / 2, inputs.from(row),
                               outputs + row * stride + (tile - first) * kLanes, stride, next == 0);
    }
  }
  _tile_release();
}

#else

constexpr bool is_here = false;
inline void product(const Matrix &, const Inputs &, int64_t, int64_t, int64_t, float *, int64_t) {}

#endif

}  // namespace amx
