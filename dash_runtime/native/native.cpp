// Takes rows through layers, each layer's action pinned or chosen by a policy on the way; from tokens, and to logits,
// if they are wanted.
//
// layer_body.py's arithmetic, written for one to a few rows whose weights come from memory. structs.py has the same
// structures; every field is eight bytes wide, and layout.h tells where.
#include <poll.h>

#include <algorithm>

#include "draws.h"
#include "layout.h"
#include "walk.h"

namespace {

// Lets each of a workspace's threads do its part.
template <class Work>
void in_parallel(Workspace &workspace, int64_t num_threads, Work work) {
  if (workspace.own.size() < static_cast<size_t>(num_threads)) workspace.own.resize(num_threads);
  in_threads(num_threads, [&](int64_t index, int64_t count) { work(Member{&workspace.barrier, index, count}); });
}

// Forgets the rounded keys and values of positions that the lone sequence no longer has.
void forget_rounded(const Pass &pass) {
  const Span &span = *pass.spans;
  if (!span.filled) return;
  for (int64_t layer = 0; layer < pass.shape->num_layers; ++layer)
    span.filled[layer].last = std::min(span.filled[layer].last, span.num_tokens);
}

// Whether there is something to read from a file, if there is one.
bool is_readable(int64_t file) {
  pollfd asked{static_cast<int>(file), POLLIN, 0};
  return file != kNoFile && poll(&asked, 1, 0) > 0;
}

}  // namespace

// As layout.py reads it.
extern "C" const char *dash_layout() {
  static const std::string text = layout_text();
  return text.c_str();
}

extern "C" int dash_rounds_keys() { return RoundedBlock::is_here; }

extern "C" Workspace *dash_new_workspace() { return new Workspace; }

extern "C" void dash_delete_workspace(Workspace *workspace) { delete workspace; }

// Runs all layers from `first_layer` to `last_layer`, which may be none, and the head.
extern "C" void dash_run_rows(const Pass *pass) {
  DASH_CHECK(pass->first_layer >= 0 && pass->last_layer <= pass->shape->num_layers && pass->num_threads > 0);
  DASH_CHECK(pass->num_plans == 1 || pass->num_plans == pass->num_rows);
  for (const Span *span = pass->spans; span < pass->spans + pass->num_spans; ++span)
    DASH_CHECK(span->first_row >= 0 && span->num_rows >= 0 && span->first_row + span->num_rows <= pass->num_rows &&
               span->num_rows <= span->num_tokens);
  Workspace &own = *pass->workspace;
  own.chosen.resize(2 * pass->num_rows);
  if (pass->num_plans == 1 && pass->plans->decisions) own.evaluations = std::vector<Progress>(pass->shape->num_layers);
  if (const Head *head = pass->head) {
    own.best.resize(pass->num_threads * pass->num_rows);
    if (head->has_rough()) own.keys.resize(pass->num_rows * padded(head->num_tiles));
    if (head->is_narrow()) {
      own.keys.resize(pass->num_rows * head->num_tiles * kLanes);
      own.likely.resize(pass->num_rows * pass->num_threads);
    }
    if (!pass->logits) {
      own.uppers.resize(pass->num_rows * head->num_tiles);
      own.tops.resize(pass->num_threads * pass->num_rows);
    }
  }
  const auto shared = laid_out(pass->workspace->shared, [&](Parts &parts) { return shared_parts(parts, *pass); });
  in_parallel(*pass->workspace, pass->num_threads, [&](const Member &member) { Walk(*pass, shared, member).run(); });
}

// Decodes a lone row: after its token the likeliest one, or the one that is drawn if there are draws, and after that
// the next, up to `num_tokens`, or the first that is among `ends`, or until somebody has written to `wake_file`. With
// `guesses` a pass runs what likely follows, too, all its rows by `guessed`, and puts out what was right and one more,
// so that the last may put out more than is wanted. Writes the tokens and what their passes left; returns their number.
extern "C" int64_t dash_run_burst(Pass *pass, int64_t num_tokens, const int64_t *ends, int64_t num_ends,
                                  const Draw *draws, const BurstRecord *record, int64_t wake_file, Guesses *guesses,
                                  const RowPlan *guessed) {
  const Pass given = *pass;  // what is set here lies in this frame
  const int64_t num_layers = pass->shape->num_layers;
  const RowPlan *const own = pass->plans;
  const Decisions *decisions = own->decisions;
  const int64_t num_scores = decisions ? num_layers * decisions->policy->num_actions : 0;
  const int64_t vocabulary = pass->head->num_tiles * kLanes;
  int64_t inputs[1 + kMostGuesses] = {*pass->tokens}, likeliest[1 + kMostGuesses];
  Span &span = *pass->spans;
  pass->tokens = inputs;
  pass->likeliest = likeliest;
  Drawing drawing;
  int64_t done = 0;
  for (bool is_over = false; !is_over;) {
    const int64_t started = now(), first = done, before = span.num_tokens - 1;
    const int64_t num_rows = 1 + (guesses ? guesses->propose(inputs + 1) : 0);
    pass->num_rows = span.num_rows = num_rows;
    pass->plans = num_rows > 1 ? guessed : own;
    span.num_tokens = before + num_rows;
    dash_run_rows(pass);
    bool is_right = true;
    for (int64_t row = 0; row < num_rows && is_right && !is_over; ++row, ++done) {
      int64_t token = likeliest[row];
      if (draws) token = drawing.token(pass->logits + row * vocabulary, vocabulary, draws[done]);
      DASH_CHECK(token >= 0 && token < vocabulary);
      std::memcpy(record->plans + done * num_layers, pass->plans->plan, num_layers);
      std::memcpy(record->times + done * 2 * num_layers, pass->times, 2 * num_layers * sizeof(int64_t));
      if (decisions && num_rows == 1)
        std::memcpy(record->scores + done * num_scores, decisions->scores, num_scores * sizeof(float));
      record->tokens[done] = token;
      record->marks[2 * done] = started, record->marks[2 * done + 1] = now();
      record->rows[done] = row ? 0 : num_rows;
      if (guesses) guesses->add(token);
      is_right = row + 1 < num_rows && token == inputs[row + 1];
      is_over = std::find(ends, ends + num_ends, token) != ends + num_ends;
    }
    span.num_tokens = before + done - first;  // without the wrong guesses
    if (num_rows > 1) forget_rounded(*pass);
    inputs[0] = record->tokens[done - 1];
    is_over = is_over || done >= num_tokens || is_readable(wake_file);
    ++span.num_tokens;
  }
  span.num_rows = 1;
  *pass = given;
  return done;
}

// Draws a token for each of some rows of logits, `[…, count]`.
extern "C" void dash_draw(const float *logits, int64_t count, const int64_t *rows, const Draw *draws, int64_t num_draws,
                          int64_t num_threads, int64_t *tokens) {
  std::atomic<int64_t> next{0};
  in_threads(std::min(num_threads, num_draws), [&](int64_t, int64_t) {
    Drawing drawing;
    for (int64_t own; (own = next.fetch_add(1, std::memory_order_relaxed)) < num_draws;) {
      tokens[own] = drawing.token(logits + rows[own] * count, count, draws[own]);
      DASH_CHECK(tokens[own] >= 0 && tokens[own] < count);
    }
  });
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
    policy_products(*policy, 0, policy->width / kLanes, state.data(), 1, products, policy->width);
    policy_choices(*policy, *block, policy_scale(*policy, state.data()), products,
                   facts + row * (policy->num_facts + policy->num_actions), scores + row * num_scores,
                   best + row * policy->block_size);
  }
}
