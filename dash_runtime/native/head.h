// The head: from the last layer's states to logits, or to the likeliest tokens alone.
#pragma once
#include "bounds.h"
#include "ends.h"
#include "run.h"

// Memory of a head's results.
struct HeadMemory {
  float *logits;      // [rows, vocabulary]; null: only the likeliest tokens are wanted
  int32_t *keys;      // [rows, tiles of the head], padded; of a narrow one [rows, vocabulary]
  LikelyPart *parts;  // [rows, threads], of a narrow one
  float *uppers;      // [rows, tiles], without logits
  Best *tops;         // [threads, rows], without logits
  Best *best;         // [threads, rows]: each thread's likeliest tokens
};

class HeadRun : public Run {
 public:
  using Run::Run;

  // The final norm and this thread's share of the head: its logits `[num_rows, num_tiles * kLanes]`, and the largest of
  // each row; or without their memory only these.
  void finish(const Head &head, const HeadMemory &memory) const {
    norm_rows(own_.residual, head.norm, rows_, shape_.hidden_size, shape_.eps, own_.normed);
    Best *best = memory.best + member_.index * num_rows_;
    if (!memory.logits) return find_likeliest(head, memory, best);
    if (head.is_narrow())
      finish_narrow(head, memory.logits, memory.keys, memory.parts);
    else if (head.has_rough())
      finish_in_two_steps(head, memory.logits, memory.keys);
    else
      multiply(head.matrix, own_.normed, 0, head.num_tiles, memory.logits, head.num_tiles * kLanes);
    const int64_t first = member_.first(head.num_tiles), last = member_.last(head.num_tiles);
    for (int64_t row = 0; row < num_rows_; ++row)
      best[row] = scaled_best(memory.logits + row * head.num_tiles * kLanes, first, last, head.multiplier);
  }

 private:
  // All logits by the rough matrix, then those of each row's tiles with the largest again, with two barriers.
  void finish_in_two_steps(const Head &head, float *logits, int32_t *keys) const {
    repeat_inputs(head);
    multiply(head.rough, own_.repeated, 0, head.num_tiles, logits, head.num_tiles * kLanes);
    compute_best_tiles(head, logits, keys);
  }

  // Copies this thread's normed states, with some inputs again at the end.
  void repeat_inputs(const Head &head) const {
    const int64_t size = shape_.hidden_size, num_inputs = head.num_repeated();
    for (int64_t row = rows_.first; row < rows_.last; ++row) {
      const float *normed = own_.normed + row * size;
      float *more = own_.repeated + row * num_inputs;
      std::memcpy(more, normed, size * sizeof(float));
      for (int64_t place = size; place < num_inputs; ++place) more[place] = normed[head.repeated[place - size]];
    }
  }

  // The logits of each row's tiles with the largest again, by the exact matrix, with two barriers.
  void compute_best_tiles(const Head &head, float *logits, int32_t *keys) const {
    const int64_t stride = head.num_tiles * kLanes, keys_stride = padded(head.num_tiles);
    const int64_t first = member_.first(head.num_tiles), last = member_.last(head.num_tiles);
    for (int64_t row = 0; row < num_rows_; ++row)
      write_tile_keys(logits + row * stride, first, last, head.num_tiles, keys + row * keys_stride);
    member_.wait();
    const Rows inputs = prepared_own(head.matrix, own_.normed);
    const int64_t begin = rows_.is_shared ? 0 : member_.first(head.num_exact);
    const int64_t end = rows_.is_shared ? head.num_exact : member_.last(head.num_exact);
    for (int64_t row = rows_.first; row < rows_.last; ++row) {
      DASH_CHECK(head.num_exact <= kMostExact && head.num_exact <= head.num_tiles);
      int64_t tiles[kMostExact];
      choose_tiles(keys + row * keys_stride, head.num_tiles, head.num_exact, tiles);
      for (int64_t place = begin; place < end; ++place)
        product(head.matrix, inputs, row, 1, tiles[place], tiles[place] + 1,
                logits + row * stride + tiles[place] * kLanes, stride);
    }
    member_.wait();
  }

