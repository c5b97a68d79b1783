"""Spreads a model's layers over devices by their memory, or refuses a model that does not fit.

Knows numbers of bytes; knows no tensors, no files and no devices but their names and rooms.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from dash_runtime.actions import Action
from dash_runtime.errors import NotEnoughMemory

Bytes = Counter[str]
"""Numbers of bytes by what they are for: an action whose weights they are, `CACHE`, `COMPENSATION` or `WORK`."""

WEIGHTS = [action.name for action in sorted(Action, reverse=True)]
CACHE = "cache"
COMPENSATION = "compensation"
WORK = "work"


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """The memory that the parts of a model need."""

    layers: Sequence[Bytes]
    """One per layer."""
    embedding: Bytes
    """Lies with the first layer."""
    head: Bytes
    """Lies with the last layer. A tied one is the embedding itself if that lies there too."""
    is_tied: bool
    each_device: Bytes
    """On every device, whatever lies there."""

    @property
    def weights(self) -> int:
        """The memory of all weights."""
        return sum(map(self.weights_in, WEIGHTS))

    def weights_in(self, name: str) -> int:
        """The memory of the weights of one action."""
        parts = [*self.layers, self.head, *([] if self.is_tied else [self.embedding])]
        return sum(own[name] for own in parts)

    layer_loading: int = 0
    """The memory that quantising a layer's largest matrix takes while it loads. It may use the cache's, which is not
    allocated before."""
    head_loading: int = 0
    """The same for the head."""


@dataclass(frozen=True, slots=True)
class Room:
    """A device and the memory that is free there, in bytes; None if nobody can tell."""

    name: str
    free: int | None
    fills_lazily: bool = False
    """True if the cache takes memory only as it fills. Then only weights must fit at the start."""


@dataclass(frozen=True, slots=True)
class Place:
    """The layers on one device, and what they need there."""

    room: Room
    layers: range
    needs: Bytes

    @property
    def required(self) -> int:
        """Bytes that must be free."""
        return sum(self.needs[name] for name in WEIGHTS) if self.room.fills_lazily else self.needs.total()

    @property
    def missing(self) -> int:
        """Bytes that are not free."""
        return 0 if self.room.free is None else max(0, self.required - self.room.free)

    def __str__(self) -> str:
        names = WEIGHTS if self.room.fills_lazily else [*WEIGHTS, CACHE, COMPENSATION, WORK]
        parts = ", ".join(f"{name} {_gb(self.needs[name])}" for name in names if self.needs[name])
        free = "" if self.room.free is None else f" of {_gb(self.room.free)} GB free"
        later = f"; the cache takes up to {_gb(self.needs[CACHE])} GB as it fills" if self.room.fills_lazily else ""
        layers = f"layers {self.layers.start} to {self.layers.stop - 1}"
        return f"{self.room.name}: {layers} need {_gb(self.required)} GB{free}: {parts}{later}"


def place_layers(model: ModelBytes, rooms: Sequence[Room]) -> list[Place]:
    """Returns the layers of each device: consecutive ones, in the order of `rooms`, at least one on each.

    The device with the largest share of its free memory in use has as much left as it can.

    Raises:
        NotEnoughMemory: the model does not fit; the message says what is missing.
    """
    places = _balanced(model, rooms)
    missing = sum(place.missing for place in places)
    if missing:
        raise NotEnoughMemory(_refusal(places, missing))
    return places


def _balanced(model: ModelBytes, rooms: Sequence[Room]) -> list[Place]:
    num_layers = len(model.layers)
    assert 0 < len(rooms) <= num_layers
    sums = list(accumulate(model.layers, lambda left, right: left + right, initial=Bytes()))
    best: dict[int, tuple[float, list[Place]]] = {0: (0.0, [])}  # by the number of layers that are placed
    for number, room in enumerate(rooms, 1):
        is_last = number == len(rooms)
        ends = [num_layers] if is_last else range(number, num_layers - len(rooms) + number + 1)
        found: dict[int, tuple[float, list[Place]]] = {}
        for end in ends:
            for start, (share, before) in best.items():
                if start >= end:
                    continue
                place = Place(room, range(start, end), _needs(model, sums, start, end))
                own = max(share, place.required / room.free if room.free else place.required)
                if end not in found or own < found[end][0]:
                    found[end] = own, [*before, place]
        best = found
    return best[num_layers][1]


def _needs(model: ModelBytes, sums: Sequence[Bytes], start: int, end: int) -> Bytes:
    has_first, has_last = start == 0, end == len(model.layers)
    needs = sums[end] - sums[start] + model.each_device
    loading = model.layer_loading
    if has_first and not (has_last and model.is_tied):
        needs += model.embedding
    if has_last:
        needs += model.head
        loading = max(loading, model.head_loading)
    needs[WORK] = max(needs[WORK], loading - needs[CACHE] - needs[COMPENSATION])
    return needs


def _refusal(places: Sequence[Place], missing: int) -> str:
    needs = sum((place.needs for place in places), Bytes())
    actions = [name for name in WEIGHTS if needs[name]]
    parts = [f"{_gb(sum(needs[name] for name in actions))} GB for its weights in {', '.join(actions)}"]
    if not places[0].room.fills_lazily:
        others = needs[COMPENSATION] + needs[WORK]
        parts += [f"{_gb(needs[CACHE])} GB for its cache", f"{_gb(others)} GB to work"]
    free = ", ".join(f"{place.room.name} has {_gb(place.room.free or 0)}" for place in places)
    return f"the model needs {_listed(parts)}; {free}: {_gb(missing)} GB are missing"


def _listed(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f}"
