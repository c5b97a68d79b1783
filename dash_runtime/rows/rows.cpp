// Takes rows through layers, each layer's action pinned or chosen by a policy on the way; from tokens, and to logits,
// if they are wanted.
//
// The loop of engine/step.py in native code: layer_body.py's arithmetic, written for one to a few rows whose weights
// come from memory. structs.py has the same structures; every field is eight bytes wide.
#include <omp.h>

#include <ctime>
#include <vector>

#include "layer.h"
#include "policy.h"

namespace {

// Memory of passes, kept from one to the next.
struct Workspace {
  Barrier barrier;
  std::vector<float> shared;
  std::vector<std::vector<float>> own;
  std::vector<Best> best;  // [threads, rows]
};

// A policy that decides each layer from the input of the one before, for a single row.
struct Decisions {
  const Policy *policy;
  const float *facts;         // num_known for the last action, the cost spent, others, and each action's price
  const int64_t *actions;     // by score
  const double *layer_costs;  // by action
  float *scores;              // [num_layers, num_actions]
  int64_t num_known;
};

struct Pass {
  Workspace *workspace;
  const ModelShape *shape;
  const Layer *layers;
  const Compensation *compensations;  // by layer
  const int64_t *windows;             // by layer; 0 for none
  const int64_t *rotary_of;           // by layer, which one
  const Rotary *rotary;               // [num_spans, num_rotaries]
  const Span *spans;
  const int64_t *tokens;  // [num_rows], null for `input`
  const Embedding *embedding;
  const uint16_t *input;  // [num_rows, hidden_size], bf16; of `dash_attend` [num_rows, fused_size]
  uint16_t *output;       // [num_rows, hidden_size], may be null; of `dash_attend` [num_rows, query_size]
  const Head *head;       // null for none
  float *logits;          // [num_rows, vocabulary]
  int64_t *likeliest;     // [num_rows]
  int64_t num_spans, num_rotaries, layer_bytes, values_bytes, token_bytes;
  int64_t num_rows, num_threads, first_layer, last_layer, kv_action;
  const uint8_t *pinned;       // by layer; 0 for a layer that is decided
  const Decisions *decisions;  // null if all layers are pinned
  uint8_t *plan;               // by layer
  int64_t *times;              // [layer][start, end], as time.perf_counter_ns
};

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

// Gives out parts of a memory, each on cache lines of its own; only counts without one.
class Parts {
 public:
  explicit Parts(float *memory) : next_(memory) {}
  float *take(int64_t size) {
    size = (size + 2 * kLanes - 1) / kLanes * kLanes;
    float *own = next_;
    if (next_) next_ += size;
    count_ += size;
    return own;
  }
  int64_t count() const { return count_; }

