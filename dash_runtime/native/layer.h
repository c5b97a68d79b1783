// The arithmetic of one layer for a few rows: layer_body.py's, run or skipped. All between bf16 states is float32.
#pragma once
#include "run.h"

enum : int64_t { kSkip = 1, kInt3Action, kInt4Action, kInt8Action, kFullAction, kNumActions = kFullAction };
enum Matrices { kQueryKeyValue, kOutput, kGateUp, kDown, kKeyValue, kNumMatrices };
enum Activation : int64_t { kSilu, kGelu };

struct Layer {
  const float *input_norm, *attention_output_norm, *mlp_norm, *mlp_output_norm;  // null for none, as all vectors
  const float *head_norm;                                                        // [num_heads + num_kv_heads, head_dim]
  const float *query_norm, *key_norm;                                            // over all heads together
  const float *bias;                                                             // of the first product
  // By action, from SKIP on. Keys and values have no words of their own where they are with the queries.
  Matrix matrices[kNumActions][kNumMatrices];
  Mixture mixture;
};

// The replacement of a skipped layer's output.
struct Compensation {
  Matrix narrow, widen;  // from the state to `rank` features, and back
  const float *vectors;  // rank 0: factors and offsets; else offsets; null: the caller replaces it
  int64_t rank;
};

struct Rotary {
  const uint16_t *cosines, *sines;  // [positions, head_dim], bf16
};

// A layer's tables: one for each span.
struct RotaryOfSpans {
  const Rotary *first;
  int64_t stride;

  const Rotary &of(int64_t span) const {
    DASH_CHECK(span >= 0);
    return first[span * stride];
  }
};

inline void rotate(float *head, const Rotary &rotary, int64_t position, int64_t size, float factor) {
  const uint16_t *cosines = rotary.cosines + position * size, *sines = rotary.sines + position * size;
  const int64_t half = size / 2;
  for (int64_t place = 0; place < half; ++place) {
    const float low = head[place], high = head[half + place];
    head[place] = (low * from_bf16(cosines[place]) + high * from_bf16(sines[place])) * factor;
    head[half + place] = (high * from_bf16(cosines[half + place]) + low * from_bf16(sines[half + place])) * factor;
  }
}

// Splits a row's first product into queries, which may be null, keys and values: with bias and norms, rotated.
inline void split_heads(const ModelShape &shape, const Layer &layer, const Rotary &rotary, int64_t position,
                        const float *fused, const float *bias, float *queries, float *keys, float *values) {
  const HeadShape &heads = shape.heads;
  const int64_t query_size = shape.query_size(), kv_size = shape.kv_size();
  float *parts[] = {queries, keys, values};
  const int64_t sizes[] = {query_size, kv_size, kv_size}, firsts[] = {0, query_size, query_size + kv_size};
  for (int part = queries ? 0 : 1; part < 3; ++part) {
    for (int64_t place = 0; place < sizes[part]; place += kLanes) {
      const Floats value = load<Floats>(fused + firsts[part] + place);
      store(parts[part] + place, bias ? value + load<Floats>(bias + firsts[part] + place) : value);
    }
    if (part == 2) break;  // values are not rotated
    const float *weight = part ? layer.key_norm : layer.query_norm;
    if (weight) norm(parts[part], weight, sizes[part], shape.eps, parts[part]);
    for (int64_t head = 0; head < sizes[part] / heads.head_dim; ++head) {
      float *own = parts[part] + head * heads.head_dim;
      if (layer.head_norm)
        norm(own, layer.head_norm + (part * heads.num_heads + head) * heads.head_dim, heads.head_dim, shape.eps, own);
      rotate(own, rotary, position, heads.head_dim, part ? 1.0f : static_cast<float>(heads.attention_scale));
    }
  }
}

constexpr int64_t kGateTiles = 16;  // of outputs, whose gates many rows have at a time

class LayerRun : public Run {
 public:
  using Run::Run;

  // Begins a layer: its first product, whose outputs from `first` on whoever has the row sees after the next barrier.
  void project(const Layer &layer, int64_t action, int64_t first) const {
    DASH_CHECK(action > kSkip && action <= kNumActions);
    norm_rows(own_.residual, layer.input_norm, rows_, shape_.hidden_size, shape_.eps, own_.normed);
    const Matrix &matrix = layer.matrices[action - 1][kQueryKeyValue],
                 &key_value = layer.matrices[action - 1][kKeyValue];
    const int64_t stride = shape_.fused_size(), query_size = shape_.query_size();
    const int64_t last = key_value.words ? query_size : stride;
    if (first < last) multiply(matrix, own_.normed, first / kLanes, last / kLanes, shared_.fused, stride);
    if (!key_value.words) return;
    if (rows_.is_shared) wait_for_others();  // inputs are prepared anew, in the same memory
    multiply(key_value, own_.normed, 0, (stride - query_size) / kLanes, shared_.fused + query_size, stride);
  }

