// One thread's way through the layers of a pass: rows together, or in groups of one action; the actions pinned, or
// chosen by policies on the way.
//
// The loop of engine/step.py in native code.
#pragma once
#include "pass.h"

// One thread's way through the layers of a pass.
class Walk {
 public:
  Walk(const Pass &pass, const SharedParts &shared, const Member &member)
      : pass_(pass),
        shared_(shared),
        member_{member.barrier, member.index, member.num_threads, &evaluation_},
        memory_(pass.workspace->own[member.index]),
        rows_(RowRange::of(member, *pass.shape, pass.num_rows)),
        size_(pass.shape->hidden_size),
        attends_rounded_(pass.attends_rounded),
        parts_(laid_out(memory_.floats, [&](Parts &parts) { return own_parts(parts, pass); })) {
    memory_.actions.resize(2 * pass.num_rows);
    memory_.spent.assign(pass.num_rows, 0);
    memory_.scales.resize(pass.num_rows);
    own_ = with_inputs(parts_.own, rows_);
  }

  void run() {
    begin();
    for (int64_t layer = pass_.first_layer; layer < pass_.last_layer; ++layer) {
      if (member_.index == 0) pass_.times[2 * layer] = now();
      run_layer(layer);
      if (member_.index == 0) pass_.times[2 * layer + 1] = now();
    }
    gather_all();
    if (pass_.output && (rows_.is_shared || member_.index == 0))
      for (int64_t place = rows_.first * size_; place < rows_.last * size_; place += kLanes)
        write_bf16(pass_.output + place, load<Floats>(own_.residual + place));
    if (pass_.head) put_out();
  }

 private:
  bool is_alone() const { return pass_.num_plans == 1; }

  Own with_inputs(Own own, const RowRange &rows) const {
    own.experts = &memory_.experts;
    if (rows.is_shared) own.queries = shared_.queries, own.keys = shared_.keys, own.values = shared_.values;
    if (rows.is_shared) own.choices = shared_.choices;
    if (rows.is_shared && !rows.is_apart) own.inputs = shared_.inputs;
    return own;
  }

  void begin() {
    for (int64_t row = rows_.first; row < rows_.last; ++row) {
      float *state = own_.residual + row * size_;
      DASH_CHECK(!pass_.tokens || (pass_.tokens[row] >= 0 && is_known(pass_.tokens[row])));
      if (pass_.tokens)
        embed(*pass_.embedding, pass_.tokens[row], size_, state);
      else
        for (int64_t place = 0; place < size_; place += kLanes)
          store(state + place, from_bf16(pass_.input + row * size_ + place));
    }
  }

  // Whether a token is one of the vocabulary, if a head tells how large that is.
  bool is_known(int64_t token) const { return !pass_.head || token < pass_.head->num_tiles * kLanes; }

  // The memory of the actions chosen for a layer's rows.
  uint8_t *chosen(int64_t layer) const { return pass_.workspace->chosen.data() + layer % 2 * pass_.num_plans; }

  void run_layer(int64_t layer) {
    DASH_CHECK(layer >= 0 && layer < pass_.shape->num_layers);
    if (is_alone())
      return run_alone(layer, pass_.plans[0].pinned[layer] ? pass_.plans[0].pinned[layer] : *chosen(layer));
    uint8_t *actions = memory_.actions.data();
    for (int64_t row = 0; row < pass_.num_rows; ++row) {
      const uint8_t pinned = pass_.plans[row].pinned[layer];
      actions[row] = pinned ? pinned : chosen(layer)[row];
      DASH_CHECK(actions[row] >= kSkip && actions[row] <= kNumActions);
    }
    if (pass_.planner) {
      attends_rounded_ = std::find(actions, actions + pass_.num_rows, kFullAction) == actions + pass_.num_rows;
      pass_.planner->agree(actions, pass_.num_rows);
    }
    bool are_alike = true;
    for (int64_t row = 1; row < pass_.num_rows; ++row) are_alike = are_alike && is_like(row, 0, actions);
    if (are_alike) {
      gather_all();
      run_together(layer, actions[0]);
    } else {
      run_groups(layer, actions);
    }
  }

