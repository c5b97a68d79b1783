// A head's weights in INT4, token by token, for the logits of a few tokens that lie apart.
//
// A token has 16 bytes of each group of its inputs, the first 16 weights in their low halves; behind them the groups'
// grids (inputs.h), half a word each. It begins a cache line.
#pragma once
#include <algorithm>

#include "inputs.h"

constexpr int64_t kMostGroups = 512;
constexpr int kBytesOfGroup = kGroup / 2;

// A row's inputs, as products with tokens read them.
struct TokenInputs {
  int64_t num_groups;
  float sums[kMostGroups];  // of each group's inputs; zero behind the last one, as all else is
#ifdef __AVX512VNNI__
  // Inputs are bytes, multiples of their group's scale: the first halves of four groups, then the second ones.
  static constexpr int kGroupsTogether = 4;
  float scales[kMostGroups];
  alignas(kLineBytes) int8_t halves[2][kMostGroups * kBytesOfGroup];

  TokenInputs(const float *inputs, int64_t num_inputs) : num_groups(num_inputs / kGroup) {
    DASH_CHECK(num_groups <= kMostGroups);
    const int64_t end = std::min(kMostGroups, num_groups + kLanes);
    for (int64_t group = 0; group < end; ++group) {
      const bool is_own = group < num_groups;
      const Floats low = is_own ? load<Floats>(inputs + group * kGroup) : Floats{};
      const Floats high = is_own ? load<Floats>(inputs + group * kGroup + kLanes) : Floats{};
      const float most = most_of_group(low, high);
      int8_t bytes[kGroup];  // INT8 has them in their order
      scales[group] = most / 127;
      sums[group] = scales[group] * write_bytes(kInt8, low, high, most > 0 ? 127 / most : 0, bytes);
      for (int half = 0; half < 2; ++half)
        std::memcpy(halves[half] + group * kBytesOfGroup, bytes + half * kBytesOfGroup, kBytesOfGroup);
    }
  }

  // Sixteen groups' products with a token, less their offsets'.
  Floats products(const uint8_t *row, int64_t first, Floats weight_scales) const {
    const auto own = (__m512)(weight_scales * load<Floats>(scales + first));
    const __m512i mask = _mm512_set1_epi8(15);
    Floats total{};
    for (int part = 0; part < kLanes / kGroupsTogether && first + part * kGroupsTogether < num_groups; ++part) {
      const int64_t byte = (first + part * kGroupsTogether) * kBytesOfGroup;
      const __m512i both = load<__m512i>(row + byte);
      __m512i sums_of_four = _mm512_dpbusd_epi32(__m512i{}, _mm512_and_si512(both, mask), load<__m512i>(halves[0] + byte));
      sums_of_four = _mm512_dpbusd_epi32(sums_of_four, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask),
                                         load<__m512i>(halves[1] + byte));
      const __m512i group_of_lane = (__m512i)(kNumbers / 4 + part * kGroupsTogether);
      total += (Floats)_mm512_cvtepi32_ps(sums_of_four) * (Floats)_mm512_permutexvar_ps(group_of_lane, own);
    }
    return total;
  }
#else
  const float *inputs;

  TokenInputs(const float *inputs, int64_t num_inputs) : num_groups(num_inputs / kGroup), inputs(inputs) {
    DASH_CHECK(num_groups <= kMostGroups);
    std::fill(sums, sums + kMostGroups, 0.0f);
    for (int64_t group = 0; group < num_groups; ++group)
      sums[group] = sum(load<Floats>(inputs + group * kGroup) + load<Floats>(inputs + group * kGroup + kLanes));
  }

  Floats products(const uint8_t *row, int64_t first, Floats weight_scales) const {
    float own[kLanes];
    store(own, weight_scales);
    Floats total{};
    for (int64_t group = first; group < std::min(num_groups, first + kLanes); ++group) {
      const Ints both = from_bytes(row + group * kBytesOfGroup);
      const float *from = inputs + group * kGroup;
      const Floats low = __builtin_convertvector(both & 15, Floats) * load<Floats>(from);
      const Floats high = __builtin_convertvector(both >> 4, Floats) * load<Floats>(from + kLanes);
      total += (low + high) * own[group - first];
    }
    return total;
  }
#endif
};

struct TokenRows {
  const uint8_t *words;  // [vocabulary, bytes of a token]
  const float *units;    // [vocabulary]
  int64_t num_inputs;

  // Writes the logits of these tokens.
  void write(const int32_t *tokens, int64_t count, const float *values, float *logits) const {
    const TokenInputs inputs(values, num_inputs);
    const int64_t size = num_bytes();
    for (int64_t place = 0; place < std::min(kAhead, count); ++place) fetch(words + tokens[place] * size, size);
    for (int64_t place = 0; place < count; ++place) {
      if (place + kAhead < count) fetch(words + tokens[place + kAhead] * size, size);
      const int64_t token = tokens[place];
      DASH_CHECK(token >= 0);
      logits[token] = dot(words + token * size, inputs) * units[token];
    }
  }

  // Bytes of a token. Grids are read 16 at a time.
  int64_t num_bytes() const {
    const int64_t num_groups = num_inputs / kGroup, num_steps = (num_groups + kLanes - 1) / kLanes;
    const int64_t used = num_groups * kBytesOfGroup + num_steps * int64_t{sizeof(Halves)};
    return (used + kLineBytes - 1) / kLineBytes * kLineBytes;
  }

 private:
  static constexpr float kMiddle = 1 << (bits_of(kInt4) - 1);  // of the weights, which have no sign
  static constexpr int64_t kAhead = 6;  // tokens whose weights are fetched: they lie apart

  static float dot(const uint8_t *row, const TokenInputs &inputs) {
    const uint8_t *grids = row + inputs.num_groups * kBytesOfGroup;
    Floats total{}, offsets{};
    for (int64_t first = 0; first < inputs.num_groups; first += kLanes) {
      const Ints grid = from_halves(grids + first * sizeof(uint16_t));
      const Floats scale = __builtin_convertvector(grid & ((1 << kScaleBits) - 1), Floats);
      const Floats offset = __builtin_convertvector(grid >> kScaleBits, Floats) - kLeastOffset;
      offsets += scale * (offset / offsets_in_step(kInt4) - kMiddle) * load<Floats>(inputs.sums + first);
      total += inputs.products(row, first, scale);
    }
    return sum(total + offsets);
  }

  static void fetch(const uint8_t *row, int64_t size) {
    for (int64_t byte = 0; byte < size; byte += kLineBytes) __builtin_prefetch(row + byte);
  }
};
