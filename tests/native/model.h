// A small model of random weights, and sequences with it: each array is an allocation of its own, so that a sanitizer
// knows its ends.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>

#include "native.cpp"

#define EXPECT(condition) \
  ((condition) ? void() : (std::fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition), std::exit(1)))

inline std::mt19937 &generator() {
  static std::mt19937 own(7);
  return own;
}
inline int64_t below(int64_t count) { return static_cast<int64_t>(generator()() % count); }
inline float uniform() { return static_cast<float>(generator()() >> 8) / (1 << 23) - 1; }  // in [-1, 1)
inline uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// Keeps arrays.
struct Kept {
  std::deque<std::vector<char>> arrays;

  template <class Number>
  Number *take(int64_t count) {
    arrays.emplace_back(count * sizeof(Number) + 63);
    // Vectors of what a cache line has begin on one, and end at the allocation's end.
    auto &own = arrays.back();
    const auto skipped = (64 - reinterpret_cast<uintptr_t>(own.data()) % 64) % 64;
    forbid(own.data() + skipped + count * sizeof(Number), 63 - skipped);
    return reinterpret_cast<Number *>(own.data() + skipped);
  }
  float *floats(int64_t count, float scale, float offset = 0) {
    float *own = take<float>(count);
    for (int64_t place = 0; place < count; ++place) own[place] = offset + scale * uniform();
    return own;
  }
  uint16_t *halves(int64_t count, float scale) {
    auto *own = take<uint16_t>(count);
    for (int64_t place = 0; place < count; ++place) own[place] = bf16(scale * uniform());
    return own;
  }
  // A matrix of any bits, which all are weights.
  Matrix matrix(Layout layout, int64_t num_outputs, int64_t num_inputs, int64_t block_tiles = 1) {
    const int64_t tiles = num_outputs / kLanes;
    const float *scales = floats(num_outputs, layout == kInt8 ? 2e-3f : 2e-4f);
    if (layout == kFull)
      return {halves(num_outputs * num_inputs, 0.3f), nullptr, nullptr, layout, num_inputs, block_tiles, tiles};
    const int64_t count = tiles * lines_before(layout, num_inputs / kGroup) * kLanes;
    auto *words = take<uint32_t>(count);
    for (int64_t place = 0; place < count; ++place) words[place] = generator()();
    const int64_t num_further = layout == kRefined ? num_outputs * num_inputs / 8 : 0;
    auto *further = take<uint32_t>(num_further);
    for (int64_t place = 0; place < num_further; ++place) further[place] = generator()();
    return {words, further, scales, layout, num_inputs, 1, tiles};
  }

  ~Kept() {
    for (auto &own : arrays) allow(own.data(), own.size());
  }
};

constexpr int64_t kNumLayers = 3, kHidden = 64, kInner = 96, kHeadDim = 32, kVocabulary = 272, kPositions = 144;
constexpr int64_t kNumExperts = 6, kExpertSize = 32;
constexpr int64_t kRank = 32, kWidth = 96, kNumFacts = kNumActions + 2;
constexpr Layout kLayouts[] = {kFull, kInt3, kInt4, kRefined, kFull};  // by action, from SKIP on, which has none

enum HeadKind { kPlain, kRough, kNarrow, kBounded, kNumHeads };

struct Model {
  Kept kept;
  ModelShape shape{{4, 2, kHeadDim, 0.2}, kHidden, kInner, kSilu, kNumLayers, 1e-5, 1.0, 0, 0, 0};
  std::vector<Layer> layers;
  std::vector<Compensation> factors, low_rank, none;
  std::vector<int64_t> windows{0, 70, 0}, rotary_of{0, 1, 0};
  Embedding embedding{kept.halves(kVocabulary * kHidden, 1), 1};
  Head heads[kNumHeads]{};
  Policy policy{};
  std::vector<Block> blocks;
  std::vector<double> layer_costs{0, 0.1, 0.25, 0.3, 0.6, 1};
  std::vector<int64_t> actions{kSkip, kInt3Action, kInt4Action, kInt8Action, kFullAction};
  std::vector<double> seconds;
  Planner planner{};
  const Rotary tables[2] = {{kept.halves(kPositions * kHeadDim, 1), kept.halves(kPositions * kHeadDim, 1)},
                            {kept.halves(kPositions * kHeadDim, 1), kept.halves(kPositions * kHeadDim, 1)}};

