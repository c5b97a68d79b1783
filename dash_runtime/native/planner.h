// Decides when rows of a layer should agree on one action: engine/planner.py's GroupPlanner.
#pragma once
#include "layer.h"

struct Planner {
  const double *seconds;  // [actions, most_rows + 1]: of one layer, by action and number of rows
  int64_t most_rows;
  double split_seconds;

  double cost(int64_t action, int64_t rows) const {
    DASH_CHECK(action >= 1 && action <= kNumActions && rows >= 0 && rows <= most_rows);
    return seconds[(action - 1) * (most_rows + 1) + rows];
  }

  // Raises rows to common actions where that makes the layer cheaper.
  void agree(uint8_t *actions, int64_t num_rows) const {
    Levels best;
    int64_t counts[kNumActions + 1]{};
    for (int64_t row = 0; row < num_rows; ++row) ++counts[actions[row]];
    raise(counts, 1, Levels(), best);
    for (int64_t row = 0; row < num_rows; ++row) actions[row] = static_cast<uint8_t>(best.of[actions[row]]);
  }

 private:
  // The action that each one is raised to, what a layer takes then, and by how much rows are raised.
  struct Levels {
    int64_t of[kNumActions + 1];
    double seconds = INFINITY;
    int64_t raised = 0;
  };

  // Tries each level of the actions from `action` on; one that no row has stays as it is.
  void raise(const int64_t *counts, int64_t action, Levels levels, Levels &best) const {
    if (action <= kNumActions) {
      for (levels.of[action] = action; levels.of[action] <= (counts[action] ? kNumActions : action);
           ++levels.of[action])
        raise(counts, action + 1, levels, best);
      return;
    }
    int64_t rows[kNumActions + 1]{};
    levels.seconds = -split_seconds, levels.raised = 0;
    for (int64_t own = 1; own <= kNumActions; ++own) {
      rows[levels.of[own]] += counts[own];
      levels.raised += (levels.of[own] - own) * counts[own];
    }
    for (int64_t own = 1; own <= kNumActions; ++own)
      if (rows[own]) levels.seconds += cost(own, rows[own]) + split_seconds;
    if (levels.seconds < best.seconds || (levels.seconds == best.seconds && levels.raised < best.raised))
      best = levels;
  }
};