  // Runs the rest of it, with three more barriers before the last one, or none where rows are apart. Attends to rounded
  // keys and values if wanted.
  void run(const Layer &layer, int64_t action, const Memory &memory, const RotaryOfSpans &rotary,
           bool to_rounded) const {
    DASH_CHECK(action > kSkip && action <= kNumActions);
    const int64_t size = shape_.hidden_size;
    const Matrix *matrices = layer.matrices[action - 1];
    split_rows(layer, memory, rotary, true);
    if (rows_.is_shared) member_.wait();
    const Attention attention{shape_.heads, memory, own_.queries, own_.keys, own_.values, shared_.parts, own_.joined};
    attention.run(member_, rows_.first, rows_.last, to_rounded);
    multiply(matrices[kOutput], own_.queries, 0, size / kLanes, shared_.branch, size);
    wait_for_others();
    add_branch(layer.attention_output_norm);
    norm_rows(own_.residual, layer.mlp_norm, rows_, size, shape_.eps, own_.normed);
    if (layer.mixture.num_experts) {
      run_experts(layer.mixture, matrices[kGateUp], matrices[kDown]);
    } else {
      gate(matrices[kGateUp], shape_.intermediate_size);
      wait_for_others();
      multiply(matrices[kDown], shared_.inner, 0, size / kLanes, shared_.branch + num_rows_ * size, size);
    }
    wait_for_others();
    add_branch(layer.mlp_output_norm, num_rows_ * size);
    round_state();
  }

  // Writes a skipped layer's keys and values, and replaces its output, with one more barrier.
  void skip(const Layer &layer, const Compensation &compensation, const Memory &memory,
            const RotaryOfSpans &rotary) const {
    const int64_t size = shape_.hidden_size, rank = compensation.rank;
    split_rows(layer, memory, rotary, false);
    for_rows(
        memory, rows_.own(member_).first, rows_.own(member_).last, [&](int64_t row, int64_t position, int64_t span) {
          for (int64_t head = 0; head < shape_.heads.num_kv_heads; ++head) {
            const int64_t from = row * shape_.kv_size() + head * shape_.heads.head_dim;
            write_token(shape_.heads, memory, memory.spans[span], position, head, own_.keys + from, own_.values + from);
          }
        });
    if (!compensation.vectors) return;
    if (!rank) {
      const float *factors = compensation.vectors, *offsets = factors + size;
      for (int64_t row = rows_.first; row < rows_.last; ++row)
        for (int64_t place = 0; place < size; place += kLanes) {
          float *state = own_.residual + row * size + place;
          store(state, load<Floats>(state) * load<Floats>(factors + place) + load<Floats>(offsets + place));
        }
    } else {
      multiply(compensation.widen, shared_.narrow, 0, size / kLanes, shared_.branch, size);
      member_.wait();
      const float *offsets = compensation.vectors;
      for (int64_t row = rows_.first; row < rows_.last; ++row)
        for (int64_t place = 0; place < size; place += kLanes) {
          float *state = own_.residual + row * size + place;
          store(state, load<Floats>(state) + load<Floats>(shared_.branch + row * size + place) +
                           load<Floats>(offsets + place));
        }
    }
    round_state();
  }

  // The narrow side of a low-rank compensation; begins with the first product, before the barrier.
  void narrow(const Compensation &compensation) const {
    const int64_t rank = compensation.rank;
    if (!rank) return;
    if (rows_.is_shared) member_.wait();  // inputs are prepared anew, in the same memory
    multiply(compensation.narrow, own_.residual, 0, rank / kLanes, shared_.narrow, rank);
  }

 private:
  // Products of other threads are needed next, unless rows are apart.
  void wait_for_others() const {
    if (!rows_.is_apart) member_.wait();
  }

  void multiply(const Matrix &matrix, const float *rows, int64_t first, int64_t last, float *outputs,
                int64_t stride) const {
    if (!rows_.is_apart) return Run::multiply(matrix, rows, first, last, outputs, stride);
    product(matrix, prepared_own(matrix, rows), rows_.first, rows_.count(), first, last,
            outputs + rows_.first * stride + first * kLanes, stride);
  }

  // Heads of all rows, after the next barrier if threads share them.
  void split_rows(const Layer &layer, const Memory &memory, const RotaryOfSpans &rotary, bool has_queries) const {
    for_rows(memory, rows_.first, rows_.last, [&](int64_t row, int64_t position, int64_t span) {
      split_heads(shape_, layer, rotary.of(span), position, shared_.fused + row * shape_.fused_size(), layer.bias,
                  has_queries ? own_.queries + row * shape_.query_size() : nullptr, own_.keys + row * shape_.kv_size(),
                  own_.values + row * shape_.kv_size());
    });
  }

  void gate(const Matrix &matrix, int64_t inner_size) const {
    const Rows inputs = rows_.is_apart ? prepared_own(matrix, own_.normed) : prepared(matrix, own_.normed);
    const int64_t num_tiles = inner_size / kLanes;
    if (rows_.is_apart)
      gate_rows(matrix, inputs, rows_.first, rows_.count(), 0, num_tiles, 0, num_tiles, shared_.inner);
    else
      gate_rows(matrix, inputs, 0, num_rows_, 0, num_tiles, member_.first(num_tiles), member_.last(num_tiles),
                shared_.inner);
  }

