// Runs one row through all layers: program after program, each layer's action pinned or chosen by the program before.
// Or some rows of one sequence, whose layers are all pinned.
//
// The loop of engine/step.py, without Python between the layers. Uses the C interfaces of torch alone
// (torch/csrc/inductor/aoti_runtime/interface.h and aoti_torch/c/shim.h), so it needs no headers of torch and compiles
// in a moment. row_loop.py has the same structures; every field is eight bytes wide.
#include <cstdint>
#include <cstring>
#include <ctime>

namespace {

using Handle = void *;  // a tensor of torch
using Run = int32_t (*)(void *, Handle *, size_t, Handle *, size_t, void *, void *);

constexpr int kOwnInputs = 5;  // hidden state, keys, values, cosines, sines
constexpr int kMostInputs = 32;

struct Torch {
  int32_t (*copy_handle)(Handle, Handle *);
  int32_t (*delete_handle)(Handle);
  int32_t (*data_of)(Handle, void **);
  int32_t (*wrap)(void *, int64_t, const int64_t *, const int64_t *, int64_t, int32_t, int32_t, int32_t, Handle *);
  int64_t cpu;
};

// A program and its last inputs. A program takes the handles that it gets, so it gets copies.
struct Call {
  Run run;
  void *container;
  const Handle *inputs;
  int64_t num_inputs;
};

// What a program that decides the next layer reads and writes; null if all layers are pinned.
struct Exchange {
  float *numbers;
  int64_t num_known, first_result, num_scores;
  const int64_t *actions;    // by the number that the program chooses
  const double *layer_costs;  // by action
};

struct Rotary {
  void *cosines, *sines;
};

struct Row {
  const Torch *torch;
  const Call *calls;  // [layer][decides the next layer][action]
  int64_t num_layers, num_actions, num_rows, dtype, element_bytes, hidden_bytes;  // hidden_bytes: of all rows
  Handle hidden[2];  // the state goes to and fro between them; the first is the input
  char *hidden_data[2];
  const int64_t *windows;   // by layer; 0 for none
  const int64_t *rotary_of;  // by layer, which one
  const Rotary *rotary;     // from the first row's own on
  char *memory;            // of keys and values, from the sequence's first position on
  int64_t layer_bytes, values_bytes, token_bytes, num_kv_heads, head_dim, num_tokens;
  const uint8_t *pinned;  // by layer; 0 for a layer that is decided
  const Exchange *exchange;
  uint8_t *plan;
  float *scores;
  int64_t *times;  // [layer][start, end], as time.perf_counter_ns
};

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

// Tells the program of `layer` what ran, for its decision of the next (policy/facts.py).
void write_facts(const Exchange &exchange, uint8_t action, double cost_spent) {
  std::memset(exchange.numbers, 0, exchange.num_known * sizeof(float));
  exchange.numbers[action - 1] = 1;
  exchange.numbers[exchange.num_known] = static_cast<float>(cost_spent);
}

int32_t run_layer(const Row &row, int64_t layer, const Call &call, int source) {
  const Torch &torch = *row.torch;
  const int64_t window = row.windows[layer];
  const int64_t num_tokens = window && window < row.num_tokens ? window : row.num_tokens;
  char *keys = row.memory + layer * row.layer_bytes + (row.num_tokens - num_tokens) * row.token_bytes;
  const int64_t sizes[] = {num_tokens, row.num_kv_heads, row.head_dim};
  const int64_t strides[] = {row.token_bytes / row.element_bytes, row.head_dim, 1};
  const int64_t table_sizes[] = {row.num_rows, 1, row.head_dim}, table_strides[] = {row.head_dim, row.head_dim, 1};

  Handle inputs[kMostInputs], output = nullptr;
  const auto wrap = [&](void *data, const int64_t *own_sizes, const int64_t *own_strides, Handle *handle) {
    return torch.wrap(data, 3, own_sizes, own_strides, 0, row.dtype, torch.cpu, 0, handle);
  };
  int32_t error = torch.copy_handle(row.hidden[source], &inputs[0]);
  error |= wrap(keys, sizes, strides, &inputs[1]);
  error |= wrap(keys + row.values_bytes, sizes, strides, &inputs[2]);
  const Rotary &rotary = row.rotary[row.rotary_of[layer]];
  error |= wrap(rotary.cosines, table_sizes, table_strides, &inputs[3]);
  error |= wrap(rotary.sines, table_sizes, table_strides, &inputs[4]);
  for (int64_t index = 0; index < call.num_inputs; ++index)
    error |= torch.copy_handle(call.inputs[index], &inputs[kOwnInputs + index]);
  if (error) return error;

  error = call.run(call.container, inputs, kOwnInputs + call.num_inputs, &output, 1, nullptr, nullptr);
  if (error) return error;
  // The program may keep its output where its next one will lie.
  void *data = nullptr;
  error = torch.data_of(output, &data);
  if (!error) std::memcpy(row.hidden_data[1 - source], data, row.hidden_bytes);
  torch.delete_handle(output);
  return error;
}

}  // namespace

// Returns 0, or one more than the layer whose program failed or is missing.
extern "C" int64_t dash_run_row(const Row *row_pointer) {
  const Row &row = *row_pointer;
  const Exchange *exchange = row.exchange;
  double cost_spent = 0;
  for (int64_t layer = 0; layer < row.num_layers; ++layer) {
    uint8_t action = row.pinned[layer];
    if (!action) {
      const float *result = exchange->numbers + exchange->first_result;
      action = static_cast<uint8_t>(exchange->actions[static_cast<int>(result[0])]);
      std::memcpy(row.scores + layer * exchange->num_scores, result + 1, exchange->num_scores * sizeof(float));
    }
    row.plan[layer] = action;
    const bool decides = layer + 1 < row.num_layers && !row.pinned[layer + 1];
    if (exchange) cost_spent += exchange->layer_costs[action];
    if (decides) write_facts(*exchange, action, cost_spent);
    row.times[2 * layer] = now();
    const Call &call = row.calls[(layer * 2 + decides) * row.num_actions + action - 1];
    if (!call.run || run_layer(row, layer, call, layer % 2)) return layer + 1;
    row.times[2 * layer + 1] = now();
  }
  return 0;
}
