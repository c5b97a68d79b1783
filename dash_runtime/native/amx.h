// Products by the processor's matrix tiles, AMX: 16 rows in little more than the time of one.
//
// In FULL a row's sums have one order here too, but another one than that of vectors: a process uses the one or the
// other. Sums of bytes are exact, so rounded weights have the same bits with both.
#pragma once
#include "unpacked.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define DASH_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amx {

constexpr int64_t kMostRows = kRowsTogether;  // that a tile holds
constexpr int64_t kFewestRows = 6;            // of rounded weights, for which tiles pay

// How many of so many rows `rounded_product` should take, the first ones.
inline int64_t num_rounded_rows(int64_t num_rows) {
  const int64_t last = num_rows % kMostRows;
  return last < kFewestRows ? num_rows - last : num_rows;
}

#ifdef DASH_AMX

constexpr int kRowBytes = 64;    // of a tile
constexpr int kPairs = 16;       // of inputs in FULL, whose weights a tile holds
constexpr int kTilesAtOnce = 4;  // of outputs in FULL
constexpr int kTurnsAhead = 3;   // weights are fetched so many turns of the loop ahead

// Asks the system to keep tiles for this process. Without that their first use would end it.
inline bool is_permitted() {
  constexpr int kAskForState = 0x1023, kStateOfTiles = 18;
  return syscall(SYS_arch_prctl, kAskForState, kStateOfTiles) == 0;
}

inline const bool is_here = is_permitted();

// How large the eight tiles are.
struct alignas(64) Sizes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  Sizes &with(int first, int last, int64_t num_rows, int num_bytes = kRowBytes) {
    for (int tile = first; tile < last; ++tile)
      rows[tile] = static_cast<uint8_t>(num_rows), row_bytes[tile] = static_cast<uint16_t>(num_bytes);
    return *this;
  }

  void set() const {
    asm volatile("" ::: "memory");  // GCC does not know what tiles read
    _tile_loadconfig(this);
  }
};

// The tiles of a product: 0 to 3 hold sums, 4 and 7 inputs, 5 and 6 weights.
inline Sizes sizes_of(int64_t num_rows, int input_bytes, int weight_rows) {
  return Sizes()
      .with(0, 4, num_rows)
      .with(4, 5, num_rows, input_bytes)
      .with(5, 7, weight_rows)
      .with(7, 8, num_rows, input_bytes);
}

// The weights of a few tiles of outputs: each tile's first byte, and the bytes from one pair of inputs to the next.
struct Weights {
  const char *tiles[kTilesAtOnce];
  int64_t count, step;

  // Takes the tiles from `first` on, up to `last` or as many as fit.
  Weights(const Matrix &matrix, int64_t first, int64_t last)
      : count(last - first < kTilesAtOnce ? last - first : kTilesAtOnce), step(matrix.block_tiles * kRowBytes) {
    const char *words = static_cast<const char *>(matrix.words);
    for (int64_t tile = first; tile < first + count; ++tile)
      tiles[tile - first] =
          words + tile / matrix.block_tiles * (matrix.num_inputs / 2) * step + tile % matrix.block_tiles * kRowBytes;
  }
};

// A part of the next tiles' weights, fetched while these are multiplied by many rows: in a turn of the loop over inputs
// the rows from `first` to `last` of each tile.
struct Fetch {
  const Weights &weights;
  int first, last;

  void turn(int64_t offset) const {
    for (int row = first; row < last; ++row)
      for (int64_t tile = 0; tile < weights.count; ++tile)
        __builtin_prefetch(weights.tiles[tile] + offset + row * weights.step, 0, 2);
  }
};

// Two tiles of outputs, or one, in FULL for two tiles of rows.
struct Square {
  const char *tiles[2];  // of weights
  Inputs rows[2];
  float *outputs[2];
};

