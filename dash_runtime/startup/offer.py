"""Chooses the actions that a server offers: those that were asked for, or what fits well into the memory that is free.

Knows actions and numbers of bytes; knows no tensors and no devices.
"""

from collections.abc import Callable, Collection, Sequence

from dash_runtime.actions import Action
from dash_runtime.errors import ConfigError
from dash_runtime.progress import Progress

_FITS_WELL = 0.6
"""The share of the memory that is free which weights may take, if nobody asked for them."""
Actions = tuple[Action, ...]


def asked_actions(asked: Sequence[Action], supported: Actions, why_full: str | None) -> Actions:
    """Returns the actions that were asked for, ascending.

    Args:
        why_full: why FULL cannot be left out, if it cannot.

    Raises:
        ConfigError: there is no kernel for one of them, or not one kernel among them, or FULL is missing.
    """
    if missing := set(asked) - set(supported):
        names = ", ".join(action.name for action in supported)
        raise ConfigError("actions", f"{min(missing).name} has no kernel here; supported: {names}")
    chosen = tuple(sorted(set(asked)))
    if not set(chosen) - {Action.SKIP}:
        raise ConfigError("actions", "must name more than SKIP, which alone runs no layer")
    if why_full is not None and Action.FULL not in chosen:
        raise ConfigError("actions", f"must name FULL: {why_full}")
    return chosen


def usual_actions(supported: Sequence[Action], rounded: Collection[Action]) -> Actions:
    """Returns the actions that nobody has to ask for: INT3 only if weights were `rounded` for it by their inputs. To
    the nearest, three bits lose much."""
    return tuple(action for action in supported if action is not Action.INT3 or action in rounded)


def fitting_actions(
    supported: Actions, needed: Callable[[Actions], int], free: int | None, why_full: str | None, progress: Progress
) -> Actions:
    """Returns all actions, or without FULL, or without INT8 too: the first of these that fits well; if none does, the
    last. Says what was left out, and how to get it."""
    choices = [supported]
    for dropped in (Action.FULL, Action.INT8):
        fewer = tuple(action for action in choices[-1] if action is not dropped)
        if why_full is None and free is not None and set(fewer) - {Action.SKIP} and fewer != choices[-1]:
            choices.append(fewer)
    chosen = next((own for own in choices if free is None or needed(own) <= _FITS_WELL * free), choices[-1])
    left_out = [action.name for action in supported if action not in chosen]
    if left_out:
        names = ",".join(action.name for action in supported)
        progress(
            f"offering {_listed(chosen)}, whose weights take {needed(chosen) / 1e9:.1f} GB; {' and '.join(left_out)} "
            f"left out: all would take {needed(supported) / 1e9:.1f} of {(free or 0) / 1e9:.1f} GB that are free "
            f"(DASH_ACTIONS={names} takes them)"
        )
    return chosen


def _listed(actions: Actions) -> str:
    return ", ".join(action.name for action in actions)