  // All logits of narrow states, then those of each row's likely tokens, then its best tiles', with six barriers, or
  // five for many rows. `tokens` are [rows, vocabulary], and later the tiles' keys; `parts` [rows, threads].
  void finish_narrow(const Head &head, float *logits, int32_t *tokens, LikelyPart *parts) const {
    const int64_t size = shape_.hidden_size, rank = head.rough.num_inputs, stride = head.num_tiles * kLanes;
    repeat_inputs(head);
    multiply(head.narrow, own_.normed, 0, rank / kLanes, shared_.narrow, rank);
    member_.wait();
    multiply(head.rough, shared_.narrow, 0, head.num_tiles, logits, stride);
    if (rows_.is_shared) member_.wait();
    // A row is one thread's, or all threads have a part of it.
    const Member own = rows_.is_shared ? Member{member_.barrier, 0, 1} : member_;
    const int64_t first = own.first(head.num_tiles), last = own.last(head.num_tiles);
    const auto multiplier = static_cast<float>(head.multiplier);
    for (int64_t row = rows_.first; row < rows_.last; ++row)
      parts[row * own.num_threads + own.index].most = offset_logits(
          logits + row * stride, head.offsets, dot(head.mean, own_.normed + row * size, size), first, last);
    if (!rows_.is_shared) member_.wait();
    for (int64_t row = rows_.first; row < rows_.last; ++row) {
      LikelyPart *of_row = parts + row * own.num_threads;
      float most = of_row->most;
      for (int64_t part = 1; part < own.num_threads; ++part) most = std::max(most, of_row[part].most);
      count_likely(logits + row * stride, first, last, most, multiplier, of_row[own.index],
                   tokens + row * stride + first * kLanes);
    }
    if (!rows_.is_shared) member_.wait();
    for (int64_t row = rows_.first; row < rows_.last; ++row) {
      int32_t share[kMostLikely];
      const int64_t count =
          share_of_likely(parts + row * own.num_threads, tokens + row * stride, head.num_tiles, own, share);
      DASH_CHECK(count <= kMostLikely);
      head.rows.write(share, count, own_.repeated + row * head.num_repeated(), logits + row * stride);
    }
    member_.wait();
    compute_best_tiles(head, logits, tokens);
  }

  // Each row's largest logit: those of the tiles that may have it, by the rough logits of all and how far these may be
  // off. Two barriers. Threads that share rows find those of their own, and others those of their tiles.
  void find_likeliest(const Head &head, const HeadMemory &memory, Best *best) const {
    const int64_t size = shape_.hidden_size, num_tiles = head.num_tiles;
    auto *states = reinterpret_cast<StateError *>(rows_.is_shared ? shared_.fused : own_.queries);
    const Rows bytes = prepared_own(head.bounds.rough, own_.normed);
    for (int64_t row = rows_.first; row < rows_.last; ++row)
      states[row] = StateError::of(bytes, row, own_.normed + row * size, size);
    if (rows_.is_shared) member_.wait();
    Best *tops = memory.tops + member_.index * num_rows_;
    std::fill(tops, tops + num_rows_, Best{-INFINITY, 0});
    const int64_t most = std::min(kBoundedTiles, 2 * shape_.intermediate_size / kLanes);  // there is room for
    const int64_t end = member_.last(num_tiles);
    for (int64_t first = member_.first(num_tiles), last; first < end; first = last) {
      last = std::min(first + most, end);
      product(head.bounds.rough, bytes, 0, num_rows_, first, last, own_.wide, most * kLanes);
      for (int64_t row = 0; row < num_rows_; ++row)
        write_uppers(head.bounds, states[row], own_.wide + row * most * kLanes, first, last,
                     memory.uppers + row * num_tiles, tops[row]);
    }
    member_.wait();
    const Rows inputs = prepared_own(head.matrix, own_.normed);
    std::fill(best, best + num_rows_, Best{-INFINITY, 0});
    for (int64_t row = rows_.first; row < rows_.last; ++row) {
      const int64_t top = best_of_threads(memory.tops, row, num_rows_, member_.num_threads).token;
      const float least = exact_best(head, inputs, row, top).logit;
      const float *uppers = memory.uppers + row * num_tiles;
      const int64_t last = rows_.is_shared ? num_tiles : member_.last(num_tiles);
      for (int64_t tile = rows_.is_shared ? 0 : member_.first(num_tiles); tile < last; ++tile) {
        const float upper = uppers[tile] * static_cast<float>(head.multiplier);
        if (upper < least || upper < best[row].logit) continue;
        const Best own = exact_best(head, inputs, row, tile);
        if (best[row].is_below(own)) best[row] = own;
      }
    }
  }

  // The largest exact logit of a tile.
  Best exact_best(const Head &head, const Rows &inputs, int64_t row, int64_t tile) const {
    float logits[kLanes];
    product(head.matrix, inputs, row, 1, tile, tile + 1, logits, kLanes);
    const Best own = scaled_best(logits, 0, 1, head.multiplier);
    return {own.logit, tile * kLanes + own.token};
  }
};
