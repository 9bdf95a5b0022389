"""What the cases find: rows of tables, with their bounds, and points of plots; how they are shown, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import msgspec

from cbwcore.bench.rounds import ratio

__all__ = [
    "Bound",
    "Figures",
    "Outcome",
    "Plot",
    "Point",
    "Row",
    "compared",
    "markdown",
    "show_rate",
    "show_size",
    "show_time",
]


# ---- figures for people ----


def show_time(seconds: float) -> str:
    """With three digits, in the unit that fits."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def show_size(count: float) -> str:
    """Of memory or space."""
    return f"{count / (1 << 20):.1f} MiB" if abs(count) >= 1 << 20 else f"{count / 1024:.1f} KiB"


def show_rate(seconds: float) -> str:
    """Operations a second, of what one takes."""
    return f"{1e-3 / seconds:.1f} K/s"


def show_speed(rate: float) -> str:
    """Of memory, from bytes a second."""
    return f"{rate / 1e9:.2g} GB/s"


def show_factor(value: float) -> str:
    """Of a speed-up."""
    return f"{value:.2f} ×"


SHOWN: dict[str, Callable[[float], str]] = {
    "time": show_time,
    "rate": show_rate,
    "size": show_size,
    "speed": show_speed,
    "factor": show_factor,
}


# ---- rows ----


class Figures(msgspec.Struct, frozen=True):
    """One value a round. ``kind``: ``time`` (seconds), ``rate`` (seconds, shown as operations a second), ``size``
    (bytes), ``speed`` (bytes a second) or ``factor``."""

    values: tuple[float, ...]
    kind: str = "time"
    label: str = ""
    """Which of several it is: an I/O mode, a server."""

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)

    def text(self) -> str:
        """Median, least and most; of rates: fastest and slowest."""
        show = SHOWN[self.kind]
        shown = show(self.median)
        if len(self.values) > 1:
            shown += f" ({show(min(self.values))}–{show(max(self.values))})"
        return f"{shown}, {self.label}" if self.label else shown


class Bound(msgspec.Struct, frozen=True):
    """One promise: ``value`` is at most (or ``at_least``) ``limit``; ``floor``: the floor's value, if any."""

    value: float
    limit: float
    text: str
    at_least: bool = False
    floor: float | None = None
    kind: str = "factor"
    """Of the value, as in `Figures`."""

    def met_by(self, value: float) -> bool:
        """Whether ``value`` would keep it."""
        return value >= self.limit if self.at_least else value <= self.limit

    def verdict(self) -> str:
        """Of a miss it is told where not even the floor got there."""
        if self.met_by(self.value):
            return "met"
        if self.floor is None or self.met_by(self.floor):
            return "MISSED"
        return f"MISSED, by the floor too ({SHOWN[self.kind](self.floor)})"

    def shown(self) -> str:
        """The value."""
        return SHOWN[self.kind](self.value)


class Point(msgspec.Struct, frozen=True):
    """Of a plot: the curve ``series`` of the plot called ``plot``."""

    plot: str
    series: str
    x: float
    y: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a table; ratios are of times or sizes, cbwcore's over the other's."""

    case: str
    ours: Figures | None = None
    floor: Figures | None = None
    over_floor: float | None = None
    peer: Figures | None = None
    over_peer: float | None = None
    bounds: tuple[Bound, ...] = ()
    points: tuple[Point, ...] = ()
    note: str = ""
    """In place of the peer's figures, where there are none."""

    def cells(self) -> tuple[str, ...]:
        """A bound that is missed is told, and fails nothing."""
        texts = "; ".join(bound.text for bound in self.bounds) or "–"
        met = "; ".join(bound.verdict() for bound in self.bounds) or "–"
        figures = [value.text() if value else "–" for value in (self.ours, self.floor, self.peer)]
        ratios = ["–" if value is None else f"{value:.2f}" for value in (self.over_floor, self.over_peer)]
        return (self.case, figures[0], figures[1], ratios[0], self.note or figures[2], ratios[1], texts, met)


class Plot(msgspec.Struct, frozen=True, kw_only=True):
    """A plot of a section's points; the axes' names have their units. The x axis is logarithmic, unless ``linear``."""

    name: str
    title: str
    x: str
    y: str
    linear: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one section found."""

    name: str
    title: str
    conditions: tuple[str, ...]
    """Client, depth, device, cache mode; one line each."""
    rows: tuple[Row, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: tuple[str, ...] = ()
    """What was left out, and why; what failed."""
    seconds: float = 0.0


HEAD = ("case", "cbwcore", "floor", "ratio", "peer", "ratio", "bound", "met?")


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """The table, line by line, aligned; columns that say nothing are left out."""
    lines = [row.cells() for row in rows]
    kept = [i for i in range(len(HEAD)) if i < 2 or any(line[i] != "–" for line in lines)]
    table = [tuple(line[i] for i in kept) for line in (HEAD, *lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, tuple("-" * width for width in widths))
    for cells in table:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def compared(
    case: str,
    times: dict[str, list[float]],
    *,
    kind: str = "time",
    peers: Sequence[str] = ("peer",),
    floor_max: float | None = None,
    peer_max: float | None = None,
    peer_times: float | None = None,
    no_peer: str = "",
    points: tuple[Point, ...] = (),
) -> Row:
    """Ours (``cbwcore``) beside ``floor`` and the fastest of ``peers``; seconds of one operation, round by round.

    Bounds: at most ``floor_max`` of the floor's time, at most ``peer_max`` of the peer's, at least ``peer_times`` as
    fast as the peer."""
    ours, floor = times["cbwcore"], times.get("floor")
    ran = [name for name in peers if name in times]
    best = min(ran, key=lambda name: statistics.median(times[name])) if ran else None
    bounds = []
    over_floor = over_peer = floor_over_peer = None
    if floor is not None:
        over_floor = ratio(ours, floor)
        if floor_max is not None:
            bounds.append(Bound(over_floor, floor_max, f"≤ {floor_max:.4g} × floor"))
    if best is not None:
        over_peer = ratio(ours, times[best])
        floor_over_peer = None if floor is None else ratio(floor, times[best])
        if peer_max is not None:
            bounds.append(Bound(over_peer, peer_max, f"≤ {peer_max:.4g} × peer", floor=floor_over_peer))
        if peer_times is not None:
            of_floor = None if floor_over_peer is None else 1 / floor_over_peer
            text = f"≥ {peer_times:.4g} × as fast as peer"
            bounds.append(Bound(1 / over_peer, peer_times, text, at_least=True, floor=of_floor))
    return Row(
        case=case,
        ours=Figures(tuple(ours), kind),
        floor=None if floor is None else Figures(tuple(floor), kind),
        over_floor=over_floor,
        peer=None if best is None else Figures(tuple(times[best]), kind, "" if best == "peer" else best),
        over_peer=over_peer,
        bounds=tuple(bounds),
        points=points,
        note=no_peer if best is None else "",
    )
