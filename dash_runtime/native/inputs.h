// The inputs of a product, as its matrix wants them. matrix.py lays matrices out.
#pragma once
#include <type_traits>

#include "vectors.h"

constexpr int kGroup = 32;                            // inputs that share a scale of INT4 or INT3
constexpr int kGroupFloats = kGroup / sizeof(float);  // as bytes
constexpr int kFours = kGroup / 4;                    // words of a group with a byte for each weight

// In INT4 a weight is (value − 8 + offset / offsets_in_step) * scale, with what is added to the offset for want of a
// sign; in INT3 4 in place of 8. Refined, a step of INT4 is `kFinerSteps`, and the lower bits say `kFurtherMiddle` for none.
constexpr float kLeastOffset = 256;
constexpr int kScaleBits = 7, kOffsetBits = 9;  // of a group's grid
constexpr int kFinerSteps = 8, kFurtherMiddle = 8;

// Refined is INT8 whose upper bits are an INT4 matrix.
enum Layout : int64_t { kFull, kInt8, kInt4, kInt3, kRefined };

struct Matrix {
  const void *words;
  const void *further;  // refined: the lower bits, four of each weight, in the order of the words without grids
  const float *scales;  // rounded: by output
  int64_t layout, num_inputs;
  int64_t block_tiles;  // FULL: tiles whose words for a pair of inputs lie side by side
  int64_t num_tiles;

  bool is_full() const { return layout == kFull; }
};

// Bits of a weight in `words`, and so the lines of a group of a tile.
constexpr int bits_of(Layout layout) { return layout == kInt8 ? 8 : layout == kInt3 ? 3 : 4; }
constexpr bool has_grids(Layout layout) { return layout != kFull && layout != kInt8; }
// The value in the middle of a weight's range, and the steps of a grid's offset in a step of values.
constexpr int middle_of(Layout layout) {
  const int middle = 1 << (bits_of(layout) - 1);
  return layout == kRefined ? middle * kFinerSteps + kFurtherMiddle : middle;
}
constexpr float offsets_in_step(Layout layout) { return layout == kRefined ? 32.0f / kFinerSteps : 32.0f; }

// The lines of a tile's weights before a group. Where there are grids, two groups have a line of them before.
constexpr int64_t lines_before(Layout layout, int64_t group) {
  return group * bits_of(layout) + (has_grids(layout) ? (group + 1) / 2 : 0);
}

// The cache lines from a tile's first one to a group's weights, and to its grids.
constexpr int64_t weights_line(Layout layout, int64_t group) {
  return group * bits_of(layout) + (has_grids(layout) ? group / 2 + 1 : 0);
}
constexpr int64_t grids_line(Layout layout, int64_t group) { return group / 2 * (2 * bits_of(layout) + 1); }

// The lines of a tile's lower bits before a group.
constexpr int64_t further_lines(Layout layout, int64_t group) { return layout == kRefined ? group * 4 : 0; }

// A group's scales and offsets for a tile, as numbers.
struct Grid {
  Floats scales, offsets;

  Grid() = default;
  explicit Grid(Ints words)
      : scales(__builtin_convertvector(words & ((1 << kScaleBits) - 1), Floats)),
        offsets(__builtin_convertvector(words >> kScaleBits & ((1 << kOffsetBits) - 1), Floats)) {}
};

#ifdef __AVX512F__
using KeptGrid = Grid;
#else
// Registers are too few to keep the numbers for several rows.
using KeptGrid = Ints;
#endif

template <Layout kLayout>
inline KeptGrid grid_of(const int32_t *words, int64_t group) {
  if constexpr (!has_grids(kLayout)) return KeptGrid(Ints{});
  return KeptGrid(load<Ints>(words + grids_line(kLayout, group) * kLanes) >> 16 * (group % 2));
}

// Returns four weights of a group for each of a tile's outputs, as bytes without a sign; `words` are the group's first
// line, and `further` that of its lower bits.
template <Layout kLayout>
inline Ints bytes_of(const int32_t *words, [[maybe_unused]] const int32_t *further, int index) {
  if constexpr (kLayout == kInt3) {
    const Ints low = load<Ints>(words + index / 4 * kLanes) >> 2 * (index % 4), high = load<Ints>(words + 2 * kLanes);
    return (low & 0x03030303) | ((index < 2 ? high << (2 - index) : high >> (index - 2)) & 0x04040404);
  } else if constexpr (kLayout == kRefined) {
    static_assert(kFinerSteps == 8);
    const Ints upper = load<Ints>(words + index / 2 * kLanes) ^ INT32_MIN;
    const Ints lower = load<Ints>(further + index / 2 * kLanes);
    const Ints eights = (index % 2 ? upper >> 1 : upper << 3) & 0x78787878;
    const Ints ones = (index % 2 ? lower >> 4 : lower) & 0x0F0F0F0F;
    return (Ints)((Bits)eights + (Bits)ones);  // the highest byte may be above 127
  } else {
    constexpr int kParts = 8 / bits_of(kLayout);
    // The last weight of a word has a sign.
    const Ints word = load<Ints>(words + index / kParts * kLanes) ^ INT32_MIN;
    return kParts == 1 ? word : (index % 2 ? word >> 4 : word) & 0x0F0F0F0F;
  }
}