  // With a mixture, layer 1 has one.
  explicit Model(bool has_mixture) {
    if (has_mixture) shape.num_experts = kLanes, shape.num_chosen = 2, shape.expert_size = kExpertSize;
    const int64_t query = shape.query_size(), fused = shape.fused_size();
    for (int64_t layer = 0; layer < kNumLayers; ++layer) {
      Layer own{};
      for (const float **norm : {&own.input_norm, &own.mlp_norm}) *norm = kept.floats(kHidden, 0.2f, 1);
      if (layer) own.attention_output_norm = kept.floats(kHidden, 0.2f, 1);
      if (layer == 1) own.head_norm = kept.floats(6 * kHeadDim, 0.2f, 1), own.bias = kept.floats(fused, 0.1f);
      if (layer == 2) own.query_norm = kept.floats(query, 0.2f, 1), own.key_norm = kept.floats(fused - query, 0.2f, 1);
      for (int64_t action = kInt3Action; action <= kFullAction; ++action) {
        const Layout layout = kLayouts[action - 1];
        // In rounded layers keys and values have words of their own.
        const bool is_split = has_grids(layout);
        Matrix *matrices = own.matrices[action - 1];
        matrices[kQueryKeyValue] = kept.matrix(layout, is_split ? query : fused, kHidden, layer == 1 ? 4 : 1);
        if (is_split) matrices[kKeyValue] = kept.matrix(kInt8, fused - query, kHidden);
        matrices[kOutput] = kept.matrix(layout, kHidden, query);
        const bool is_mixture = has_mixture && layer == 1;
        const int64_t count = is_mixture ? kNumExperts : 1, inner = is_mixture ? kExpertSize : kInner;
        matrices[kGateUp] = kept.matrix(layout, count * 2 * inner, kHidden, layer == 1 ? 4 : 1);
        matrices[kDown] = kept.matrix(layout, count * kHidden, inner);
        if (is_mixture) own.mixture = {kept.matrix(kFull, kLanes, kHidden), kNumExperts, 2, action == kFullAction};
      }
      layers.push_back(own);
      factors.push_back({{}, {}, kept.floats(2 * kHidden, 0.5f), 0});
      low_rank.push_back(
          {kept.matrix(kInt8, kRank, kHidden), kept.matrix(kInt8, kHidden, kRank), kept.floats(kHidden, 0.1f), kRank});
      none.push_back({});
    }
    for (Head &head : heads)
      head.norm = kept.floats(kHidden, 0.2f, 1), head.num_tiles = kVocabulary / kLanes, head.multiplier = 1;
    heads[kPlain].matrix = heads[kRough].matrix = heads[kBounded].matrix = kept.matrix(kFull, kVocabulary, kHidden);
    auto *repeated = kept.take<int64_t>(kGroup);
    for (int64_t place = 0; place < kGroup; ++place) repeated[place] = below(kHidden);
    heads[kRough].rough = kept.matrix(kInt4, kVocabulary, kHidden + kGroup);
    heads[kRough].repeated = repeated, heads[kRough].num_exact = 5;
    Head &narrow = heads[kNarrow];
    narrow.narrow = kept.matrix(kInt8, kRank, kHidden), narrow.rough = kept.matrix(kInt8, kVocabulary, kRank);
    narrow.mean = kept.floats(kHidden, 0.1f), narrow.offsets = kept.floats(kVocabulary, 0.1f);
    narrow.matrix = heads[kPlain].matrix, narrow.repeated = repeated, narrow.num_exact = 5;
    narrow.rows = {nullptr, kept.floats(kVocabulary, 0.01f), kHidden + kGroup};
    const int64_t num_bytes = kVocabulary * narrow.rows.num_bytes();
    auto *bytes = kept.take<uint8_t>(num_bytes);
    for (int64_t place = 0; place < num_bytes; ++place) bytes[place] = static_cast<uint8_t>(below(256));
    narrow.rows.words = bytes;
    heads[kBounded].bounds = {kept.matrix(kInt8, kVocabulary, kHidden), kept.floats(kVocabulary, 0, 0.5f),
                              kept.floats(kVocabulary, 0, 2)};
    const int64_t inner = 2 * kLanes;
    blocks.assign(kNumLayers, {});
    for (int64_t layer = 1; layer < kNumLayers; ++layer)
      blocks[layer] = {kept.floats(kWidth, 1), kept.floats(kNumFacts * kWidth, 1), kept.floats(inner, 1),
                       kept.floats(kNumActions * inner, 1), kept.floats(kNumActions, 1)};
    policy = {kept.halves(kWidth * kHidden, 1),
              kept.floats(kWidth * inner, 1),
              blocks.data(),
              kHidden,
              kWidth,
              inner,
              kNumFacts,
              kNumActions,
              1};
    for (int64_t place = 0; place < kNumActions * 17; ++place) seconds.push_back(uniform() + 1.5);
    planner = {seconds.data(), 16, 0.5};
  }
};
