// The text of a lone row, and what likely follows: `TextDrafts` and `Guesses` of the engine say the same.
#pragma once
#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "checked.h"

constexpr int64_t kLongestMatch = 16, kMostGuesses = 7;

struct Guesses {
  int32_t *tokens;  // the text so far; there is room for what follows
  int64_t num_tokens, num_left;
  int64_t numbers[kLongestMatch + 1];  // of guesses, by the last tokens that the text had before

  void add(int64_t token) {
    tokens[num_tokens++] = static_cast<int32_t>(token);
    --num_left;
  }

  // Writes what likely follows; returns how many tokens that is. A pass puts out one more.
  int64_t propose(int64_t *to) const {
    int64_t longest = 0;
    std::vector<int64_t> places;  // after the longest match, the latest first
    for (int64_t place = num_tokens - 1; place > 0; --place) {
      const int64_t match = match_before(place);
      if (match > longest) longest = match, places.clear();
      if (match && match == longest) places.push_back(place);
    }
    const int64_t count = std::min(numbers[longest], num_left - 1);
    if (count <= 0) return 0;
    DASH_CHECK(count <= kMostGuesses && !places.empty());
    const int32_t *first = tokens + usual(places);
    const int64_t period = tokens + num_tokens - first;  // a match that reaches the end goes on as it did so far
    for (int64_t place = 0; place < count; ++place) to[place] = place < period ? first[place] : to[place - period];
    return count;
  }

 private:
  int64_t match_before(int64_t place) const {
    const int32_t *end = tokens + num_tokens;
    const int64_t most = std::min(kLongestMatch, place);
    int64_t match = 0;
    while (match < most && tokens[place - 1 - match] == end[-1 - match]) ++match;
    return match;
  }

  // The place that is followed by what most are; of equally frequent ones, the latest.
  int64_t usual(const std::vector<int64_t> &places) const {
    std::unordered_map<int32_t, int64_t> counts;
    int64_t most = 0;
    for (int64_t place : places) most = std::max(most, ++counts[tokens[place]]);
    return *std::find_if(places.begin(), places.end(), [&](int64_t place) { return counts[tokens[place]] == most; });
  }
};