// Half of what tiles read lies in the nearest cache then: what one tile of outputs needs, the other one needs too.
template <int kCount>
inline void write_square(const Square &square, int64_t step, int64_t num_pairs, int64_t stride, const Fetch &fetch) {
  const auto *rows = reinterpret_cast<const char *>(square.rows[0].values),
             *others = reinterpret_cast<const char *>(square.rows[1].values);
  const int64_t row_bytes = square.rows[0].row_stride * int64_t{sizeof(float)};
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t turn = 0; turn < num_pairs / kPairs; ++turn) {
    const int64_t offset = turn * kPairs * step;
    fetch.turn(offset);
    _tile_loadd(4, rows + turn * kRowBytes, row_bytes);
    _tile_loadd(5, square.tiles[0] + offset, step);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(7, others + turn * kRowBytes, row_bytes);
    _tile_dpbf16ps(2, 7, 5);
    if constexpr (kCount > 1) {
      _tile_loadd(6, square.tiles[1] + offset, step);
      _tile_dpbf16ps(1, 4, 6);
      _tile_dpbf16ps(3, 7, 6);
    }
  }
  const int64_t output_bytes = stride * int64_t{sizeof(float)};
  _tile_stored(0, square.outputs[0], output_bytes);
  _tile_stored(2, square.outputs[1], output_bytes);
  if constexpr (kCount > 1) {
    _tile_stored(1, square.outputs[0] + kLanes, output_bytes);
    _tile_stored(3, square.outputs[1] + kLanes, output_bytes);
  }
}

// Writes `kCount` tiles of outputs in FULL for up to 16 rows.
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

// products.h's `product` in FULL.
inline void full_product(const Matrix &matrix, const Rows &rows, int64_t first_row, int64_t num_rows, int64_t first,
                         int64_t last, float *outputs, int64_t stride) {
  // Tiles with fewer rows take less time: all have about as many.
  const int64_t num_turns = (num_rows + kMostRows - 1) / kMostRows, num_pairs = matrix.num_inputs / 2;
  const int64_t rows_at_once = (num_rows + num_turns - 1) / num_turns;
  // The last rows, some of them again: all tiles keep their sizes.
  const auto row_of = [&](int64_t turn) {
    return turn + 1 < num_turns ? turn * rows_at_once : num_rows - rows_at_once;
  };
  sizes_of(rows_at_once, kRowBytes, kPairs).set();
  for (int64_t tile = first, count; tile < last; tile += count) {
    const Weights weights(matrix, tile, last), next(matrix, tile + weights.count, last);
    count = weights.count;
    const auto outputs_of = [&](int64_t row) { return outputs + row * stride + (tile - first) * kLanes; };
    const int num_parts = static_cast<int>(num_turns / 2 * ((count + 1) / 2));
    for (int64_t turn = 0, part = 0; turn + 1 < num_turns; turn += 2) {
      const int64_t row = row_of(turn), other = row_of(turn + 1);
      for (int64_t place = 0; place < count; place += 2, ++part) {
        const bool is_last = place + 1 == count;
        const Square square{{weights.tiles[place], weights.tiles[place + !is_last]},
                            {rows.from(first_row + row), rows.from(first_row + other)},
                            {outputs_of(row) + place * kLanes, outputs_of(other) + place * kLanes}};
        const Fetch fetch{next, kPairs * static_cast<int>(part) / num_parts,
                          kPairs * static_cast<int>(part + 1) / num_parts};
        (is_last ? write_square<1> : write_square<2>)(square, weights.step, num_pairs, stride, fetch);
      }
    }
    if (num_turns % 2) {
      const int64_t row = row_of(num_turns - 1);
      kWriteOutputs[count - 1](weights, num_pairs, rows.from(first_row + row), outputs_of(row), stride, num_turns == 1);
    }
  }
  _tile_release();
}

