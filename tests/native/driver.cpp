// Runs native code with random and hostile inputs, and holds it to what it promises: a row's bits are the same alone
// and among others, with any number of threads. Built checked and with sanitizers, and for other processors.
#include <unistd.h>

#include "setting.h"

namespace {

// The weights of a matrix as numbers, by products.h's own words.
float weight_of(const Matrix &matrix, int64_t output, int64_t input) {
  const int64_t tile = output / kLanes, lane = output % kLanes;
  if (matrix.is_full()) {
    const int64_t together = matrix.block_tiles, block = tile / together;
    const int64_t word =
        (block * (matrix.num_inputs / 2) + input / 2) * together * kLanes + tile % together * kLanes + lane;
    return from_bf16(static_cast<const uint16_t *>(matrix.words)[2 * word + input % 2]);
  }
  const auto layout = static_cast<Layout>(matrix.layout);
  const int64_t group = input / kGroup, bits = bits_of(layout), in_word = 32 / bits, place = input % kGroup;
  const auto *lines =
      static_cast<const uint32_t *>(matrix.words) + tile * lines_before(layout, matrix.num_inputs / kGroup) * kLanes;
  const auto word = [&](int64_t line) { return lines[(weights_line(layout, group) + line) * kLanes + lane]; };
  const uint32_t value =
      layout == kInt3 ? (word(place / 16) >> (8 * (place % 4) + 2 * (place / 4 % 4)) & 3) |
                            (word(2) >> (8 * (place % 4) + place / 4) & 1) << 2
                      : (word(place / in_word) ^ 0x80000000u) >> place % in_word * bits & ((1u << bits) - 1);
  if (layout == kInt8) return (static_cast<float>(value) - 128) * matrix.scales[output];
  const auto *further = static_cast<const uint32_t *>(matrix.further);
  const uint32_t lower =
      layout == kRefined ? further[(tile * matrix.num_inputs / kGroup + group) * 4 * kLanes + place / 8 * kLanes + lane] >>
                                   place % 8 * 4 &
                               15
                         : 0;
  const auto whole = static_cast<float>(layout == kRefined ? value * kFinerSteps + lower : value);
  const uint32_t grid = lines[grids_line(layout, group) * kLanes + lane] >> 16 * (group % 2) & 0xFFFF;
  const float offset = (static_cast<float>(grid >> kScaleBits) - kLeastOffset) / offsets_in_step(layout);
  return (whole - static_cast<float>(middle_of(layout)) + offset) * static_cast<float>(grid & ((1 << kScaleBits) - 1)) * matrix.scales[output];
}

void products_are_those_of_the_weights_that_words_stand_for() {
  Kept kept;
  for (const Layout layout : {kFull, kInt8, kInt4, kInt3, kRefined})
    for (const int64_t block_tiles : {1, 4})
      for (const int64_t num_rows : {1, 3, 7, 17, 33}) {
        const int64_t num_outputs = 128, num_inputs = 96;
        const Matrix matrix = kept.matrix(layout, num_outputs, num_inputs, block_tiles);
        float *rows = kept.floats(num_rows * num_inputs, 1);
        for (int64_t place = 0; place < num_rows * num_inputs; ++place) rows[place] = from_bf16(bf16(rows[place]));
        float *outputs = kept.floats(num_rows * num_outputs, 0),
              *memory = kept.floats(inputs_size(num_rows, num_inputs), 0);
        product(matrix, prepare(layout, rows, num_rows, num_inputs, memory, 0, num_rows), 0, num_rows, 0,
                matrix.num_tiles, outputs, num_outputs);
        for (int64_t row = 0; row < num_rows; ++row)
          for (int64_t output = 0; output < num_outputs; ++output) {
            double expected = 0, size = 0;
            for (int64_t input = 0; input < num_inputs; ++input) {
              const double own = weight_of(matrix, output, input) * rows[row * num_inputs + input];
              expected += own, size += std::abs(own);
            }
            // Some processors round the inputs of rounded weights to bytes.
            const double error = std::abs(outputs[row * num_outputs + output] - expected);
            EXPECT(error <= (layout == kFull ? 1e-5 : 2e-2) * size);
          }
      }
}

Row some_row(const Model &model) {
  Row row{1 + below(kPositions), below(kVocabulary), {}, nullptr};
  if (!below(4)) row.num_tokens = kPositions;
  if (!below(4)) row.token = below(2) ? 0 : kVocabulary - 1;
  row.compensations = below(2) ? &model.factors : &model.low_rank;
  if (!below(5)) row.compensations = &model.none;
  for (uint8_t &action : row.pinned) action = static_cast<uint8_t>(1 + below(kNumActions));
  for (int64_t layer = 1; layer < kNumLayers; ++layer)
    if (below(2)) row.pinned[layer] = 0;
  return row;
}

void a_row_has_its_bits_alone_and_among_others_with_any_number_of_threads(const Model &model) {
  for (int turn = 0; turn < 8; ++turn) {
    const auto head = static_cast<HeadKind>(turn % kNumHeads);
    const bool wants_logits = head != kBounded || below(2), is_rounded = turn % 3 == 1;
    std::vector<Row> rows(turn == 6 ? 100 : 1 + below(turn % 2 ? 11 : 4));
    for (Row &row : rows) row = some_row(model);
    if (turn % 4 == 3)  // all skip a layer, in which threads wait for each other least, and decide the next one
      for (Row &row : rows) row.compensations = &model.factors, std::memcpy(row.pinned, "\1\0\0", kNumLayers);
    const Result together = Setting(model, rows, 1, head, wants_logits, is_rounded).run();
    EXPECT(Setting(model, rows, 3, head, wants_logits, is_rounded).run() == together);
    for (size_t own = 0; own < rows.size(); ++own) {
      const Result alone = Setting(model, {rows[own]}, 2, head, wants_logits, is_rounded).run();
      EXPECT(alone.likeliest[0] == together.likeliest[own]);
      EXPECT(!std::memcmp(alone.states.data(), together.states.data() + own * kHidden, 2 * kHidden));
      EXPECT(!std::memcmp(alone.plans.data(), together.plans.data() + own * kNumLayers, kNumLayers));
    }
  }
}

// Threads decide each layer of a lone row while they wait for each other.
void a_lone_row_decides_its_layers_with_any_number_of_threads(const Model &model) {
  for (int turn = 0; turn < 20; ++turn) {
    Row row = some_row(model);
    row.pinned[1] = row.pinned[2] = 0;
    const Result one = Setting(model, {row}, 1, kPlain, true, true).run();
    EXPECT(Setting(model, {row}, 3, kPlain, true, true).run() == one);
  }
}

void rows_that_agree_on_actions_do_so_with_any_number_of_threads(const Model &model) {
  for (int turn = 0; turn < 6; ++turn) {
    std::vector<Row> rows(2 + below(9));
    for (Row &row : rows) row = some_row(model);
    Setting one(model, rows, 1, kPlain, true, true), several(model, rows, 3, kPlain, true, true);
    one.pass.planner = several.pass.planner = &model.planner;
    EXPECT(one.run() == several.run());
  }
}

// Prompts: from a sequence's first position on, and sequences that have no row.
void rows_of_several_sequences_have_the_same_bits_with_any_number_of_threads(const Model &model) {
  for (const std::vector<int64_t> &counts :
       {std::vector<int64_t>{40}, {1, 5, 3}, {9, 8}, {3, 0, 2}, {20, 2, 17}, {104}}) {
    std::vector<Row> rows;
    for (const int64_t count : counts) {
      Row row = some_row(model);
      row.num_tokens = count + below(2) * below(kPositions - count);
      for (uint8_t &action : row.pinned) action = static_cast<uint8_t>(1 + below(kNumActions));
      if (count == 0) row.num_tokens = below(3);
      for (int64_t own = 0; own < count; ++own) rows.push_back(row), rows.back().token = below(kVocabulary);
    }
    for (const bool is_rounded : {false, true}) {
      const Result one = Setting(model, rows, 1, kPlain, true, is_rounded, counts).run();
      EXPECT(Setting(model, rows, 3, kPlain, true, is_rounded, counts).run() == one);
    }
  }
}

Row last_row(const Model &model, int64_t num_tokens) {
  return {num_tokens, below(kVocabulary), {kFullAction, kInt3Action, kInt4Action}, &model.factors};
}

// States that are no numbers have some likeliest token, by heads alone and behind layers.
void what_is_no_number_has_a_likeliest_token(const Model &model) {
  Kept kept;
  for (const float hostile : {NAN, INFINITY, -INFINITY, 3e38f, 0.0f})
    for (int head = 0; head < kNumHeads; ++head)
      for (const int64_t num_rows : {1, 9}) {
        std::vector<Row> rows(num_rows, last_row(model, 20));
        Setting own(model, rows, 2, static_cast<HeadKind>(head), head != kBounded, true);
        uint16_t *states = kept.halves(num_rows * kHidden, 1);
        states[below(num_rows * kHidden)] = bf16(hostile);
        own.pass.tokens = nullptr, own.pass.input = states, own.pass.output = nullptr;
        if (num_rows > 1) own.pass.num_spans = own.pass.last_layer = 0;
        for (const int64_t token : own.run().likeliest) EXPECT(token >= 0 && token < kVocabulary);
      }
}

void draws_are_tokens_whatever_is_drawn_from() {
  Kept kept;
  const double temperatures[] = {0, 1e-300, 0.7, 1e300, INFINITY, NAN}, parts[] = {0, 1e-6, 0.9, 1, NAN};
  for (const int64_t count : {1, 15, 272})
    for (const float hostile : {0.0f, NAN, INFINITY, -INFINITY}) {
      const int64_t num_rows = 3;
      float *logits = kept.floats(num_rows * count, 5);
      for (int64_t place = 0; place < count; ++place) logits[count + place] = hostile;
      logits[2 * count + below(count)] = hostile;
      std::vector<Draw> draws;
      std::vector<int64_t> rows;
      for (const double temperature : temperatures)
        for (const double top_p : parts)
          for (const int64_t top_k : {int64_t{0}, int64_t{1}, count - 1, count + 5})
            for (const double number : {0.3, 1 - 0x1p-53}) {
              draws.push_back({temperature, top_p, parts[below(5)], number, top_k});
              rows.push_back(below(num_rows));
            }
      std::vector<int64_t> one(draws.size()), several(draws.size());
      for (auto [tokens, threads] : {std::pair{&one, 1}, std::pair{&several, 3}})
        dash_draw(logits, count, rows.data(), draws.data(), draws.size(), threads, tokens->data());
      EXPECT(one == several);
      for (const int64_t token : one) EXPECT(token >= 0 && token < count);
    }
}

struct Burst {
  std::vector<int64_t> tokens, rows;
};

Burst burst(const Model &model, int64_t num_threads, const std::vector<int32_t> *text, int64_t count,
            const std::vector<Draw> &draws, int64_t wake_file, const std::vector<int64_t> &ends) {
  const int64_t most = count + (text ? kMostGuesses : 0);
  Row row = last_row(model, 60);
  row.token = 5;
  Setting own(model, {row}, num_threads, kPlain, true, true);
  Kept kept;
  own.pass.output = nullptr, own.pass.logits = kept.take<float>((1 + kMostGuesses) * kVocabulary);
  const BurstRecord record{kept.take<int64_t>(most),
                           kept.take<uint8_t>(most * kNumLayers),
                           kept.take<int64_t>(2 * most * kNumLayers),
                           nullptr,
                           kept.take<int64_t>(2 * most),
                           kept.take<int64_t>(most)};
  Guesses guesses{};
  if (text) {
    guesses.tokens = kept.take<int32_t>(text->size() + most), guesses.num_tokens = text->size();
    std::copy(text->begin(), text->end(), guesses.tokens);
    guesses.num_left = most, std::fill(guesses.numbers, guesses.numbers + kLongestMatch + 1, kMostGuesses);
    guesses.numbers[0] = 0;
  }
  const Pass before = own.pass;
  const int64_t num_tokens =
      dash_run_burst(&own.pass, count, ends.data(), ends.size(), draws.empty() ? nullptr : draws.data(), &record,
                     wake_file, text ? &guesses : nullptr, own.plans.data());
  EXPECT(!std::memcmp(&before, &own.pass, sizeof before));  // nothing points at what the call had
  return {{record.tokens, record.tokens + num_tokens}, {record.rows, record.rows + num_tokens}};
}

void a_burst_puts_out_the_same_with_guesses_and_ends_where_it_should(const Model &model) {
  std::vector<int32_t> same(60, 5), empty{5}, random(60);
  for (int32_t &token : random) token = static_cast<int32_t>(below(4));
  random.back() = 5;
  const int64_t count = 10;
  const std::vector<Draw> draws(count + kMostGuesses, {0.9, 0.95, 0, 0.4, 40}), cold(count + kMostGuesses, Draw{});
  for (const auto &own : {std::vector<Draw>{}, draws, cold}) {
    const Burst plain = burst(model, 1, nullptr, count, own, kNoFile, {});
    EXPECT(static_cast<int64_t>(plain.tokens.size()) == count);
    for (const auto *text : {&same, &empty, &random}) {
      const Burst guessed = burst(model, 3, text, count, own, kNoFile, {});
      EXPECT(std::equal(plain.tokens.begin(), plain.tokens.end(), guessed.tokens.begin()));
    }
    const int64_t last = plain.tokens[3];
    EXPECT(burst(model, 2, &same, count, own, kNoFile, {last}).tokens.back() == last);
  }
  int files[2];
  EXPECT(!pipe(files) && write(files[1], "x", 1) == 1);
  EXPECT(burst(model, 2, nullptr, count, {}, files[0], {}).tokens.size() == 1);
}

void a_policy_runs_alone(const Model &model) {
  Kept kept;
  int64_t best[7];
  dash_choose(&model.policy, &model.blocks[1], kept.halves(7 * kHidden, 1),
              kept.floats(7 * (kNumFacts + kNumActions), 1), 7, kept.floats(7 * kNumActions, 0), best);
  for (const int64_t own : best) EXPECT(own >= 0 && own < kNumActions);
}

}  // namespace

int main() {
  products_are_those_of_the_weights_that_words_stand_for();
  const Model model(false), experts(true);
  a_row_has_its_bits_alone_and_among_others_with_any_number_of_threads(model);
  a_lone_row_decides_its_layers_with_any_number_of_threads(model);
  rows_that_agree_on_actions_do_so_with_any_number_of_threads(model);
  rows_of_several_sequences_have_the_same_bits_with_any_number_of_threads(model);
  a_row_has_its_bits_alone_and_among_others_with_any_number_of_threads(experts);
  rows_of_several_sequences_have_the_same_bits_with_any_number_of_threads(experts);
  what_is_no_number_has_a_likeliest_token(model);
  what_is_no_number_has_a_likeliest_token(experts);
  draws_are_tokens_whatever_is_drawn_from();
  a_burst_puts_out_the_same_with_guesses_and_ends_where_it_should(model);
  a_policy_runs_alone(model);
  std::puts("all held");
}
