// The arguments of a pass, and the memory that it works in. structs.py has the same structures.
#pragma once
#include <ctime>
#include <vector>

#include "evaluation.h"
#include "guesses.h"
#include "head.h"
#include "layer.h"
#include "planner.h"

// Memory of passes, kept from one to the next.
struct Workspace {
  // One thread's.
  struct Own {
    std::vector<float> floats;
    std::vector<uint8_t> actions;  // [rows]
    std::vector<double> spent;     // [rows]
    std::vector<float> scales;     // [rows]: of states, for policies
    std::vector<int64_t> group;    // rows
    std::vector<Span> spans;       // of a group
    std::vector<Rotary> rotary;    // of a group
    ExpertRows experts;
  };

  Barrier barrier;
  std::vector<float> shared;
  std::vector<Own> own;
  std::vector<uint8_t> chosen;        // [2, rows]: actions by turn
  std::vector<Progress> evaluations;  // by layer, of a single plan's decisions
  std::vector<Best> best;             // [threads, rows]
  std::vector<int32_t> keys;          // [rows, tiles of the head], padded; of a narrow one [rows, vocabulary]
  std::vector<LikelyPart> likely;     // [rows, threads], for a narrow head
  std::vector<float> uppers;          // [rows, tiles of the head], without logits
  std::vector<Best> tops;             // [threads, rows], without logits
};

// A row's plan: its pinned layers, who decides the others, and the replacement of those that it skips.
struct RowPlan {
  const uint8_t *pinned;              // by layer; 0 for a layer that is decided
  const Decisions *decisions;         // null if all layers are pinned
  const Compensation *compensations;  // by layer
  int64_t kv_action;                  // of skipped layers' keys and values
  uint8_t *plan;                      // by layer: what ran

  bool decides(int64_t layer) const { return decisions && !pinned[layer]; }
  bool skips_alike(const RowPlan &other) const {
    return compensations == other.compensations && kv_action == other.kv_action;
  }
};

struct Pass {
  Workspace *workspace;
  const ModelShape *shape;
  const Layer *layers;
  const RowPlan *plans;      // of each row, or one for all
  const Planner *planner;    // null for none
  const int64_t *windows;    // by layer; 0 for none
  const int64_t *rotary_of;  // by layer, which one
  const Rotary *rotary;      // [num_spans, num_rotaries]
  Span *spans;
  const int64_t *tokens;  // [num_rows], null for `input`
  const Embedding *embedding;
  const uint16_t *input;  // [num_rows, hidden_size], bf16
  uint16_t *output;       // [num_rows, hidden_size], may be null
  const Head *head;       // null for none
  float *logits;          // [num_rows, vocabulary]; null if only the likeliest are wanted of a head with bounds
  int64_t *likeliest;     // [num_rows]
  int64_t num_spans, num_rotaries, token_bytes;
  int64_t num_rows, num_plans, num_threads, first_layer, last_layer;
  int64_t attends_rounded;  // whether rows attend in FULL as rounded layers do
  int64_t *times;           // [layer][start, end], as time.perf_counter_ns
};

constexpr int64_t kNoFile = -1;  // of a burst that nobody ends early

// The record of a burst's passes, token by token.
struct BurstRecord {
  int64_t *tokens;  // the next ones
  uint8_t *plans;   // [tokens, num_layers]: what ran
  int64_t *times;   // [tokens, num_layers, 2], as a pass has them
  float *scores;    // [tokens, num_layers, num_actions]; none if nothing is decided
  int64_t *marks;   // [tokens, 2]: start and end
  int64_t *rows;    // those of its pass, at its first token; 0 at its others
};

inline int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

// Gives out parts of a memory, each on cache lines of its own; only counts without one.
class Parts {
 public:
  explicit Parts(float *memory) : next_(memory) {}
  float *take(int64_t size) {
    const int64_t room = (size + 2 * kLanes - 1) / kLanes * kLanes;
    float *own = next_;
    if (next_) forbid(next_ + size, (room - size) * sizeof(float)), next_ += room;
    count_ += room;
    return own;
  }
  int64_t count() const { return count_; }

 private:
  float *next_;
  int64_t count_ = 0;
};

// Returns so many floats of a memory, from the beginning of a cache line on: whoever reads lines would read two for
// each elsewhere.
inline float *grown(std::vector<float> &memory, int64_t count) {
  const size_t size = static_cast<size_t>(count) + kLanes;
  if (memory.size() < size) memory.resize(size);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (kLineBytes - address % kLineBytes) % kLineBytes / sizeof(float);
}

// Returns what `take_all` takes, in a memory that is large enough for it.
template <class TakeAll>
auto laid_out(std::vector<float> &memory, TakeAll take_all) {
  allow(memory.data(), memory.size() * sizeof(float));
  Parts counted(nullptr);
  take_all(counted);
  Parts parts(grown(memory, counted.count()));
  return take_all(parts);
}