 private:
  float *next_;
  int64_t count_ = 0;
};

float *grown(std::vector<float> &memory, int64_t count) {
  if (memory.size() < static_cast<size_t>(count)) memory.resize(count);
  return memory.data();
}

// Returns what `take_all` takes, in a memory that is large enough for it.
template <class TakeAll>
auto laid_out(std::vector<float> &memory, TakeAll take_all) {
  Parts counted(nullptr);
  take_all(counted);
  Parts parts(grown(memory, counted.count()));
  return take_all(parts);
}

// Lets each of a workspace's threads do its part.
template <class Work>
void in_parallel(Workspace &workspace, int64_t num_threads, Work work) {
  if (workspace.own.size() < static_cast<size_t>(num_threads)) workspace.own.resize(num_threads);
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  work(Member{&workspace.barrier, omp_get_thread_num(), omp_get_num_threads()});
}

// All that alternates does so from layer to layer: the next layer may begin while a slow thread still reads.
struct SharedParts {
  Shared layers[2];
  float *products[2];
  float *inputs, *queries, *keys, *values;  // of threads that share rows
};

// The floats of what a product reads of all rows.
int64_t prepared_size(const Pass &pass) {
  const ModelShape &shape = *pass.shape;
  const int64_t sizes[] = {shape.hidden_size, shape.query_size(), shape.intermediate_size};
  int64_t widest = 0;
  for (int64_t size : sizes) widest = size > widest ? size : widest;
  return inputs_size(pass.num_rows, widest);
}

SharedParts shared_parts(Parts &parts, const Pass &pass) {
  const ModelShape &shape = *pass.shape;
  const int64_t rows = pass.num_rows;
  int64_t rank = 0;
  for (int64_t layer = 0; layer < shape.num_layers; ++layer)
    rank = pass.compensations[layer].rank > rank ? pass.compensations[layer].rank : rank;
  float *attention = parts.take(parts_size(shape.heads, pass.spans, pass.num_spans));
  float *branch = parts.take(2 * rows * shape.hidden_size), *inner = parts.take(rows * shape.intermediate_size);
  SharedParts own;
  for (int turn = 0; turn < 2; ++turn) {
    own.layers[turn] = {parts.take(rows * shape.fused_size()), attention, branch, inner, parts.take(rows * rank)};
    own.products[turn] = parts.take(pass.decisions ? pass.decisions->policy->width : 0);
  }
  own.inputs = parts.take(prepared_size(pass)), own.queries = parts.take(rows * shape.query_size());
  own.keys = parts.take(rows * shape.kv_size()), own.values = parts.take(rows * shape.kv_size());
  return own;
}

Own own_parts(Parts &parts, const Pass &pass) {
  const ModelShape &shape = *pass.shape;
  const int64_t rows = pass.num_rows, query_size = shape.query_size(), kv_size = shape.kv_size();
  return {parts.take(rows * shape.hidden_size), parts.take(rows * shape.hidden_size),
          parts.take(prepared_size(pass)),      parts.take(rows * query_size),
          parts.take(rows * kv_size),           parts.take(rows * kv_size),
          parts.take(rows * query_size),        parts.take(2 * rows * (shape.intermediate_size + kLanes))};
}

// What all threads see of the attention of rows whose products are shared.
struct AttentionParts {
  float *queries, *keys, *values, *attended, *parts;
};

AttentionParts attention_parts_of(Parts &parts, const Pass &pass) {
  const ModelShape &shape = *pass.shape;
  const int64_t query_size = pass.num_rows * shape.query_size(), kv_size = pass.num_rows * shape.kv_size();
  return {parts.take(query_size), parts.take(kv_size), parts.take(kv_size), parts.take(query_size),
          parts.take(parts_size(shape.heads, pass.spans, pass.num_spans))};
}

Memory memory_of(const Pass &pass, int64_t layer) {
  const int64_t token_stride = pass.token_bytes / int64_t{sizeof(uint16_t)};
  return {pass.spans, pass.num_spans, pass.layer_bytes, pass.values_bytes, token_stride, pass.windows[layer], layer};
}

RotaryOfSpans rotary_of(const Pass &pass, int64_t layer) {
  return {pass.rotary + pass.rotary_of[layer], pass.num_rotaries};
}

// What one thread does of the head, after the layers.
void put_out(const Pass &pass, const LayerRun &run, const Member &member) {
  Best *best = pass.workspace->best.data();
  run.finish(*pass.head, pass.logits, best + member.index * pass.num_rows);
  member.wait();
  for (int64_t row = member.first(pass.num_rows); row < member.last(pass.num_rows); ++row) {
    Best own = best[row];
    for (int64_t thread = 1; thread < member.num_threads; ++thread) {
      const Best &next = best[thread * pass.num_rows + row];
      if (own.is_below(next)) own = next;
    }
    pass.likeliest[row] = own.token;
  }
}

// What one thread does of a pass.
void take_part(const Pass &pass, const SharedParts &shared, const Member &member) {
  const ModelShape &shape = *pass.shape;
  const RowRange rows = RowRange::of(member, pass.num_rows);
  const int64_t state_first = rows.first * shape.hidden_size, state_last = rows.last * shape.hidden_size;
  Own own = laid_out(pass.workspace->own[member.index], [&](Parts &parts) { return own_parts(parts, pass); });
  if (rows.is_shared)
    own.inputs = shared.inputs, own.queries = shared.queries, own.keys = shared.keys, own.values = shared.values;
  if (pass.tokens)
    for (int64_t row = rows.first; row < rows.last; ++row)
      embed(*pass.embedding, pass.tokens[row], shape.hidden_size, own.residual + row * shape.hidden_size);
  else
    for (int64_t place = state_first; place < state_last; place += kLanes)
      store(own.residual + place, from_bf16(pass.input + place));

  const Decisions *decisions = pass.decisions;
  const Policy *policy = decisions ? decisions->policy : nullptr;
  float facts[kMostNumbers], scores[kMostNumbers];
  if (policy) std::memcpy(facts, decisions->facts, (policy->num_facts + policy->num_actions) * sizeof(float));
  double cost_spent = 0;
  uint8_t chosen = 0;
  for (int64_t layer = pass.first_layer; layer < pass.last_layer; ++layer) {
    const uint8_t action = pass.pinned[layer] ? pass.pinned[layer] : chosen;
    const bool is_skipped = action == kSkip, is_first = member.index == 0;
    if (is_first) pass.plan[layer] = action, pass.times[2 * layer] = now();
    const Layer &weights = pass.layers[layer];
    const LayerRun run(member, shape, shared.layers[layer % 2], own, pass.num_rows);
    const bool decides = layer + 1 < pass.last_layer && !pass.pinned[layer + 1];
    float *products = shared.products[layer % 2];
    if (decides) policy_products(member, *policy, own.residual, products);
    run.project(weights, is_skipped ? pass.kv_action : action, is_skipped ? shape.query_size() : 0);
    if (is_skipped) run.narrow(pass.compensations[layer]);
    member.wait();
    if (policy) cost_spent += decisions->layer_costs[action];
    if (decides) {
      std::memset(facts, 0, decisions->num_known * sizeof(float));
      facts[action - 1] = 1;
      facts[decisions->num_known] = static_cast<float>(cost_spent);
      int64_t best;
      policy_choices(*policy, policy->blocks[layer + 1], own.residual, products, facts, scores, &best);
      chosen = static_cast<uint8_t>(decisions->actions[best]);
      if (is_first)
        std::memcpy(decisions->scores + (layer + 1) * policy->num_actions, scores, policy->num_actions * sizeof(float));
    }
    const Memory memory = memory_of(pass, layer);
    const RotaryOfSpans rotary = rotary_of(pass, layer);
    if (is_skipped)
      run.skip(weights, pass.compensations[layer], memory, rotary);
    else
      run.run(weights, action, memory, rotary);
    if (is_first) pass.times[2 * layer + 1] = now();
  }
  if (pass.output && (rows.is_shared || member.index == 0))
    for (int64_t place = state_first; place < state_last; place += kLanes)
      write_bf16(pass.output + place, load<Floats>(own.residual + place));
  if (pass.head) put_out(pass, LayerRun(member, shape, shared.layers[0], own, pass.num_rows), member);
}

// What one thread does of the attention of rows whose products are shared: their first one is `pass.input`.
void take_part_in_attention(const Pass &pass, const AttentionParts &shared, const Member &member) {
  const ModelShape &shape = *pass.shape;
  const int64_t query_size = shape.query_size(), kv_size = shape.kv_size(), fused_size = shape.fused_size();
  float *fused = grown(pass.workspace->own[member.index], fused_size);
  const Memory memory = memory_of(pass, pass.first_layer);
  const RotaryOfSpans rotary = rotary_of(pass, pass.first_layer);
  const int64_t first = member.first(pass.num_rows), last = member.last(pass.num_rows);
  for_rows(memory, first, last, [&](int64_t row, int64_t position, int64_t span) {
    for (int64_t place = 0; place < fused_size; place += kLanes)
      store(fused + place, from_bf16(pass.input + row * fused_size + place));
    split_heads(shape, pass.layers[pass.first_layer], rotary.of(span), position, fused, nullptr,
                shared.queries + row * query_size, shared.keys + row * kv_size, shared.values + row * kv_size);
  });
  member.wait();
  attend(member, shape.heads, memory, shared.queries, shared.keys, shared.values, shared.parts, shared.attended, first,
         last);
  for (int64_t place = first * query_size; place < last * query_size; place += kLanes)
    write_bf16(pass.output + place, load<Floats>(shared.attended + place));
}

}  // namespace

