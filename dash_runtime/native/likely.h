// Which tokens of a row a narrow head computes from the whole state: the likeliest by its rough logits.
//
// Logits are counted in bins, down from the row's largest. Whole bins of tokens are taken, as many as there is room for.
#pragma once
#include <algorithm>

#include "team.h"
#include "vectors.h"

constexpr int64_t kMostLikely = 8192;  // tokens of a row
// In nats: the width of a bin, and how far below the largest logit a token may be.
constexpr float kBinWidth = 0.125f, kLikelyMargin = 14.0f;
constexpr int64_t kNumBins = static_cast<int64_t>(kLikelyMargin / kBinWidth);
constexpr int kTokenBits = 24;
static_assert(kNumBins <= 1 << (31 - kTokenBits));

// One thread's part of a row.
struct LikelyPart {
  float most;          // the largest of its logits
  int32_t num_tokens;  // of those within the margin of the row's largest
  int32_t counts[kNumBins];
};

// The bin of a logit that lies so far below the largest; `kNumBins` and more are too far.
inline int64_t bin_of(float below) { return static_cast<int64_t>(std::min(below, 2 * kLikelyMargin) / kBinWidth); }

// Adds the offsets and a number to the logits of the tiles from `first` to `last`; returns the largest.
inline float offset_logits(float *logits, const float *offsets, float common, int64_t first, int64_t last) {
  Floats most = filled(-INFINITY);
  for (int64_t place = first * kLanes; place < last * kLanes; place += kLanes) {
    const Floats own = load<Floats>(logits + place) + load<Floats>(offsets + place) + common;
    store(logits + place, own);
    most = larger(most, own);
  }
  return largest(most);
}

// Writes the tokens of these tiles that are within the margin of the row's largest logit, with their bins in the
// highest byte, and counts them by bin.
inline void count_likely(const float *logits, int64_t first, int64_t last, float most, float multiplier,
                         LikelyPart &part, int32_t *tokens) {
  std::fill(part.counts, part.counts + kNumBins, 0);
  part.num_tokens = 0;
  const float least = most - kLikelyMargin / multiplier;
  for (int64_t place = first * kLanes; place < last * kLanes; place += kLanes) {
    uint32_t lanes = lanes_above(load<Floats>(logits + place), least);
    for (; lanes; lanes &= lanes - 1) {
      const int64_t token = place + __builtin_ctz(lanes);
      const int64_t bin = bin_of((most - logits[token]) * multiplier);
      if (bin >= kNumBins) continue;
      ++part.counts[bin];
      tokens[part.num_tokens++] = static_cast<int32_t>(token | bin << kTokenBits);
    }
  }
}

// Writes one thread's share of a row's likeliest tokens, which are those of whole bins; returns their number. The row's
// tokens are where each thread of `own` counted those of its tiles.
inline int64_t share_of_likely(const LikelyPart *parts, const int32_t *tokens, int64_t num_tiles, const Member &own,
                               int32_t *share) {
  int64_t num_bins = 0, count = 0;
  for (int64_t more; num_bins < kNumBins; ++num_bins, count += more) {
    more = 0;
    for (int64_t part = 0; part < own.num_threads; ++part) more += parts[part].counts[num_bins];
    if (count + more > kMostLikely) break;
  }
  int64_t before = 0, written = 0;
  for (int64_t part = 0; part < own.num_threads; ++part) {
    const int32_t *of_part = tokens + num_tiles * part / own.num_threads * kLanes;
    for (int64_t place = 0; place < parts[part].num_tokens; ++place) {
      if (of_part[place] >> kTokenBits >= num_bins) continue;
      if (before >= own.first(count) && before < own.last(count))
        share[written++] = of_part[place] & ((1 << kTokenBits) - 1);
      ++before;
    }
  }
  return written;
}
