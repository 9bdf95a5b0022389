"""Rounds that interleave the cases, A B C A B C, so that a slow spell of the machine takes all sides of its round."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Case", "Pedantic", "Run", "Seconds", "in_turn", "interleave", "plainly", "ratio", "timed"]


class Seconds(float):
    """What a run measured itself."""


# A case sets its files up, gives the function that is timed, and cleans up. The function returns Seconds where it
# knows them better (the floor, the peer), else anything.
Run = Callable[[], object]
Case = Callable[[], contextlib.AbstractContextManager[Run]]

# ``pedantic(function, setup, rounds)``: for each round, call ``function`` with the arguments that ``setup`` returned;
# pytest-benchmark's has this form.
Pedantic = Callable[..., object]


def timed(run: Run) -> float:
    """Seconds that ``run`` took."""
    started = time.perf_counter()
    own = run()
    return own if isinstance(own, Seconds) else time.perf_counter() - started


def plainly(run: Run) -> Case:
    """A case with nothing to set up."""
    return lambda: contextlib.nullcontext(run)


def in_turn(function: Callable[[Run], object], *, setup: Callable[[], tuple[tuple[Run], Any]], rounds: int) -> None:
    """The plain `Pedantic`."""
    for _ in range(rounds):
        function(*setup()[0])


def interleave(cases: dict[str, Case], rounds: int, pedantic: Pedantic = in_turn) -> dict[str, list[float]]:
    """Seconds of every case in every round. ``pedantic`` times the last case of each."""
    *others, last = cases
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with contextlib.ExitStack() as held:

        def setup() -> tuple[tuple[Run], dict[str, Any]]:
            held.close()
            for name in others:
                with cases[name]() as run:
                    seconds[name].append(timed(run))
            return (held.enter_context(cases[last]()),), {}

        pedantic(lambda run: seconds[last].append(timed(run)), setup=setup, rounds=rounds)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
