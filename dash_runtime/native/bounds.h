// How far a head's rough logits may be off, so that the likeliest token is found without most of the exact ones.
//
// A logit is the product of a token's weights and a state, w·x; the rough one is that of their bytes, ŵ·x̂. They differ
// by (w − ŵ)·x̂ + w·(x − x̂): at most by the products of the lengths (Cauchy and Schwarz), and by what sums round.
#pragma once
#include "ends.h"

constexpr int64_t kBoundedTiles = 64;  // whose rough logits are in a near cache at a time

// Rounding of a sum, for each input, as a share of the product of both lengths: sixteen halves of a unit in the last
// place, since weights without a sign are several times as large.
constexpr float kRoundedByInput = 16.0f / (1 << 24);
constexpr float kLengthError = 1e-5f;  // of a length, as a share of it

// The length of a state that was rounded to bytes, and the length of its rounding error.
struct StateError {
  float length, error;

  static StateError of([[maybe_unused]] const Rows &bytes, [[maybe_unused]] int64_t row, const float *state,
                       int64_t size) {
    Floats squares{}, errors{};
    for (int64_t place = 0; place < size; place += kLanes) {
      const Floats exact = load<Floats>(state + place);
#ifdef __AVX512VNNI__
      using Bytes = int8_t __attribute__((vector_size(kLanes)));
      const int64_t group = bytes.place(row, place / kGroup);
      const auto *of_group = reinterpret_cast<const int8_t *>(bytes.values + group * kGroupFloats);
      const Bytes own = load<Bytes>(of_group + place % kGroup);
      const Floats rough =
          __builtin_convertvector(__builtin_convertvector(own, Ints), Floats) * bytes.facts[group].scale;
#else
      const Floats rough = exact;
#endif
#ifdef __AVX512BF16__
      const Floats error = rounded_to_bf16(exact) - rough;
#else
      const Floats error = exact - rough;
#endif
      squares += rough * rough, errors += error * error;
    }
    const float length = std::sqrt(sum(squares)) * (1 + kLengthError);
    const float error = std::sqrt(sum(errors)) * (1 + kLengthError);
    return {length, error + (length + error) * kRoundedByInput * static_cast<float>(size)};
  }
};

// Writes the most that any logit of each tile from `first` to `last` may be, and keeps the tile that may have the most.
// `rough` are the logits from `first` on.
inline void write_uppers(const Bounds &bounds, const StateError &state, const float *rough, int64_t first, int64_t last,
                         float *uppers, Best &top) {
  for (int64_t tile = first; tile < last; ++tile, rough += kLanes) {
    const Floats own = load<Floats>(rough) + load<Floats>(bounds.errors + tile * kLanes) * state.length +
                       load<Floats>(bounds.lengths + tile * kLanes) * state.error;
    const float upper = largest(own == own ? own : filled(INFINITY));
    uppers[tile] = upper;
    if (upper > top.logit) top = {upper, tile};
  }
}