  // Gates some rows of an MLP that has so many tiles of outputs from `mlp` on: of these the ones from `first` to
  // `last`.
  void gate_rows(const Matrix &matrix, const Rows &inputs, int64_t first_row, int64_t num_rows, int64_t mlp,
                 int64_t num_tiles, int64_t first, int64_t last, float *inner) const {
    // A part of many rows' gates stays in the cache.
    const int64_t most = num_rows < kRowsApart ? num_tiles : kGateTiles;
    for (int64_t tile = first, next; tile < last; tile = next) {
      next = std::min(tile + most, last);
      const int64_t count = (next - tile) * kLanes;
      float *gates = own_.wide, *ups = own_.wide + num_rows * count;
      product(matrix, inputs, first_row, num_rows, mlp + tile, mlp + next, gates, count);
      product(matrix, inputs, first_row, num_rows, mlp + num_tiles + tile, mlp + num_tiles + next, ups, count);
      for (int64_t row = 0; row < num_rows; ++row)
        for (int64_t place = 0; place < count; place += kLanes) {
          const Floats value = load<Floats>(gates + row * count + place), up = load<Floats>(ups + row * count + place);
          const Floats slope =
              shape_.activation == kSilu ? value : 1.5957691216f * (value + 0.044715f * value * value * value);
          store(inner + ((first_row + row) * num_tiles + tile) * kLanes + place, value * sigmoid(slope) * up);
        }
    }
  }

  // The MLP of a mixture: the chosen experts' outputs, added up expert by expert, with a barrier, or two for many rows.
  void run_experts(const Mixture &mixture, const Matrix &gate_up, const Matrix &down) const {
    const int64_t size = shape_.hidden_size, inner_size = shape_.expert_size, num_chosen = mixture.num_chosen;
    const int64_t num_tiles = inner_size / kLanes, own_first = member_.first(num_tiles);
    route(mixture);
    const Rows inputs = prepared(gate_up, own_.normed);
    own_.experts->sort(mixture, own_.choices, num_rows_);
    own_.experts->for_each([&](int64_t expert, int64_t place, int64_t count, const int32_t *numbers) {
      const bool has_all = count == num_rows_;
      const Rows rows = has_all ? inputs : gathered(inputs, numbers, num_chosen, count, size, own_.gathered);
      gate_rows(gate_up, rows, 0, count, 2 * expert * num_tiles, num_tiles, own_first, member_.last(num_tiles),
                shared_.inner + place * inner_size);
    });
    member_.wait();
    const int64_t all = size / kLanes, first = member_.first(all), last = member_.last(all);
    const int64_t columns = (last - first) * kLanes;
    float *branch = shared_.branch + num_rows_ * size + first * kLanes;
    for (int64_t row = 0; row < num_rows_; ++row) std::memset(branch + row * size, 0, columns * sizeof *branch);
    own_.experts->for_each([&](int64_t expert, int64_t place, int64_t count, const int32_t *numbers) {
      const Rows rows = prepare(static_cast<Layout>(down.layout), shared_.inner + place * inner_size, count, inner_size,
                                own_.gathered, 0, count);
      product(down, rows, 0, count, expert * all + first, expert * all + last, own_.wide, columns);
      for (int64_t own = 0; own < count; ++own) {
        float *to = branch + numbers[own] / num_chosen * size;
        const float share = own_.choices[numbers[own]].share;
        for (int64_t column = 0; column < columns; column += kLanes)
          store(to + column, load<Floats>(to + column) + load<Floats>(own_.wide + own * columns + column) * share);
      }
    });
  }

  // Chooses the experts of the rows that are this thread's, which all threads see after the next barrier.
  void route(const Mixture &mixture) const {
    const Rows inputs =
        prepare(kFull, own_.normed, num_rows_, shape_.hidden_size, own_.gathered, rows_.first, rows_.last);
    const int64_t stride = mixture.router.num_tiles * kLanes;
    product(mixture.router, inputs, rows_.first, rows_.count(), 0, mixture.router.num_tiles, own_.wide, stride);
    for (int64_t row = 0; row < rows_.count(); ++row)
      choose_experts(mixture, own_.wide + row * stride, own_.choices + (rows_.first + row) * mixture.num_chosen);
  }

  void add_branch(const float *weight, int64_t offset = 0) const {
    const int64_t size = shape_.hidden_size;
    const float *branch = shared_.branch + offset;
    if (weight) norm_rows(branch, weight, rows_, size, shape_.eps, own_.normed), branch = own_.normed;
    const float multiplier = static_cast<float>(shape_.residual_multiplier);
    for (int64_t place = rows_.first * size; place < rows_.last * size; place += kLanes)
      store(own_.residual + place, load<Floats>(own_.residual + place) + load<Floats>(branch + place) * multiplier);
  }

  void round_state() const {
    for (int64_t place = rows_.first * shape_.hidden_size; place < rows_.last * shape_.hidden_size; place += kLanes)
      store(own_.residual + place, rounded_to_bf16(load<Floats>(own_.residual + place)));
  }
};
