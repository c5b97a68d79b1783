"""Memory that stays where it is, for graphs of up to so many decoded rows.

Before a pass the host writes where its rows are, and one copy brings that to the device. Rows that only fill a pass up
to the size of a graph write to the pool's spare token. Knows batches; knows no weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_runtime.devices import Device
from dash_runtime.devices.device import AttendedRows
from dash_runtime.layers.batch import Batch
from dash_runtime.layers.rotary import RotaryTable
from dash_runtime.model_config import ModelConfig

_TOKEN, _SLOT, _START, _LENGTH, _FIRST_TABLE = range(5)
"""The numbers of a row: its token, its place in the pool, where its sequence begins there, how many positions it
attends to, and its row in each rotary table."""


class StaticRows:
    """The rows of the pass that runs.

    Args:
        rotary: one table per layer, None for layers that lie on other devices.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: Device,
        dtype: torch.dtype,
        max_rows: int,
        rotary: Sequence[RotaryTable | None],
    ) -> None:
        def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device.device)

        self._device = device
        self._max_rows = max_rows
        own = [table for table in dict.fromkeys(rotary) if table is not None]
        self._tables = {table: place for place, table in enumerate(own)}
        self._rotary = rotary
        self.states = zeros(config.num_layers + 1, max_rows, config.hidden_size)
        """Each layer's input, and the last one's output. Nothing in it is overwritten within a pass, since a policy may
        be reading it."""
        self._views: dict[int, Sequence[Tensor]] = {}
        self.logits = zeros(max_rows, config.vocab_size, kind=torch.float32)
        self._numbers = zeros(_FIRST_TABLE + len(self._tables), max_rows, kind=torch.int64)
        self._numbers_on_host = device.host_memory(tuple(self._numbers.shape), torch.int64)
        self._skips = zeros(config.num_layers, max_rows, kind=torch.bool)
        self._skips_on_host = device.host_memory(tuple(self._skips.shape), torch.bool)
        self._starts = zeros(max_rows + 1, kind=torch.int32)
        self._lengths = zeros(max_rows, kind=torch.int32)
        self._first_rows = torch.arange(max_rows + 1, dtype=torch.int32, device=device.device)
        self._rotations = [[zeros(max_rows, 1, config.head_dim) for _ in range(2)] for _ in self._tables]

    def state(self, layer: int, num_rows: int) -> Tensor:
        """Returns the layer's input, `[num_rows, hidden_size]`; the last one's output for `num_layers`.

        It is the same tensor every time.
        """
        views = self._views.get(num_rows)
        if views is None:
            views = self._views[num_rows] = self.states[:, :num_rows].unbind()
        return views[layer]

    def write(self, batch: Batch, token_ids: Sequence[int]) -> None:
        """Writes where a pass's rows are, on the host. Waits until the device has read what is there.

        `token_ids` has one entry per row, or none if the caller writes the first layer's input itself.
        """
        spans = batch.spans
        spare = self._max_rows - len(spans)
        spare_token = spans[0].cache.pool.spare_token
        rows = [
            [*(token_ids or [0] * len(spans)), *[0] * spare],
            [*(span.cache.start + span.start for span in spans), *[spare_token] * spare],
            [*(span.cache.start for span in spans), *[spare_token] * spare],
            [*(span.end for span in spans), *[1] * spare],
        ]
        for table in self._tables:
            firsts = (table.first_row(span.cache.reserved_tokens) + span.start for span in spans)
            rows.append([*firsts, *[0] * spare])
        self._device.wait_for_downloads()  # in vain, where a step's tokens were read before the next step
        self._numbers_on_host.copy_(torch.tensor(rows))

    def write_skips(self, layer: int, skips: Sequence[bool]) -> None:
        """Writes which rows skip a layer, on the host."""
        self._skips_on_host[layer, : len(skips)].copy_(torch.tensor(skips))

    def upload(self) -> None:
        """Copies what `write` wrote, and looks rotations up. This and what follows may be in a graph."""
        self._numbers.copy_(self._numbers_on_host, non_blocking=True)
        self._starts[:-1].copy_(self._numbers[_START])
        self._lengths.copy_(self._numbers[_LENGTH])
        for table, own, rows in zip(self._tables, self._rotations, self._numbers[_FIRST_TABLE:], strict=True):
            for part, found in zip(own, table.at(rows), strict=True):
                part.copy_(found)

    def token_ids(self, num_rows: int) -> Tensor:
        """Returns int64 `[num_rows]`."""
        return self._numbers[_TOKEN, :num_rows]

    def slots(self, num_rows: int) -> Tensor:
        """Returns the rows' places in the pool, int64 `[num_rows]`."""
        return self._numbers[_SLOT, :num_rows]

    def attended(self, num_rows: int, max_length: int) -> AttendedRows:
        """Returns where the rows' keys are."""
        starts, lengths = self._starts[: num_rows + 1], self._lengths[:num_rows]
        return AttendedRows(starts, lengths, self._first_rows[: num_rows + 1], max_length)

    def rotation(self, layer: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines, `[num_rows, 1, head_dim]`."""
        table = self._rotary[layer]
        assert table is not None, "the layer lies on another device"
        cosines, sines = self._rotations[self._tables[table]]
        return cosines[:num_rows], sines[:num_rows]

    def uploaded_skips(self, layer: int, num_rows: int) -> Tensor:
        """Copies what `write_skips` wrote; returns bool `[num_rows, 1]`."""
        skips = self._skips[layer]
        skips.copy_(self._skips_on_host[layer], non_blocking=True)
        return skips[:num_rows].unsqueeze(1)