  // Runs rows of one plan. Decides the next layer meanwhile.
  void run_alone(int64_t layer, uint8_t action) {
    const RowPlan &plan = pass_.plans[0];
    DASH_CHECK(action >= kSkip && action <= kNumActions);
    if (member_.index == 0) plan.plan[layer] = action;
    if (plan.decisions) memory_.spent[0] += plan.decisions->layer_costs[action];
    if (has_to_decide(plan, layer)) {
      std::memcpy(parts_.seen, own_.residual, size_ * sizeof(float));
      evaluation_.begin(*plan.decisions, layer + 1, action, memory_.spent[0], parts_.seen, products(layer, 0),
                        chosen(layer + 1), &pass_.workspace->evaluations[layer]);
    }
    const LayerRun run(member_, *pass_.shape, shared_.layers[turn_++ % 2], own_, pass_.num_rows);
    begin_layer(run, layer, action, plan);
    end_layer(run, layer, action, plan, memory_of(pass_, layer), rotary_of(pass_, layer));
    evaluation_.finish();
  }

  // Runs all rows with one action.
  void run_together(int64_t layer, uint8_t action) {
    look(layer);
    const LayerRun run(member_, *pass_.shape, shared_.layers[turn_++ % 2], own_, pass_.num_rows);
    begin_layer(run, layer, action, pass_.plans[0]);
    choose(layer);
    end_layer(run, layer, action, pass_.plans[0], memory_of(pass_, layer), rotary_of(pass_, layer));
    // Threads read each other's choices, and a skipped layer may have no barrier after them.
    if (action == kSkip) member_.wait();
  }

  void begin_layer(const LayerRun &run, int64_t layer, uint8_t action, const RowPlan &plan) const {
    const bool is_skipped = action == kSkip;
    run.project(pass_.layers[layer], is_skipped ? plan.kv_action : action, is_skipped ? pass_.shape->query_size() : 0);
    if (is_skipped) run.narrow(plan.compensations[layer]);
    member_.wait();
  }

  void end_layer(const LayerRun &run, int64_t layer, uint8_t action, const RowPlan &plan, const Memory &memory,
                 const RotaryOfSpans &rotary) const {
    if (action == kSkip)
      run.skip(pass_.layers[layer], plan.compensations[layer], memory, rotary);
    else
      run.run(pass_.layers[layer], action, memory, rotary, action != kFullAction || attends_rounded_);
  }

  bool has_to_decide(const RowPlan &plan, int64_t layer) const {
    return layer + 1 < pass_.last_layer && plan.decides(layer + 1);
  }

  // The first half of deciding the next layer: products of the states, of which threads see each other's after the next
  // barrier. Threads that have all states share the weights, and others the rows.
  void look(int64_t layer) {
    const int64_t count = pass_.num_plans;
    const bool has_all = is_scattered_ || !rows_.is_shared;
    for (int64_t row = has_all ? 0 : rows_.first, taken; row < (has_all ? count : rows_.last); row += taken) {
      const RowPlan &plan = pass_.plans[row];
      taken = 1;
      if (!has_to_decide(plan, layer)) continue;
      const Policy &policy = *plan.decisions->policy;
      while (row + taken < (has_all ? count : rows_.last) && has_to_decide(pass_.plans[row + taken], layer) &&
             pass_.plans[row + taken].decisions->policy == &policy)
        ++taken;
      const int64_t num_tiles = policy.width / kLanes;
      policy_products(policy, has_all ? member_.first(num_tiles) : 0, has_all ? member_.last(num_tiles) : num_tiles,
                      state(row), taken, products(layer, row), shared_.width);
    }
    const RowRange mine = rows_.own(member_);
    for (int64_t row = mine.first; row < mine.last; ++row)
      if (has_to_decide(pass_.plans[row], layer))
        memory_.scales[row] = policy_scale(*pass_.plans[row].decisions->policy, state(row));
  }

  const float *state(int64_t row) const { return (is_scattered_ ? shared_.states : own_.residual) + row * size_; }
  float *products(int64_t layer, int64_t row) const { return shared_.products[layer % 2] + row * shared_.width; }

  // The second half, after the barrier.
  void choose(int64_t layer) {
    const RowRange mine = rows_.own(member_);
    for (int64_t row = mine.first; row < mine.last; ++row) {
      const RowPlan &plan = pass_.plans[row];
      const uint8_t action = memory_.actions[row];
      plan.plan[layer] = action;
      if (!plan.decisions) continue;
      memory_.spent[row] += plan.decisions->layer_costs[action];
      if (has_to_decide(plan, layer))
        chosen(layer + 1)[row] =
            plan.decisions->choose(layer + 1, action, memory_.spent[row], memory_.scales[row], products(layer, row));
    }
  }

