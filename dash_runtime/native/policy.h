// A learned policy's evaluation on a row's state (policy/network.py). A row's numbers are the same alone and among
// others.
#pragma once
#include "team.h"
#include "vectors.h"

constexpr float kMostLogDamage = 6;    // policy/network.py
constexpr int64_t kMostNumbers = 256;  // features, facts and scores

// The tensors of one block of layers that are decided together; null if no block begins with a layer.
struct Block {
  const float *terms, *facts, *inner_terms, *outputs, *output_terms;
};

// Widths are whole numbers of lanes; what was added is zero.
struct Policy {
  const uint16_t *hidden_weight;  // [width / kLanes, hidden_size, kLanes], bf16
  const float *inner_weight;      // [width, inner_width]
  const Block *blocks;            // by first layer
  int64_t hidden_size, width, inner_width, num_facts, num_actions, block_size;
};

// Writes products of some states with a tile of the first weights. A row's sums have one order, whatever the number.
template <int kRows>
inline void policy_tile(const Policy &policy, int64_t tile, const float *states, float *products, int64_t stride) {
  Floats sums[kRows][4]{};
  const uint16_t *weights = policy.hidden_weight + tile * policy.hidden_size * kLanes;
  for (int64_t place = 0; place < policy.hidden_size; place += 4)
    for (int part = 0; part < 4; ++part) {
      const Floats weight = from_bf16(weights + (place + part) * kLanes);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) sums[row][part] += weight * states[row * policy.hidden_size + place + part];
    }
  for (int row = 0; row < kRows; ++row)
    store(products + row * stride + tile * kLanes, (sums[row][0] + sums[row][1]) + (sums[row][2] + sums[row][3]));
}

// Writes the products of states with the tiles from `first` to `last` of the first weights, at products[row * stride].
inline void policy_products(const Policy &policy, int64_t first, int64_t last, const float *states, int64_t num_rows,
                            float *products, int64_t stride) {
  for (int64_t tile = first; tile < last; ++tile)
    for (int64_t row = 0, taken; row < num_rows; row += taken) {
      const float *own = states + row * policy.hidden_size;
      float *to = products + row * stride;
      if (num_rows - row >= 4)
        taken = 4, policy_tile<4>(policy, tile, own, to, stride);
      else if (num_rows - row >= 2)
        taken = 2, policy_tile<2>(policy, tile, own, to, stride);
      else
        taken = 1, policy_tile<1>(policy, tile, own, to, stride);
    }
}

// The factor of a state's products: they are of the state with a root mean square of 1.
inline float policy_scale(const Policy &policy, const float *state) {
  const float square = dot(state, state, policy.hidden_size);
  return std::sqrt(static_cast<float>(policy.hidden_size)) / std::sqrt(square > 1e-24f ? square : 1e-24f);
}

// Writes the scores of a block's layers, `[block_size, num_actions]`, and the number of each one's best action.
//
// `facts` are followed by the price of each action.
inline void policy_choices(const Policy &policy, const Block &block, float scale, const float *products,
                           const float *facts, float *scores, int64_t *best) {
  DASH_CHECK(policy.width <= kMostNumbers && policy.inner_width <= kMostNumbers && block.terms);
  float features[kMostNumbers], inner[kMostNumbers];
  for (int64_t place = 0; place < policy.width; place += kLanes) {
    Floats known = load<Floats>(block.terms + place);
    for (int64_t fact = 0; fact < policy.num_facts; ++fact)
      known += load<Floats>(block.facts + fact * policy.width + place) * facts[fact];
    known += load<Floats>(products + place) * scale;
    store(features + place, known * sigmoid(known));
  }
  for (int64_t place = 0; place < policy.inner_width; place += kLanes) {
    Floats sums[4] = {load<Floats>(block.inner_terms + place)};
    const float *weights = policy.inner_weight + place;
    for (int64_t feature = 0; feature < policy.width; feature += 4)
      for (int part = 0; part < 4; ++part)
        sums[part] += load<Floats>(weights + (feature + part) * policy.inner_width) * features[feature + part];
    const Floats value = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    store(inner + place, value * sigmoid(value));
  }
  for (int64_t layer = 0; layer < policy.block_size; ++layer) {
    best[layer] = 0;
    float *own = scores + layer * policy.num_actions;
    for (int64_t action = 0; action < policy.num_actions; ++action) {
      const int64_t output = layer * policy.num_actions + action;
      const float log_damage =
          dot(inner, block.outputs + output * policy.inner_width, policy.inner_width) + block.output_terms[output];
      own[action] =
          -(std::exp(log_damage < kMostLogDamage ? log_damage : kMostLogDamage) + facts[policy.num_facts + action]);
      if (own[action] > own[best[layer]]) best[layer] = action;
    }
  }
}
