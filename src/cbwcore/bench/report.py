"""The report: one Markdown file with its plots beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cbwcore.bench import plots
from cbwcore.bench.machine import Machine
from cbwcore.bench.results import Outcome, markdown

__all__ = ["NO_PLOTS", "Report", "bounds_of", "write_report"]

NO_PLOTS = "The plots were left out: matplotlib is not installed (`pip install 'cbwcore[plots]'`)."


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of a run. Bytes and seconds."""

    command: str
    date: str
    machine: Machine
    quick: bool
    directory: str
    file_system: str | None
    size: int
    rounds: int
    seed: int
    seconds: float
    load_after: float
    outcomes: tuple[Outcome, ...]


def write_report(report: Report, path: Path, pictures: Path) -> None:
    """To ``path``; the plots go into the directory ``pictures``. OSError."""
    drawn: dict[str, str] = {}
    if plots.available():
        pictures.mkdir(parents=True, exist_ok=True)
        for outcome in report.outcomes:
            picture = pictures / f"{outcome.name}.png"
            if plots.draw(outcome, picture):
                drawn[outcome.name] = os.path.relpath(picture, path.parent)
    path.write_text("\n".join(lines(report, drawn)) + "\n", encoding="utf-8")


def lines(report: Report, drawn: dict[str, str]) -> Iterator[str]:
    """Of the file."""
    yield from ("# Benchmarks", "", f"Written by `{report.command}`, {report.date}.", "")
    yield from head(report)
    if not plots.available():
        yield from (NO_PLOTS, "")
    yield from summary(report)
    for outcome in report.outcomes:
        yield from section(outcome, drawn.get(outcome.name))


def head(report: Report) -> Iterator[str]:
    """How it was measured, on what."""
    machine = report.machine
    yield (
        f"A {'quick' if report.quick else 'full'} run of {report.seconds:.0f} s. Disk of {report.size >> 20} MiB where "
        f"a line says nothing else; files in {report.directory} ({report.file_system or 'file system unknown'}); seed "
        f"{report.seed}. Cases are interleaved, A B A B, usually for {report.rounds} rounds: a figure is the median, "
        "with the least and the most behind it; a ratio is the median of the rounds' ratios, cbwcore's time (or size) "
        "over the other's. Only the ratios carry over to another machine."
    )
    yield from ("", "| machine | |", "|---|---|")
    yield f"| CPU | {machine.cpu}, {machine.cpus} usable |"
    yield f"| memory | {machine.memory / (1 << 30):.1f} GiB |"
    yield f"| kernel | {machine.kernel} |"
    yield f"| load before, after | {machine.load:.2f}, {report.load_after:.2f} |"
    for name, version in machine.versions.items():
        yield f"| {name} | {version} |"
    for name, answer in machine.engines.items():
        yield f"| io engine {name} | {answer} |"
    yield ""


def bounds_of(outcomes: tuple[Outcome, ...]) -> list[tuple[str, str, str, str, str]]:
    """(section, case, bound, value, verdict) of every bound there is."""
    return [
        (outcome.title, row.case, bound.text, bound.shown(), bound.verdict())
        for outcome in outcomes
        for row in outcome.rows
        for bound in row.bounds
    ]


def summary(report: Report) -> Iterator[str]:
    """All bounds in one table."""
    bounds = bounds_of(report.outcomes)
    if not bounds:
        return
    missed = sum("MISSED" in verdict for *_, verdict in bounds)
    yield from ("## Bounds", "", f"{len(bounds) - missed} of {len(bounds)} met.", "")
    yield from ("| subject | case | bound | measured | met? |", "|---|---|---|---|---|")
    for bound in bounds:
        yield f"| {' | '.join(bound)} |"
    yield ""


def section(outcome: Outcome, picture: str | None) -> Iterator[str]:
    """Its conditions, table, plot and notes."""
    yield from (f"## {outcome.title}", "")
    for condition in outcome.conditions:
        yield f"* {condition}"
    yield ""
    if outcome.rows:
        yield from markdown(outcome.rows)
        yield ""
    if picture:
        yield from (f"![{outcome.title}]({picture})", "")
    for note in outcome.notes:
        yield f"* {note}"
    if outcome.notes:
        yield ""
