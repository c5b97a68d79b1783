// Draws a token from a row's logits by one random number: the arithmetic of engine/sampling.py.
#pragma once
#include <algorithm>
#include <vector>

#include "vectors.h"

struct Draw {
  double temperature, top_p, min_p, number;  // the number is in [0, 1)
  int64_t top_k;                             // 0 for all
};

// Draws tokens one after another. Its memory is kept.
class Drawing {
 public:
  // Returns one of `count` tokens.
  int64_t token(const float *logits, int64_t count, const Draw &draw) {
    logits_ = logits, count_ = count;
    factor_ = static_cast<float>(1 / draw.temperature);
    most_ = largest_logit();
    const bool has_top_k = draw.top_k > 0 && draw.top_k < count;
    if (!has_top_k && draw.top_p >= 1 && draw.min_p <= 0) return drawn_from_all(draw.number);
    double total = gather(kLikely);
    if (has_top_k) {
      for (float least = kLikely; least > 0 && num_candidates() < draw.top_k;) gather(least *= least);
      if (num_candidates() < draw.top_k) return 0;  // logits that are no numbers
      std::nth_element(candidates_.begin(), candidates_.begin() + draw.top_k - 1, candidates_.end());
      candidates_.resize(draw.top_k);
      total = sum_of_first(draw.top_k);
    } else if (!ends_within(draw, total)) {
      gather(0);
    }
    return drawn_from_candidates(draw, total);
  }

 private:
  static constexpr float kLikely = 4.539993e-5f;  // e^-10: what tokens weigh that are looked at first
  static constexpr int64_t kTogether = 256;       // tokens whose weights are added up first
  static constexpr int64_t kFew = 64;             // candidates that are sorted at once

  struct Candidate {
    float weight;  // the likeliest one's is 1
    int32_t token;

    // Equal ones: the first.
    bool operator<(const Candidate &other) const {
      return weight > other.weight || (weight == other.weight && token < other.token);
    }
  };

  // Those of 16 tokens, fewer at the end.
  Floats logits(int64_t token) const {
    if (token + kLanes <= count_) return load<Floats>(logits_ + token);
    Floats last = filled(-INFINITY);
    std::memcpy(&last, logits_ + token, (count_ - token) * sizeof *logits_);
    return last;
  }

  float largest_logit() const {
    Floats most = filled(-INFINITY);
    for (int64_t token = 0; token < count_; token += kLanes) most = larger(logits(token), most);
    return largest(most);
  }

  Floats weights(int64_t token) const { return exponential((logits(token) - most_) * factor_); }

  int64_t drawn_from_all(double number) {
    sums_.clear();
    double total = 0;
    for (int64_t first = 0; first < count_; first += kTogether) {
      Floats sums{};
      for (int64_t token = first; token < std::min(first + kTogether, count_); token += kLanes) sums += weights(token);
      sums_.push_back(sum(sums));
      total += sums_.back();
    }
    double aim = number * total;
    int64_t chosen = 0, group = 0;
    const auto last_group = static_cast<int64_t>(sums_.size()) - 1;
    while (group < last_group && aim >= sums_[group]) aim -= sums_[group++];
    // Rounding may leave too much to aim at: then it is the last token that weighs something.
    while (group > 0 && !(sums_[group] > 0)) --group;
    for (int64_t token = group * kTogether; token < count_; token += kLanes) {
      float own[kLanes];
      store(own, weights(token));
      for (int lane = 0; lane < kLanes && token + lane < count_; aim -= own[lane++]) {
        if (!(own[lane] > 0)) continue;
        chosen = token + lane;
        if (aim < own[lane]) return chosen;
      }
    }
    return chosen;
  }

  static bool has_one(Floats weights, float least) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)weights, _mm512_set1_ps(least), _CMP_GE_OQ);
#else
    return largest(weights) >= least;
#endif
  }

  // Takes the tokens that weigh no less than `least`; returns the sum of all weights.
  double gather(float least) {
    candidates_.clear();
    double total = 0;
    for (int64_t first = 0; first < count_; first += kTogether) {
      Floats sums{};
      for (int64_t token = first; token < std::min(first + kTogether, count_); token += kLanes) {
        const Floats own = weights(token);
        sums += own;
        if (!has_one(own, least)) continue;
        float lanes[kLanes];
        store(lanes, own);
        for (int lane = 0; lane < kLanes && token + lane < count_; ++lane)
          if (lanes[lane] >= least) candidates_.push_back({lanes[lane], static_cast<int32_t>(token + lane)});
      }
      total += sum(sums);
    }
    return total;
  }

  int64_t num_candidates() const { return static_cast<int64_t>(candidates_.size()); }

  double sum_of_first(int64_t count) const {
    double total = 0;
    for (int64_t place = 0; place < count; ++place) total += candidates_[place].weight;
    return total;
  }

  // True if no token but the candidates may be drawn.
  bool ends_within(const Draw &draw, double total) const {
    float least = 1;
    for (const Candidate &own : candidates_) least = std::min(least, own.weight);
    return (draw.top_p < 1 && sum_of_first(num_candidates()) >= draw.top_p * total) || least < draw.min_p;
  }

  // A place among the candidates from the likeliest on, and the sum of weights up to it, its own included.
  struct Place {
    int64_t number;
    double sum;
  };

  // Returns the first place whose sum is not below `aim`, or the last of `last` places. Sorts no more than it needs.
  Place place_of(double aim, int64_t last) {
    const auto begin = candidates_.begin();
    int64_t first = 0;
    double before = 0;
    while (last - first > kFew) {
      const int64_t middle = first + (last - first) / 2;
      std::nth_element(begin + first, begin + middle, begin + last);
      double half = 0;
      for (int64_t place = first; place < middle; ++place) half += candidates_[place].weight;
      if (before + half < aim)
        first = middle, before += half;
      else
        last = middle;
    }
    std::sort(begin + first, begin + last);
    while (first + 1 < last && before + candidates_[first].weight < aim && candidates_[first + 1].weight > 0)
      before += candidates_[first++].weight;
    return {first, before + candidates_[first].weight};
  }

  int64_t drawn_from_candidates(const Draw &draw, double total) {
    const auto begin = candidates_.begin();
    const int64_t count =
        std::partition(begin, candidates_.end(), [&](auto &own) { return own.weight >= draw.min_p; }) - begin;
    if (!count) return 0;  // logits that are no numbers
    const Place last = draw.top_p < 1 ? place_of(draw.top_p * total, count) : Place{count - 1, sum_of_first(count)};
    return candidates_[place_of(draw.number * last.sum, last.number + 1).number].token;
  }

  const float *logits_;
  int64_t count_;
  float factor_, most_;
  std::vector<Candidate> candidates_;
  std::vector<double> sums_;  // of weights
};
