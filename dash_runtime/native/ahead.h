// How many rows and tiles of outputs a product takes at once, and the weights that it fetches before it reads them.
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
// registers, and refined weights lie in two places each.
#ifdef __AVX512F__
constexpr int kMostRows = 8, kPairsAtOnce = 1;
#else
constexpr int kMostRows = 2, kPairsAtOnce = 8;
#endif
#ifdef __AVX512VNNI__
constexpr int kRowsOfBytes = 4;
template <Layout kLayout>
constexpr int kTilesOfBytes = kLayout == kRefined ? 1 : kLayout == kInt3 ? 2 : 4;
#else
constexpr int kRowsOfBytes = kMostRows;
template <Layout kLayout>
constexpr int kTilesOfBytes = 1;
#endif
// From so many rows on a block's weights are unpacked once for all. Where bytes are not multiplied, only those are that
// any product unpacks.
constexpr int64_t kRowsToUnpack = 16;
#ifdef __AVX512VNNI__
constexpr int kTilesUnpacked = 4;
constexpr bool unpacks_once(Layout layout) { return has_grids(layout); }
#else
constexpr int kTilesUnpacked = 1;
constexpr bool unpacks_once(Layout layout) { return is_unpacked(layout); }
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

inline int64_t bytes_of_tile(const Matrix &matrix) { return lines_of_tile(matrix) * kLineBytes; }

// A tile's cache lines that a turn of a kernel's loop reads, at most: of a pair of inputs in FULL, of a group
// elsewhere.
inline int64_t lines_in_turn(const Matrix &matrix) {
  return matrix.is_full() ? 1 : lines_before(static_cast<Layout>(matrix.layout), 1);
}

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