// All that alternates does so from layer to layer: the next layer may begin while a slow thread still reads.
struct SharedParts {
  Shared layers[2];
  float *products[2];                       // [plans, width]
  int64_t width;                            // the widest policy's
  float *inputs, *queries, *keys, *values;  // of threads that share rows
  float *states;                            // [rows, hidden_size], where rows run in groups
  Choice *choices;                          // [rows, num_chosen]
};

// The number of inputs of what has some of them twice, these counted twice; 0 if there is nothing such.
inline int64_t repeated_size(const Pass &pass) { return pass.head ? pass.head->num_repeated() : 0; }

// The highest rank of the low-rank compensations, which have one rank in all layers each, and of a narrow head.
inline int64_t highest_rank(const Pass &pass) {
  int64_t rank = pass.head && pass.head->is_narrow() ? pass.head->rough.num_inputs : 0;
  for (int64_t row = 0; row < pass.num_plans; ++row) rank = std::max(rank, pass.plans[row].compensations[0].rank);
  return rank;
}

// The floats of what a product reads of all rows.
inline int64_t prepared_size(const Pass &pass) {
  const ModelShape &shape = *pass.shape;
  const int64_t sizes[] = {shape.hidden_size, shape.query_size(),  shape.intermediate_size,
                           shape.expert_size, repeated_size(pass), highest_rank(pass)};
  int64_t widest = 0;
  for (int64_t size : sizes) widest = size > widest ? size : widest;
  return inputs_size(pass.num_rows, widest);
}

// The inner states of a row: of its MLP, or of all of its experts.
inline int64_t inner_size(const ModelShape &shape) {
  return std::max(shape.intermediate_size, shape.num_chosen * shape.expert_size);
}

// The outputs of a row that a thread has at a time: gates and ups, a part of the state, or a router's scores.
inline int64_t widest_outputs(const ModelShape &shape) {
  return std::max({2 * shape.intermediate_size, 2 * shape.expert_size, shape.hidden_size, shape.num_experts});
}

inline Choice *choices_of(Parts &parts, const Pass &pass) {
  constexpr int64_t kFloats = sizeof(Choice) / sizeof(float);
  return reinterpret_cast<Choice *>(parts.take(pass.num_rows * pass.shape->num_chosen * kFloats));
}

inline SharedParts shared_parts(Parts &parts, const Pass &pass) {
  const ModelShape &shape = *pass.shape;
  const int64_t rows = pass.num_rows;
  const int64_t rank = highest_rank(pass);
  int64_t width = 0;
  for (int64_t row = 0; row < pass.num_plans; ++row) {
    const RowPlan &plan = pass.plans[row];
    if (plan.decisions && plan.decisions->policy->width > width) width = plan.decisions->policy->width;
  }
  int64_t attention_size = 0;
  for (int64_t span = 0; span < pass.num_spans; ++span) attention_size += parts_size(shape.heads, pass.spans[span]);
  float *attention = parts.take(attention_size);
  float *branch = parts.take(2 * rows * shape.hidden_size), *inner = parts.take(rows * inner_size(shape));
  SharedParts own;
  own.width = width;
  for (int turn = 0; turn < 2; ++turn) {
    own.layers[turn] = {parts.take(rows * shape.fused_size()), attention, branch, inner, parts.take(rows * rank)};
    own.products[turn] = parts.take(pass.num_plans * width);
  }
  own.inputs = parts.take(prepared_size(pass)), own.queries = parts.take(rows * shape.query_size());
  own.keys = parts.take(rows * shape.kv_size()), own.values = parts.take(rows * shape.kv_size());
  own.states = parts.take(pass.num_plans > 1 ? rows * shape.hidden_size : 0);
  own.choices = choices_of(parts, pass);
  return own;
}

// A thread's memory; in it a group's states, and the state that a policy sees.
struct OwnParts {
  Own own;
  float *group, *seen;
};

inline OwnParts own_parts(Parts &parts, const Pass &pass) {
  const ModelShape &shape = *pass.shape;
  const int64_t rows = pass.num_rows, query_size = shape.query_size(), kv_size = shape.kv_size();
  const Own own{parts.take(rows * shape.hidden_size),
                parts.take(rows * shape.hidden_size),
                parts.take(prepared_size(pass)),
                parts.take(rows * query_size),
                parts.take(rows * kv_size),
                parts.take(rows * kv_size),
                parts.take(joined_size(shape.heads)),
                parts.take(rows * (widest_outputs(shape) + 2 * kLanes)),
                parts.take(rows * repeated_size(pass)),
                parts.take(shape.num_chosen ? prepared_size(pass) : 0),
                choices_of(parts, pass),
                nullptr};
  return {own, parts.take(pass.num_plans > 1 ? rows * shape.hidden_size : 0), parts.take(shape.hidden_size)};
}

inline Memory memory_of(const Pass &pass, int64_t layer) {
  const int64_t token_stride = pass.token_bytes / int64_t{sizeof(uint16_t)};
  return {pass.spans, pass.num_spans, token_stride, pass.windows[layer], layer};
}

inline RotaryOfSpans rotary_of(const Pass &pass, int64_t layer) {
  return {pass.rotary + pass.rotary_of[layer], pass.num_rotaries};
}
