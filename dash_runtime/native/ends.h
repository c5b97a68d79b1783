// The ends of a pass through a model: a token's row of the embedding, and the head's likeliest token.
#pragma once
#include "likely.h"
#include "products.h"
#include "shortlist.h"
#include "token_rows.h"

// The matrix of the embedding, in bf16.
struct Embedding {
  const uint16_t *words;
  double multiplier;
};

// A rough matrix in INT8 for all logits, and how far these may be off (bounds.h).
struct Bounds {
  Matrix rough;
  const float *errors, *lengths;  // [vocabulary]: of what the weights of a token are off by, and of the exact ones
};

// A head of one matrix, which may have bounds; or a `rough` one for all logits, and `matrix` for those of a row's tiles
// with the largest; or a narrow one: `rough` for all logits, from what `narrow` makes of the state, `rows` for the
// likely tokens', and again `matrix`.
struct Head {
  const float *norm;
  Matrix matrix, rough, narrow;  // without words if there is none
  const int64_t *repeated;       // the inputs that `rough`, or `rows`, have again at the end, in [0, hidden_size)
  const float *mean, *offsets;   // narrow: the logits lack the state's product with `mean`, and these [vocabulary]
  TokenRows rows;
  Bounds bounds;
  int64_t num_exact;  // tiles, at most `kMostExact`
  int64_t num_tiles;
  double multiplier;

  bool has_rough() const { return rough.words && !is_narrow(); }
  bool is_narrow() const { return narrow.words != nullptr; }
  // Inputs of what has some again at its end.
  int64_t num_repeated() const { return is_narrow() ? rows.num_inputs : rough.num_inputs; }
};

// A token and its logit.
struct Best {
  float logit;
  int64_t token;

  // Equal ones: the first.
  bool is_below(const Best &later) const { return later.logit > logit; }
};

// A row's best of all threads' `[threads, rows]`.
inline Best best_of_threads(const Best *best, int64_t row, int64_t num_rows, int64_t num_threads) {
  Best own = best[row];
  for (int64_t thread = 1; thread < num_threads; ++thread)
    if (own.is_below(best[thread * num_rows + row])) own = best[thread * num_rows + row];
  return own;
}

inline void embed(const Embedding &embedding, int64_t token, int64_t size, float *state) {
  const uint16_t *row = embedding.words + token * size;
  for (int64_t place = 0; place < size; place += kLanes) store(state + place, from_bf16(row + place));
  if (embedding.multiplier == 1) return;
  const float multiplier = static_cast<float>(embedding.multiplier);
  for (int64_t place = 0; place < size; place += kLanes)
    store(state + place, rounded_to_bf16(load<Floats>(state + place) * multiplier));
}

// Multiplies the logits of a row's tiles from `first` to `last`; returns the largest of them.
inline Best scaled_best(float *logits, int64_t first, int64_t last, double multiplier) {
  if (multiplier != 1)
    for (int64_t place = first * kLanes; place < last * kLanes; place += kLanes)
      store(logits + place, load<Floats>(logits + place) * static_cast<float>(multiplier));
  constexpr int kParts = kLanes / kRegisterLanes;
  Register most[kParts];
  Words tiles[kParts]{};
  for (int part = 0; part < kParts; ++part) most[part] = Register{} - INFINITY;
  for (int64_t tile = first; tile < last; ++tile)
    for (int part = 0; part < kParts; ++part) {
      const Register own = load<Register>(logits + tile * kLanes + part * kRegisterLanes);
      const Words number = Words{} + static_cast<int32_t>(tile);
      tiles[part] = own > most[part] ? number : tiles[part];
      most[part] = own > most[part] ? own : most[part];
    }
  Best best{-INFINITY, first * kLanes};
  for (int lane = 0; lane < kLanes; ++lane) {
    const float logit = most[lane / kRegisterLanes][lane % kRegisterLanes];
    const int64_t token = int64_t{tiles[lane / kRegisterLanes][lane % kRegisterLanes]} * kLanes + lane;
    if (logit > best.logit || (logit == best.logit && token < best.token)) best = {logit, token};
  }
  return best;
}