  // Runs the rows of each action as if there were no others.
  void run_groups(int64_t layer, const uint8_t *actions) {
    scatter_all();
    look(layer);
    has_chosen_ = false;
    std::vector<int64_t> &group = memory_.group;
    uint8_t *is_done = memory_.actions.data() + pass_.num_rows;
    std::memset(is_done, 0, pass_.num_rows);
    for (int64_t first = 0; first < pass_.num_rows; ++first) {
      if (is_done[first]) continue;
      group.clear();
      for (int64_t row = first; row < pass_.num_rows; ++row)
        if (is_like(row, first, actions)) group.push_back(row), is_done[row] = 1;
      run_group(layer, actions[first]);
    }
    member_.wait();
  }

  bool is_like(int64_t row, int64_t other, const uint8_t *actions) const {
    return actions[row] == actions[other] &&
           (actions[row] != kSkip || pass_.plans[row].skips_alike(pass_.plans[other]));
  }

  void run_group(int64_t layer, uint8_t action) {
    const std::vector<int64_t> &group = memory_.group;
    const int64_t count = static_cast<int64_t>(group.size());
    const RowRange rows = RowRange::of(member_, *pass_.shape, count);
    const RowPlan &plan = pass_.plans[group[0]];
    Own own = with_inputs(parts_.own, rows);
    own.residual = parts_.group;
    memory_.spans.clear(), memory_.rotary.clear();
    const RotaryOfSpans rotary = rotary_of(pass_, layer);
    for (int64_t place = 0; place < count; ++place) {
      Span span = pass_.spans[group[place]];
      span.first_row = place, span.num_rows = 1;
      memory_.spans.push_back(span);
      memory_.rotary.push_back(rotary.of(group[place]));
      if (place >= rows.first && place < rows.last) copy_state(own.residual, place, shared_.states, group[place]);
    }
    Memory memory = memory_of(pass_, layer);
    memory.spans = memory_.spans.data(), memory.num_spans = count;
    const LayerRun run(member_, *pass_.shape, shared_.layers[turn_++ % 2], own, count);
    begin_layer(run, layer, action, plan);
    if (!has_chosen_) choose(layer), has_chosen_ = true;
    end_layer(run, layer, action, plan, memory, {memory_.rotary.data(), 1});
    const RowRange put_back = rows.own(member_);
    for (int64_t place = put_back.first; place < put_back.last; ++place)
      copy_state(shared_.states, group[place], own.residual, place);
  }

  // Brings all states to where groups take theirs from, and back.
  void scatter_all() {
    if (is_scattered_) return;
    const RowRange mine = rows_.own(member_);
    for (int64_t row = mine.first; row < mine.last; ++row) copy_state(shared_.states, row, own_.residual, row);
    member_.wait();
    is_scattered_ = true;
  }

  void gather_all() {
    if (!is_scattered_) return;
    for (int64_t row = rows_.first; row < rows_.last; ++row) copy_state(own_.residual, row, shared_.states, row);
    is_scattered_ = false;
  }

  void copy_state(float *to, int64_t to_row, const float *from, int64_t from_row) const {
    std::memcpy(to + to_row * size_, from + from_row * size_, size_ * sizeof(float));
  }

  // The head, after the layers.
  void put_out() {
    if (rows_.is_shared) own_.inputs = shared_.inputs;
    const HeadRun run(member_, *pass_.shape, shared_.layers[turn_ % 2], own_, pass_.num_rows);
    Workspace &own = *pass_.workspace;
    run.finish(*pass_.head, {pass_.logits, own.keys.data(), own.likely.data(), own.uppers.data(), own.tops.data(),
                             own.best.data()});
    member_.wait();
    for (int64_t row = member_.first(pass_.num_rows); row < member_.last(pass_.num_rows); ++row) {
      pass_.likeliest[row] = best_of_threads(own.best.data(), row, pass_.num_rows, member_.num_threads).token;
      DASH_CHECK(pass_.likeliest[row] >= 0 && is_known(pass_.likeliest[row]));
    }
  }

  const Pass &pass_;
  const SharedParts &shared_;
  Evaluation evaluation_;
  const Member member_;
  Workspace::Own &memory_;
  const RowRange rows_;
  const int64_t size_;
  bool attends_rounded_;  // in FULL, where rows were raised to it
  const OwnParts parts_;
  Own own_;
  int64_t turn_ = 0;
  bool is_scattered_ = false, has_chosen_ = false;
};
