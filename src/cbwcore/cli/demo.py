"""``cbwcore demo``: a snapshot under load, backed up and proved; then each policy against a target that fails."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import cbwcore
from cbwcore.cli.arguments import parse_size
from cbwcore.cli.image import copy_out, make_image
from cbwcore.cli.load import run_under_load
from cbwcore.cli.output import console, print_json, size_text
from cbwcore.cli.policies import FAULTS, run_case
from cbwcore.cli.report import DemoReport, results_table
from cbwcore.cli.workspace import workspace
from cbwcore.disk import Disk
from cbwcore.errors import CbwError, ConfigError
from cbwcore.policy import OnCbwError

__all__ = ["DemoError", "add_command"]

DEFAULT_SIZE = 256 << 20
SMALLEST = 1 << 20
LONGEST = 86400  # seconds


class DemoError(CbwError):
    """A proof of the demo did not hold."""


def add_command(commands: Any) -> None:
    """Put the command into the parser."""
    about = "a snapshot under load, backed up and proved; then each policy against a target that fails"
    parser = commands.add_parser("demo", help="show it all on a disk of its own", description=f"Show {about}.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--disk", metavar="PATH", help="use a copy of this file or device, which is only read")
    which.add_argument("--size", type=size, default=DEFAULT_SIZE, metavar="BYTES", help="disk size (default: 256M)")
    parser.add_argument("--seconds", type=seconds, default=5.0, metavar="S", help="time of the backup (default: 5)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of all that is random (default: a random one)")
    parser.add_argument("--dir", metavar="DIR", help="where the temporary directory is made (default: as TMPDIR says)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, and nothing else")
    parser.set_defaults(run=run)


def size(text: str) -> int:
    """Of the disk, in bytes."""
    return parse_size(text, SMALLEST)


def seconds(text: str) -> float:
    """A time above 0, up to a day."""
    value = float(text)
    if not 0 < value <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to {LONGEST} seconds")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the demo and print what it found. DemoError names the proofs that did not hold."""
    out = console(quiet=args.json)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2**32)
    with workspace("cbwcore-demo-", args.dir) as work:
        report = demo(args, work, out)
    out.print(results_table(report.runs))
    if args.json:
        print_json(report)
    failed = [f"{r.name}: {p.claim}" for r in report.runs for p in r.proofs if not p.held]
    if failed:
        raise DemoError(f"demo: with seed {report.seed} this did not hold: " + "; ".join(failed))
    out.print("Every proof held.")
    return 0


def demo(args: argparse.Namespace, work: Path, out: Console) -> DemoReport:
    """All runs, in the directory ``work``."""
    began = time.monotonic()
    image = work / "disk.img"
    what = prepare(args, image)
    out.print(f"disk          {size_text(image.stat().st_size)}, {what}; seed {args.seed}")
    first, hashes = run_under_load(work, image, seed=args.seed, seconds=args.seconds, out=out)
    out.print("policies      each against a target that runs full, and one that is too slow")
    runs = [first]
    for policy in OnCbwError:
        for fault in FAULTS:
            runs.append(run_case(work, policy, fault(), args.seed))
    return DemoReport(
        version=cbwcore.__version__,
        seed=args.seed,
        seconds=time.monotonic() - began,
        disk=what,
        disk_size=image.stat().st_size,
        sha256=hashes,
        runs=runs,
        held=all(p.held for r in runs for p in r.proofs),
    )


def prepare(args: argparse.Namespace, image: Path) -> str:
    """Make the image, or copy the user's disk to it; what it is, in words."""
    if args.disk is None:
        return make_image(image, args.size, args.seed)
    with Disk(args.disk, read_only=True) as disk:
        if disk.size < SMALLEST:
            raise ConfigError(f"{args.disk} has {disk.size} bytes, the demo needs {SMALLEST}")
        copy_out(disk, image)
    return f"a copy of {args.disk}"
