// A pass of the small model over sequences of its own, and what it leaves.
#pragma once
#include "model.h"

// A row of a pass: its sequence's tokens with it, and what runs it.
struct Row {
  int64_t num_tokens, token;
  uint8_t pinned[kNumLayers];  // 0: decided
  const std::vector<Compensation> *compensations;
};

struct Result {
  std::vector<uint16_t> states;
  std::vector<float> logits;
  std::vector<int64_t> likeliest;
  std::vector<uint8_t> plans;

  bool operator==(const Result &other) const {
    return states == other.states && likeliest == other.likeliest && plans == other.plans &&
           std::equal(logits.begin(), logits.end(), other.logits.begin(), other.logits.end());
  }
};

// Memory of sequences, and a pass over them. The keys and values of earlier tokens are the same each time.
struct Setting {
  const Model &model;
  Kept kept;
  std::vector<Span> spans;
  std::vector<Rotary> rotary;
  std::vector<RowPlan> plans;
  std::deque<Decisions> decisions;
  std::vector<int64_t> tokens, times = std::vector<int64_t>(2 * kNumLayers);
  Workspace *workspace = dash_new_workspace();
  Pass pass{};
  Result result;

  // `counts` are each sequence's rows, all of one plan; else each row is one sequence's.
  Setting(const Model &model, const std::vector<Row> &rows, int64_t num_threads, HeadKind head, bool wants_logits,
          bool is_rounded, const std::vector<int64_t> &counts = {})
      : model(model), plans(counts.empty() ? rows.size() : 1) {
    const int64_t count = rows.size(), num_spans = counts.empty() ? count : counts.size();
    const int64_t kv_size = model.shape.kv_size(), layer_size = kPositions * 2 * kv_size;
    const int64_t head_bytes = (2 * (kRoundedPositions * (kHeadDim + 4) + kHeadDim) + 63) / 64 * 64;
    const int64_t rounded_size = kPositions / kRoundedPositions * model.shape.heads.num_kv_heads * head_bytes;
    result.plans.resize(plans.size() * kNumLayers);
    for (int64_t own = 0, first = 0; own < num_spans; ++own) {
      std::mt19937 keys(11);
      auto *memory = kept.take<uint16_t>(kNumLayers * layer_size);
      for (int64_t place = 0; place < kNumLayers * layer_size; ++place)
        memory[place] = bf16(static_cast<float>(keys() % 1000) / 500 - 1);
      const int64_t num_rows = counts.empty() ? 1 : counts[own];
      Span span{};
      span.memory = reinterpret_cast<char *>(memory), span.layer_bytes = 2 * layer_size, span.values_bytes = layer_size;
      span.num_tokens = rows[first].num_tokens, span.first_row = first, span.num_rows = num_rows;
      if (is_rounded) {
        span.rounded_bytes = rounded_size;
        span.rounded = kept.take<char>(kNumLayers * rounded_size), span.filled = kept.take<Filled>(kNumLayers);
        std::memset(span.rounded, 0xFF, kNumLayers * rounded_size);
      }
      spans.push_back(span);
      for (const Rotary &table : model.tables) rotary.push_back(table);
      first += num_rows;
    }
    for (size_t own = 0; own < plans.size(); ++own) {
      auto *pinned = kept.take<uint8_t>(kNumLayers);
      std::memcpy(pinned, rows[own].pinned, kNumLayers);
      plans[own] = {pinned, nullptr, rows[own].compensations->data(), kInt8Action,
                    result.plans.data() + own * kNumLayers};
      if (std::find(pinned, pinned + kNumLayers, 0) == pinned + kNumLayers) continue;
      float *facts = kept.floats(kNumFacts + kNumActions, 0, 0.25f);
      decisions.push_back({&model.policy, facts, model.actions.data(), model.layer_costs.data(),
                           kept.floats(kNumLayers * kNumActions, 0), kNumActions});
      plans[own].decisions = &decisions.back();
    }
    for (const Row &row : rows) tokens.push_back(row.token);
    result.likeliest.resize(count), result.states.resize(count * kHidden);
    if (wants_logits) result.logits.resize(count * kVocabulary);
    pass.workspace = workspace, pass.shape = &model.shape, pass.layers = model.layers.data(), pass.plans = plans.data();
    pass.windows = model.windows.data(), pass.rotary_of = model.rotary_of.data(), pass.rotary = rotary.data();
    pass.spans = spans.data(), pass.tokens = tokens.data(), pass.embedding = &model.embedding;
    pass.output = result.states.data(), pass.head = &model.heads[head];
    pass.logits = wants_logits ? result.logits.data() : nullptr, pass.likeliest = result.likeliest.data();
    pass.num_spans = num_spans, pass.num_rotaries = 2, pass.token_bytes = 2 * kv_size;
    pass.num_rows = count, pass.num_plans = plans.size(), pass.num_threads = num_threads;
    pass.last_layer = kNumLayers, pass.times = times.data();
  }
  ~Setting() { dash_delete_workspace(workspace); }

  const Result &run() {
    dash_run_rows(&pass);
    return result;
  }
};