extern "C" Workspace *dash_new_workspace() { return new Workspace; }

extern "C" void dash_delete_workspace(Workspace *workspace) { delete workspace; }

// Runs all layers from `first_layer` to `last_layer`, which may be none, and the head.
extern "C" void dash_run_rows(const Pass *pass) {
  if (pass->head) pass->workspace->best.resize(pass->num_threads * pass->num_rows);
  const auto shared = laid_out(pass->workspace->shared, [&](Parts &parts) { return shared_parts(parts, *pass); });
  in_parallel(*pass->workspace, pass->num_threads, [&](const Member &member) { take_part(*pass, shared, member); });
}

// Runs the attention of `first_layer`.
extern "C" void dash_attend(const Pass *pass) {
  const auto shared = laid_out(pass->workspace->shared, [&](Parts &parts) { return attention_parts_of(parts, *pass); });
  in_parallel(*pass->workspace, pass->num_threads,
              [&](const Member &member) { take_part_in_attention(*pass, shared, member); });
}

// Evaluates a policy for rows, in the calling thread.
extern "C" void dash_choose(const Policy *policy, const Block *block, const uint16_t *hidden, const float *facts,
                            int64_t num_rows, float *scores, int64_t *best) {
  const int64_t num_scores = policy->block_size * policy->num_actions;
  float products[kMostNumbers];
  std::vector<float> state(policy->hidden_size);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t place = 0; place < policy->hidden_size; place += kLanes)
      store(state.data() + place, from_bf16(hidden + row * policy->hidden_size + place));
    policy_products({nullptr, 0, 1}, *policy, state.data(), products);
    policy_choices(*policy, *block, state.data(), products, facts + row * (policy->num_facts + policy->num_actions),
                   scores + row * num_scores, best + row * policy->block_size);
  }
}
