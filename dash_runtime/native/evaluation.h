// A policy's evaluation for one row, in parts that threads take while they wait for each other; so most of its time is
// hidden behind the layer that runs. Who takes which part changes no number.
#pragma once
#include "policy.h"

// A policy that decides each layer of a row from the input of the one before.
struct Decisions {
  const Policy *policy;
  const float *facts;         // num_known for the last action, the cost spent, others, and each action's price
  const int64_t *actions;     // by score
  const double *layer_costs;  // by action
  float *scores;              // [num_layers, num_actions]
  int64_t num_known;

  // Chooses the action of `layer`, after one that ran `last`, and writes its scores.
  uint8_t choose(int64_t layer, uint8_t last, double spent, float scale, const float *products) const {
    DASH_CHECK(layer > 0 && last >= 1 && last <= num_known && num_known < policy->num_facts);
    DASH_CHECK(policy->num_facts + policy->num_actions <= kMostNumbers);
    float own[kMostNumbers], *layer_scores = scores + layer * policy->num_actions;
    std::memcpy(own, facts, (policy->num_facts + policy->num_actions) * sizeof(float));
    std::memset(own, 0, num_known * sizeof(float));
    own[last - 1] = 1;
    own[num_known] = static_cast<float>(spent);
    int64_t best;
    policy_choices(*policy, policy->blocks[layer], scale, products, own, layer_scores, &best);
    return static_cast<uint8_t>(actions[best]);
  }
};

// How far an evaluation is.
struct alignas(64) Progress {
  std::atomic<int64_t> num_taken{0}, num_products{0};
  std::atomic<bool> is_done{false};
};

class Evaluation : public Idle {
 public:
  // Begins the evaluation for `layer`; each thread tells the same, but its own memory of the state.
  void begin(const Decisions &decisions, int64_t layer, uint8_t last, double spent, const float *state, float *products,
             uint8_t *chosen, Progress *progress) {
    decisions_ = &decisions, layer_ = layer, last_ = last, spent_ = spent;
    state_ = state, products_ = products, chosen_ = chosen, progress_ = progress;
  }

  // Does the next part if there is one: a tile of the products, or the choice once these are done.
  bool work() override {
    if (!progress_) return false;
    const Policy &policy = *decisions_->policy;
    const int64_t num_tiles = policy.width / kLanes;
    int64_t part = progress_->num_taken.load(std::memory_order_relaxed);
    if (part > num_tiles) return false;
    if (part == num_tiles && progress_->num_products.load(std::memory_order_acquire) < num_tiles) return false;
    if (!progress_->num_taken.compare_exchange_strong(part, part + 1, std::memory_order_relaxed)) return true;
    if (part < num_tiles) {
      policy_products(policy, part, part + 1, state_, 1, products_, policy.width);
      progress_->num_products.fetch_add(1, std::memory_order_release);
    } else {
      *chosen_ = decisions_->choose(layer_, last_, spent_, policy_scale(policy, state_), products_);
      progress_->is_done.store(true, std::memory_order_release);
    }
    return true;
  }

  // Does what is left, until all threads see the action that was chosen.
  void finish() {
    if (!progress_) return;
    Spin spin;
    while (!progress_->is_done.load(std::memory_order_acquire))
      if (!work()) spin.turn();
    progress_ = nullptr;
  }

 private:
  const Decisions *decisions_;
  int64_t layer_;
  uint8_t last_;
  double spent_;
  const float *state_;
  float *products_;
  uint8_t *chosen_;
  Progress *progress_ = nullptr;
};
