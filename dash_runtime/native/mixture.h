// A layer's mixture of experts, as layers/mlp.py has it: a router chooses a few of them for each row, and rows of one
// expert run together.
#pragma once
#include <algorithm>
#include <vector>

#include "inputs.h"

// The matrices of all experts lie one after the other, along their outputs: gate and up of the first one come first.
struct Mixture {
  Matrix router;        // in FULL, padded to whole tiles
  int64_t num_experts;  // 0: a single MLP
  int64_t num_chosen, has_normed_shares;
};

// An expert of a row, and what its output counts.
struct Choice {
  int32_t expert;
  float share;
};

// Writes a row's most probable experts, the best first, from the scores of all. What is no number comes last.
inline void choose_experts(const Mixture &mixture, float *scores, Choice *chosen) {
  // As the eager router rounds them, so that both choose the same.
  for (int64_t place = 0; place < mixture.num_experts; place += kLanes)
    store(scores + place, rounded_to_bf16(load<Floats>(scores + place)));
  const float most = *std::max_element(scores, scores + mixture.num_experts);
  float total = 0, taken = 0;
  int64_t count = 0;
  for (int64_t expert = 0; expert < mixture.num_experts; ++expert) {
    const Choice own{static_cast<int32_t>(expert), std::exp(scores[expert] - most)};
    total += own.share;
    int64_t place = count;
    while (place > 0 && chosen[place - 1].share < own.share) --place;
    if (place == mixture.num_chosen) continue;
    if (count < mixture.num_chosen) ++count;
    std::copy_backward(chosen + place, chosen + count - 1, chosen + count);
    chosen[place] = own;
  }
  for (int64_t place = 0; place < count; ++place) taken += chosen[place].share;
  for (int64_t place = 0; place < count; ++place) chosen[place].share /= mixture.has_normed_shares ? taken : total;
}

// The choices of each expert, by number: row after row, and in a row by rank.
class ExpertRows {
 public:
  void sort(const Mixture &mixture, const Choice *chosen, int64_t num_rows) {
    const int64_t count = num_rows * mixture.num_chosen;
    begins_.assign(mixture.num_experts + 1, 0), numbers_.resize(count);
    for (int64_t own = 0; own < count; ++own) ++begins_[chosen[own].expert + 1];
    for (int64_t expert = 0; expert < mixture.num_experts; ++expert) begins_[expert + 1] += begins_[expert];
    next_ = begins_;
    for (int64_t own = 0; own < count; ++own) numbers_[next_[chosen[own].expert]++] = static_cast<int32_t>(own);
  }

  // Calls `work` with each expert that has any: with the place of its first choice among all, their count and numbers.
  template <class Work>
  void for_each(Work work) const {
    for (size_t expert = 0; expert + 1 < begins_.size(); ++expert)
      if (const int32_t begin = begins_[expert], end = begins_[expert + 1]; begin < end)
        work(static_cast<int64_t>(expert), int64_t{begin}, int64_t{end - begin}, numbers_.data() + begin);
  }

 private:
  std::vector<int32_t> begins_, next_, numbers_;
};

// Some of the rows, as products read them, in a memory of `inputs_size` floats for as many.
inline Rows gathered(const Rows &from, const int32_t *choices, int64_t num_chosen, int64_t count, int64_t num_inputs,
                     float *memory) {
  if (!from.facts) {
    for (int64_t own = 0; own < count; ++own)
      std::memcpy(memory + own * from.row_stride, from.values + choices[own] / num_chosen * from.row_stride,
                  from.row_stride * sizeof(float));
    return {memory, from.row_stride, nullptr, count, 0};
  }
  const int64_t row_floats = from.row_stride ? num_inputs : from.num_groups * kGroupFloats;
  Facts *facts = reinterpret_cast<Facts *>(memory + count * row_floats);
  const Rows rows{memory, from.row_stride, facts, count, from.num_groups};
  for (int64_t own = 0; own < count; ++own) {
    const int64_t row = choices[own] / num_chosen;
    if (from.row_stride)
      std::memcpy(memory + own * row_floats, from.values + row * row_floats, row_floats * sizeof(float));
    for (int64_t group = 0; group < from.num_groups; ++group) {
      const int64_t to = rows.place(own, group), place = from.place(row, group);
      facts[to] = from.facts[place];
      if (!from.row_stride)
        std::memcpy(memory + to * kGroupFloats, from.values + place * kGroupFloats, kGroupFloats * sizeof(float));
    }
  }
  return rows;
}