// Calls a function with a rounded layout as a type.
template <typename Function>
inline void with_layout(int64_t layout, const Function &function) {
  if (layout == kInt8)
    function(std::integral_constant<Layout, kInt8>());
  else if (layout == kRefined)
    function(std::integral_constant<Layout, kRefined>());
  else if (layout == kInt4)
    function(std::integral_constant<Layout, kInt4>());
  else
    function(std::integral_constant<Layout, kInt3>());
}

// Numbers that rounded weights need of each group of a row's inputs. Four of them, so that threads which prepare a few
// rows each seldom write to the same cache line.
struct Facts {
  float scale;   // of bytes
  float offset;  // what the group's sum is too high by, since its weights and its grid's offsets have no sign
  float step;    // of a grid's offset: a part of the sum of the inputs
  float unused;
};

// Adds what a group's products with a tile sum up to.
template <Layout kLayout>
inline void add_sum(Floats sum, const Facts &facts, const KeptGrid &kept, Floats &total) {
#ifdef __AVX512VNNI__
  sum *= facts.scale;
#endif
  sum -= facts.offset;
  if (!has_grids(kLayout)) {
    total += sum;
  } else {
    const Grid grid(kept);
    sum += grid.offsets * facts.step;
    total += grid.scales * sum;
  }
}

// A few rows, as a kernel reads them.
struct Inputs {
  const float *values;
  int64_t row_stride, group_stride;  // of values
  const Facts *facts;                // [groups, facts_stride], from the first row on
  int64_t facts_stride;

  Inputs from_group(int64_t group) const {
    return {values + group * group_stride, row_stride, group_stride, facts + group * facts_stride, facts_stride};
  }
};

constexpr int64_t kRowsTogether = 16;

// Rows, as products with one layout read them.
//
// In FULL, `values` are a row's inputs one after another: float32, or bf16 where the processor multiplies that. For
// rounded weights 16 rows lie together, and in these all rows of a group: `facts`, and where the processor multiplies
// bytes, the inputs as bytes, which are multiples of the group's scale. Elsewhere these are float32, a row's one after
// another, divided by the power of two that a mask leaves in its weight.
struct Rows {
  const float *values;
  int64_t row_stride;  // of values; 0 for bytes
  const Facts *facts;
  int64_t num_rows, num_groups;

  // Returns the place of a row's group.
  int64_t place(int64_t row, int64_t group) const {
    DASH_CHECK(row >= 0 && row < num_rows && group >= 0 && group < num_groups);
    const int64_t first = row / kRowsTogether * kRowsTogether;
    return first * num_groups + group * together(row) + row - first;
  }

  int64_t together(int64_t row) const {
    const int64_t left = num_rows - row / kRowsTogether * kRowsTogether;
    return left < kRowsTogether ? left : kRowsTogether;
  }

  // The rows from `row` on, up to the last that lies together with it.
  Inputs from(int64_t row) const {
    DASH_CHECK(row >= 0 && row < num_rows);
    if (!facts) return {values + row * row_stride, row_stride, 0, nullptr, 0};
    const Facts *own = facts + place(row, 0);
    if (row_stride) return {values + row * row_stride, row_stride, kGroup, own, together(row)};
    return {values + place(row, 0) * kGroupFloats, kGroupFloats, together(row) * kGroupFloats, own, together(row)};
  }
};

inline int64_t inputs_size(int64_t num_rows, int64_t num_inputs) {
  return num_rows * (num_inputs + num_inputs / kGroup * int64_t{sizeof(Facts) / sizeof(float)});
}

#ifdef __AVX512VNNI__

// Writes a group of a row as bytes, in the order in which words have their weights; returns their sum.
inline int write_bytes(Layout layout, Floats low, Floats high, float factor, void *bytes) {
  // Eight INT4 weights of a word are multiplied in two parts: the low halves of its bytes, and the high ones.
  const __m256i order =
      layout == kInt4 || layout == kRefined
          ? _mm256_set_epi64x(0x0F0D0B090E0C0A08, 0x0705030106040200, 0x0F0D0B090E0C0A08, 0x0705030106040200)
          : _mm256_set_epi64x(0x0F0E0D0C0B0A0908, 0x0706050403020100, 0x0F0E0D0C0B0A0908, 0x0706050403020100);
  const __m512i one = _mm512_cvtps_epi32((__m512)(low * factor)), next = _mm512_cvtps_epi32((__m512)(high * factor));
  const __m256i both = _mm256_set_m128i(_mm512_cvtepi32_epi8(next), _mm512_cvtepi32_epi8(one));
  store(bytes, _mm256_shuffle_epi8(both, order));
  return sum(_mm512_add_epi32(one, next));
}

