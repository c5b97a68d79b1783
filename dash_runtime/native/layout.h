// Where the fields of the structures lie that structs.py mirrors, as text: Python compares it with its own at load.
#pragma once
#include <cstddef>
#include <string>
#include <type_traits>

#include "draws.h"
#include "pass.h"

// Lines of a name, a size, and each field's name and place.
struct LayoutText {
  std::string text;

  LayoutText &add(const char *name, int64_t number) {
    text += name + (" " + std::to_string(number));
    return *this;
  }
};

// clang-format off
#define F(field) .add(" " #field, offsetof(Own, field))
#define C(name, value) .add(" " #name, value)
#define STRUCT(name, type, fields)                                         \
  {                                                                        \
    using Own = type;                                                      \
    static_assert(std::is_standard_layout_v<Own> && sizeof(Own) % 8 == 0); \
    layout.add(#name, sizeof(Own)) fields.text += '\n';                    \
  }

inline std::string layout_text() {
  LayoutText layout;
  STRUCT(Matrix, Matrix, F(words) F(further) F(scales) F(layout) F(num_inputs) F(block_tiles) F(num_tiles))
  STRUCT(Heads, HeadShape, F(num_heads) F(num_kv_heads) F(head_dim) F(attention_scale))
  STRUCT(Model, ModelShape, F(heads) F(hidden_size) F(intermediate_size) F(activation) F(num_layers) F(eps)
         F(residual_multiplier) F(num_experts) F(num_chosen) F(expert_size))
  STRUCT(Mixture, Mixture, F(router) F(num_experts) F(num_chosen) F(has_normed_shares))
  STRUCT(Layer, Layer, F(input_norm) F(attention_output_norm) F(mlp_norm) F(mlp_output_norm) F(head_norm) F(query_norm)
         F(key_norm) F(bias) F(matrices) F(mixture))
  STRUCT(Compensation, Compensation, F(narrow) F(widen) F(vectors) F(rank))
  STRUCT(Draw, Draw, F(temperature) F(top_p) F(min_p) F(number) F(top_k))
  STRUCT(Rotary, Rotary, F(cosines) F(sines))
  STRUCT(Span, Span, F(memory) F(layer_bytes) F(values_bytes) F(num_tokens) F(first_row) F(num_rows) F(rounded)
         F(rounded_bytes) F(filled))
  STRUCT(Block, Block, F(terms) F(facts) F(inner_terms) F(outputs) F(output_terms))
  STRUCT(Policy, Policy, F(hidden_weight) F(inner_weight) F(blocks) F(hidden_size) F(width) F(inner_width) F(num_facts)
         F(num_actions) F(block_size))
  STRUCT(Decisions, Decisions, F(policy) F(facts) F(actions) F(layer_costs) F(scores) F(num_known))
  STRUCT(RowPlan, RowPlan, F(pinned) F(decisions) F(compensations) F(kv_action) F(plan))
  STRUCT(Planner, Planner, F(seconds) F(most_rows) F(split_seconds))
  STRUCT(Embedding, Embedding, F(words) F(multiplier))
  STRUCT(Bounds, Bounds, F(rough) F(errors) F(lengths))
  STRUCT(TokenRows, TokenRows, F(words) F(units) F(num_inputs))
  STRUCT(Head, Head, F(norm) F(matrix) F(rough) F(narrow) F(repeated) F(mean) F(offsets) F(rows) F(bounds) F(num_exact)
         F(num_tiles) F(multiplier))
  STRUCT(Burst, BurstRecord, F(tokens) F(plans) F(times) F(scores) F(marks) F(rows))
  STRUCT(Guesses, Guesses, F(tokens) F(num_tokens) F(num_left) F(numbers))
  STRUCT(Pass, Pass, F(workspace) F(shape) F(layers) F(plans) F(planner) F(windows) F(rotary_of) F(rotary) F(spans)
         F(tokens) F(embedding) F(input) F(output) F(head) F(logits) F(likeliest) F(num_spans) F(num_rotaries)
         F(token_bytes) F(num_rows) F(num_plans) F(num_threads) F(first_layer) F(last_layer) F(attends_rounded)
         F(times))
  layout.add("constants", 0) C(MOST_CHANNELS, kMostChannels) C(MOST_NUMBERS, kMostNumbers)
      C(MOST_EXACT_TILES, kMostExact) C(LANES, kLanes) C(LINE_BYTES, kLineBytes) C(ROUNDED_TOKENS, kRoundedPositions)
      C(LONGEST_MATCH, kLongestMatch) C(MOST_GUESSES, kMostGuesses) C(NO_FILE, kNoFile) C(NUM_ACTIONS, kNumActions)
      C(NUM_MATRICES, kNumMatrices);
  return layout.text;
}
// clang-format on

#undef F
#undef C
#undef STRUCT
