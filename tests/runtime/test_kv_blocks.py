"""Every row attends to its own positions, all or those in its window, and to nothing else."""

import pytest

from dash_runtime.programs.kv_blocks import BLOCK_TOKENS, attended_blocks


@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 40])
@pytest.mark.parametrize("positions", [[0, 0], [15, 16], [3, 100, 31, 32, 47], [200, 1]])
def test_each_row_sees_its_window_and_nothing_else(positions: list[int], window: int | None) -> None:
    starts = [BLOCK_TOKENS * 20 * row for row in range(len(positions))]
    attended = attended_blocks(starts, positions, window)
    seen: list[list[int]] = [[] for _ in positions]
    entries = zip(attended.blocks.tolist(), attended.rows.tolist(), attended.biases.tolist(), strict=True)
    for block, row, biases in entries:
        assert set(biases) <= {0.0, float("-inf")}
        seen[row] += [block * BLOCK_TOKENS + place for place, bias in enumerate(biases) if bias == 0]
    for row, (start, position) in enumerate(zip(starts, positions, strict=True)):
        first = 0 if window is None else max(0, position + 1 - window)
        assert seen[row] == list(range(start + first, start + position + 1))
    assert attended.slots.tolist() == [start + position for start, position in zip(starts, positions, strict=True)]


def test_a_rows_parts_are_its_entries_in_order_and_minus_one_beyond() -> None:
    attended = attended_blocks([0, 64, 640], [5, 40, 33], None)
    assert attended.rows.tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert attended.parts.tolist() == [[0, -1, -1], [1, 2, 3], [4, 5, 6]]
    assert attended_blocks([0, 16], [0, 3], None).parts.tolist() == [[0, -1], [1, -1]]
