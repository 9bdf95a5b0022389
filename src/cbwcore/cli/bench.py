"""``cbwcore bench``: cbwcore beside its floor and its peers on this machine, and a report of it."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from cbwcore.bench import plots
from cbwcore.bench.machine import look
from cbwcore.bench.report import NO_PLOTS, Report, bounds_of, write_report
from cbwcore.bench.results import Outcome, markdown
from cbwcore.bench.sections import FAILED, SECTIONS, run_section
from cbwcore.bench.setting import ROOM, SEED, BenchError, Setting
from cbwcore.cli.arguments import UsageError, parse_size
from cbwcore.cli.info import file_system
from cbwcore.cli.output import console, print_json
from cbwcore.cli.workspace import workspace

__all__ = ["add_command"]

DIRECTORY = "/dev/shm"  # noqa: S108 - a temporary directory is made in it
OUTPUT = "cbwcore-bench"
MIB = 1 << 20
MOST_ROUNDS = 1000


def add_command(commands: Any) -> None:
    """Put the command into the parser."""
    about = "measure it beside its floor and its peers, here"
    parser = commands.add_parser(
        "bench",
        help=about,
        description="Measure cbwcore on this machine beside plain system calls and, where they are installed, QEMU, "
        "nbdkit and others; write a report in Markdown, with plots where matplotlib is installed.",
        epilog=f"Sections: {', '.join(SECTIONS)}. A run needs {ROOM} times the disk's size in DIR; loop devices and "
        "file systems need root.",
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="end within two minutes: small disks, few rounds")
    extent.add_argument("--full", action="store_true", help="take about 20 minutes (default)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output", metavar="DIR", help=f"for report.md and its plots (default: ./{OUTPUT})")
    place.add_argument("--report", metavar="FILE.md", help="write the report there, and its plots to FILE/")
    parser.add_argument("--dir", metavar="DIR", default=DIRECTORY, help=f"for the disks (default: {DIRECTORY})")
    parser.add_argument("--only", metavar="NAME", nargs="+", action="extend", help="only these sections")
    parser.add_argument("--size", metavar="SIZE", type=size, help="of a disk (default: 1G; with --quick 128M)")
    parser.add_argument("--rounds", metavar="N", type=rounds, help="of most cases (default: 5; with --quick 3)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, and nothing else")
    parser.set_defaults(run=run)


def size(text: str) -> int:
    """Of a disk: whole MiB."""
    nbytes = parse_size(text, MIB)
    if nbytes % MIB:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of MiB")
    return nbytes


def rounds(text: str) -> int:
    """From 1 on."""
    value = int(text)
    if not 1 <= value <= MOST_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to {MOST_ROUNDS}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the sections, write the report. BenchError names the sections that failed; a missed bound is no failure."""
    chosen = sections_of(args.only)
    path, pictures = paths_of(args)
    out = console(quiet=args.json)
    with workspace("cbwcore-bench-", args.dir) as work:
        setting = Setting(work, size=args.size, rounds=args.rounds, quick=args.quick)
        path.parent.mkdir(parents=True, exist_ok=True)
        report = measure(setting, chosen, args, out)
    write_report(report, path, pictures)
    tell(report, path, out)
    if args.json:
        print_json(report)
    failed = [f"{outcome.name}: {note}" for outcome in report.outcomes for note in outcome.notes if FAILED in note]
    if failed:
        raise BenchError(f"bench: {'; '.join(failed)}")
    return 0


def sections_of(only: list[str] | None) -> list[str]:
    """Those that were asked for, in the report's order. UsageError."""
    for name in only or ():
        if name not in SECTIONS:
            raise UsageError(f"bench: {name!r} is not one of {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if only is None or name in only]


def paths_of(args: argparse.Namespace) -> tuple[Path, Path]:
    """Of the report, and of the directory for its plots. UsageError."""
    if args.report is None:
        directory = Path(OUTPUT if args.output is None else args.output)
        return directory / "report.md", directory
    path = Path(args.report)
    if path.suffix != ".md":
        raise UsageError(f"bench: {args.report!r} does not end in .md")
    return path, path.with_suffix("")


def measure(setting: Setting, chosen: list[str], args: argparse.Namespace, out: Console) -> Report:
    """All of it."""
    machine, started = look(), time.monotonic()
    outcomes: list[Outcome] = []
    for name in chosen:
        outcome = run_section(SECTIONS[name], setting, lambda text: out.print(f"… {text}"))
        outcomes.append(outcome)
        show(outcome, out)
    return Report(
        command=command_of(args),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine,
        quick=setting.quick,
        directory=args.dir,
        file_system=file_system_of(args.dir),
        size=setting.size,
        rounds=setting.rounds,
        seed=SEED,
        seconds=time.monotonic() - started,
        load_after=os.getloadavg()[0],
        outcomes=tuple(outcomes),
    )


def command_of(args: argparse.Namespace) -> str:
    """How to get such a report again."""
    words = ["cbwcore", "bench", *["--quick"] * args.quick]
    for name in ("output", "report", "dir", "size", "rounds"):
        value = getattr(args, name)
        if value is not None and (name, value) != ("dir", DIRECTORY):
            words += [f"--{name}", str(value)]
    return shlex.join(words + (["--only", *args.only] if args.only else []))


def file_system_of(directory: str) -> str | None:
    """Its type."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return file_system(fd)
    finally:
        os.close(fd)


def show(outcome: Outcome, out: Console) -> None:
    """A section, when it is done."""
    out.print(f"\n{outcome.title} ({outcome.seconds:.0f} s)")
    for line in markdown(outcome.rows) if outcome.rows else ():
        out.print(line, soft_wrap=True)
    for note in outcome.notes:
        out.print(f"* {note}", soft_wrap=True)
    out.print()


def tell(report: Report, path: Path, out: Console) -> None:
    """The end."""
    bounds = bounds_of(report.outcomes)
    missed = [bound for bound in bounds if "MISSED" in bound[-1]]
    for subject, case, text, value, verdict in missed:
        out.print(f"{verdict}: {subject}: {case}: {value}, not {text}", soft_wrap=True)
    if not plots.available():
        out.print(NO_PLOTS, soft_wrap=True)
    out.print(
        f"{len(bounds) - len(missed)} of {len(bounds)} bounds met, {report.seconds:.0f} s; {path}", soft_wrap=True
    )