// The largest input of a group by its size; not a number if one of them is none, which bytes could not say.
inline float most_of_group(Floats low, Floats high) {
  if (_mm512_cmp_ps_mask((__m512)low, (__m512)high, _CMP_UNORD_Q)) return NAN;
  return largest(larger(larger(low, -low), larger(high, -high)));
}

inline Rows prepare_rounded(Layout layout, const float *rows, int64_t num_rows, int64_t num_inputs, float *memory,
                            int64_t first_row, int64_t last_row) {
  const int64_t num_groups = num_inputs / kGroup;
  Facts *facts = reinterpret_cast<Facts *>(memory + num_rows * num_groups * kGroupFloats);
  const Rows prepared{memory, 0, facts, num_rows, num_groups};
  // Weights and offsets are stored without a sign, and are too high by this.
  const float middle = static_cast<float>(middle_of(layout)), in_step = offsets_in_step(layout);
  const float half = has_grids(layout) ? middle + kLeastOffset / in_step : middle;
  for (int64_t row = first_row; row < last_row; ++row)
    for (int64_t group = 0; group < num_groups; ++group) {
      const float *from = rows + row * num_inputs + group * kGroup;
      const Floats low = load<Floats>(from), high = load<Floats>(from + kLanes);
      const float most = most_of_group(low, high);
      const int64_t place = prepared.place(row, group);
      const float scale = most / 127;
      const float sum =
          scale * write_bytes(layout, low, high, most > 0 ? 127 / most : 0, memory + place * kGroupFloats);
      facts[place] = {scale, half * sum, sum / in_step, 0};
    }
  return prepared;
}

#else

// INT3 and refined weights are unpacked to bytes before they are multiplied.
constexpr bool is_unpacked(Layout layout) { return layout == kInt3 || layout == kRefined; }

// Bits from one weight of a word to the next, as masks find them.
constexpr int bits_of_place(Layout layout) { return is_unpacked(layout) ? 8 : bits_of(layout); }

// The place in a word, unpacked or not, of a weight of a group.
constexpr int place_of(Layout layout, int weight) {
  return layout == kRefined ? weight / 2 % 4 : weight % (32 / bits_of_place(layout));
}

// The weight of a group at a place of one of its words.
template <Layout kLayout>
constexpr int weight_at(int word, int place) {
  return kLayout == kRefined ? word / 2 * 8 + place * 2 + word % 2 : word * (32 / bits_of_place(kLayout)) + place;
}

inline Rows prepare_rounded(Layout layout, const float *rows, int64_t num_rows, int64_t num_inputs, float *memory,
                            int64_t first_row, int64_t last_row) {
  const int64_t num_groups = num_inputs / kGroup;
  Facts *facts = reinterpret_cast<Facts *>(memory + num_rows * num_inputs);
  const Rows prepared{memory, num_inputs, facts, num_rows, num_groups};
  const bool has_sign = layout != kInt3;
  const int place_bits = bits_of_place(layout), num_places = 32 / place_bits;
  float scales[kLanes], halves[kLanes];  // the middle of the range, less what a sign has taken from a word's last one
  for (int lane = 0; lane < kLanes; ++lane) {
    const int place = place_of(layout, lane);
    scales[lane] = std::ldexp(1.0f, -place_bits * place);
    halves[lane] =
        static_cast<float>(middle_of(layout) - (has_sign && place == num_places - 1 ? 1 << (place_bits - 1) : 0));
  }
  const Floats scale = load<Floats>(scales), half = load<Floats>(halves);
  for (int64_t row = first_row; row < last_row; ++row)
    for (int64_t group = 0; group < num_groups; ++group) {
      const int64_t from = row * num_inputs + group * kGroup;
      const Floats low = load<Floats>(rows + from), high = load<Floats>(rows + from + kLanes);
      store(memory + from, low * scale);
      store(memory + from + kLanes, high * scale);
      const float step = sum(low + high) / offsets_in_step(layout), offset = sum((low + high) * half);
      facts[prepared.place(row, group)] = {1, has_grids(layout) ? offset + kLeastOffset * step : offset, step, 0};
    }
  return prepared;
}

#endif

// Prepares the rows from `first_row` to `last_row` for a layout, in a memory of `inputs_size` floats for all.
inline Rows prepare(Layout layout, const float *rows, int64_t num_rows, int64_t num_inputs, float *memory,
                    int64_t first_row, int64_t last_row) {
  DASH_CHECK(first_row >= 0 && first_row <= last_row && last_row <= num_rows && num_inputs % kGroup == 0);
  if (layout != kFull)
    return prepare_rounded(layout, rows, num_rows, num_inputs, memory, first_row, last_row);
#ifdef __AVX512BF16__
  for (int64_t place = first_row * num_inputs; place < last_row * num_inputs; place += kLanes)
    write_bf16(reinterpret_cast<uint16_t *>(memory) + place, load<Floats>(rows + place));
  return {memory, num_inputs / 2, nullptr, num_rows, 0};
#else
  for (int64_t place = first_row * num_inputs; place < last_row * num_inputs; place += kLanes)
    store(memory + place, load<Floats>(rows + place));
  return {memory, num_inputs, nullptr, num_rows, 0};
#endif
}