// Adds some groups of a tile of outputs to the rows' sums, which begin at 0 or are in `outputs`, and multiplies them by
// `scales` in the end, if there are any. Fetches as many lines as a group has from `ahead` on. Tiles may have more
// rows than these: what follows in memory, at most the rows' facts, whose sums nobody reads.
template <Layout kLayout, int kRows>
inline void add_groups(const int32_t *words, const UnpackedGroup *groups, int64_t num_groups, const Inputs &inputs,
                       const char *ahead, bool from_zero, const float *scales, float *outputs, int64_t stride) {
  const float *values = inputs.values;
  const Facts *facts = inputs.facts;
  alignas(kRowBytes) int32_t sums[kMostRows][kLanes];
  Floats total[kRows];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) total[row] = from_zero ? Floats{} : load<Floats>(outputs + row * stride);
  for (int64_t group = 0; group < num_groups; ++group) {
    for (int64_t line = lines_before(kLayout, group); ahead && line < lines_before(kLayout, group + 1); ++line)
      __builtin_prefetch(ahead + line * kRowBytes);
    _tile_zero(0);
    _tile_loadd(4, values, kGroup);
    _tile_loadd(5, groups[group].words, kRowBytes);
    _tile_dpbsud(0, 4, 5);
    _tile_stored(0, sums, kRowBytes);
    const KeptGrid grid = grid_of<kLayout>(words, group);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
      add_sum<kLayout>(__builtin_convertvector(load<Ints>(sums[row]), Floats), facts[row], grid, total[row]);
    values += inputs.group_stride, facts += inputs.facts_stride;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row)
    store(outputs + row * stride, scales ? total[row] * load<Floats>(scales) : total[row]);
}

// `add_groups` for so many rows, `kFewestRows` or more, or for the first 16 of them.
template <Layout kLayout, int kRows = kMostRows>
inline decltype(&add_groups<kLayout, kRows>) adder_of(int64_t num_rows) {
  if constexpr (kRows > kFewestRows)
    if (num_rows < kRows) return adder_of<kLayout, kRows - 1>(num_rows);
  return add_groups<kLayout, kRows>;
}

// Writes a tile of outputs; then fetches the first weights of the next one.
template <Layout kLayout>
inline void rounded_tile(const Matrix &matrix, const Rows &rows, int64_t first_row, int64_t num_rows, int64_t tile,
                         bool fetches, float *outputs, int64_t stride) {
  UnpackedGroup unpacked[kMostUnpacked];
  const TileWords words = TileWords::of<kLayout>(matrix, tile);
  Groups::for_each(matrix, [&](const Groups &groups) {
    const int32_t *own = words.words + lines_before(kLayout, groups.first) * kLanes;
    unpack<kLayout>(words, groups, unpacked);
    asm volatile("" ::: "memory");  // GCC does not know what tiles read
    const bool is_last = groups.last == Groups::all(matrix).last;
    const float *scales = is_last ? matrix.scales + tile * kLanes : nullptr;
    for (int64_t row = 0; row < num_rows; row += kMostRows) {
      const auto *following = reinterpret_cast<const char *>(own + lines_before(kLayout, groups.count()) * kLanes);
      adder_of<kLayout>(num_rows - row)(own, unpacked, groups.count(), rows.from(first_row + row).from_group(groups.first),
                                        row || (is_last && !fetches) ? nullptr : following, !groups.first, scales,
                                        outputs + row * stride, stride);
    }
  });
}

// The same for rounded weights and the first rows. What follows up to `end` is fetched ahead.
inline void rounded_product(const Matrix &matrix, const Rows &rows, int64_t first_row, int64_t num_rows, int64_t first,
                            int64_t last, int64_t end, float *outputs, int64_t stride) {
  sizes_of(num_rows < kMostRows ? num_rows : kMostRows, kGroup, kFours).set();
  for (int64_t tile = first; tile < last; ++tile, outputs += kLanes) {
    const bool fetches = tile + 1 < end;
    with_layout(matrix.layout, [&](auto layout) {
      rounded_tile<decltype(layout)::value>(matrix, rows, first_row, num_rows, tile, fetches, outputs, stride);
    });
  }
  _tile_release();
}

#else

constexpr bool is_here = false;
inline void full_product(const Matrix &, const Rows &, int64_t, int64_t, int64_t, int64_t, float *, int64_t) {}
inline void rounded_product(const Matrix &, const Rows &, int64_t, int64_t, int64_t, int64_t, int64_t, float *,
                            int64_t) {}

#endif

}  // namespace amx
