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
    int64_t counts[kNumActions + 1]{};
    for (int64_t row = 0; row < num_rows; ++row) ++counts[actions[row]];
    int64_t levels[kNumActions + 1], best[kNumActions + 1]{0, 1, 2, 3, 4};
    double least = INFINITY;
    int64_t least_raised = 0;
    // The levels that no row has stay as they are.
    for (levels[1] = 1; levels[1] <= (counts[1] ? 4 : 1); ++levels[1])
      for (levels[2] = 2; levels[2] <= (counts[2] ? 4 : 2); ++levels[2])
        for (levels[3] = 3; levels[3] <= (counts[3] ? 4 : 3); ++levels[3]) {
          levels[4] = 4;
          int64_t rows[kNumActions + 1]{}, raised = 0;
          for (int64_t action = 1; action <= kNumActions; ++action) {
            rows[levels[action]] += counts[action];
            raised += (levels[action] - action) * counts[action];
          }
          double total = -split_seconds;
          for (int64_t action = 1; action <= kNumActions; ++action)
            if (rows[action]) total += cost(action, rows[action]) + split_seconds;
          if (total < least || (total == least && raised < least_raised)) {
            least = total, least_raised = raised;
            std::memcpy(best, levels, sizeof best);
          }
        }
    for (int64_t row = 0; row < num_rows; ++row) actions[row] = static_cast<uint8_t>(best[actions[row]]);
  }
};
