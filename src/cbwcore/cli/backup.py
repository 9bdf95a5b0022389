"""``cbwcore backup``: an image of a disk, whole, or what was written since another backup."""

from __future__ import annotations

import argparse
import signal
from typing import Any

from cbwcore.backup import BackupJob, BackupOptions, BackupResult, BitmapMode, OnError, Sync, backup_group
from cbwcore.cli.arguments import as_usage, parse_seconds, parse_size
from cbwcore.cli.output import console, print_json, size_text, time_text
from cbwcore.cli.progress import progress
from cbwcore.disk import Disk
from cbwcore.engines import ENGINES
from cbwcore.policy import OnCbwError

__all__ = ["add_command"]

OPTIONS = (  # those of `BackupOptions` that have the same name here
    "sync",
    "bitmap",
    "bitmap_mode",
    "format",
    "compress",
    "backing",
    "fallback",
    "overwrite",
    "verify",
    "manifest",
    "speed",
    "workers",
    "chunk_size",
    "on_source_error",
    "on_target_error",
    "fleece",
    "fleece_limit",
    "cluster_size",
    "on_cbw_error",
    "cbw_timeout",
)
LOOK_EVERY = 0.1  # seconds


def add_command(commands: Any) -> None:
    """Put the command into the parser."""
    about = "copy a disk into an image: all of it, or what was written since another backup"
    parser = commands.add_parser(
        "backup",
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog="A SIZE is in bytes, or ends in K, M, G or T. Until the image is complete and on stable storage "
        "it is TARGET.partial. Its manifest is TARGET.cbw.json.",
    )
    parser.add_argument("disk", metavar="DISK", help="a file or block device that nobody else writes")
    parser.add_argument("target", metavar="TARGET", help="the image to be made, or a block device")
    add_content(parser)
    add_image(parser)
    add_running(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    parser.set_defaults(run=run)


def add_content(parser: argparse.ArgumentParser) -> None:
    """What is copied."""
    group = parser.add_argument_group("what is copied")
    choices = [str(s) for s in Sync if s != Sync.NONE]
    group.add_argument("--sync", choices=choices, help="all, or what the bitmap has (default: full)")
    group.add_argument("--bitmap", metavar="NAME", help="the bitmap; a full backup starts it")
    group.add_argument(
        "--bitmap-mode", choices=[str(m) for m in BitmapMode], help="what becomes of it (default: on-success)"
    )
    group.add_argument("--backing", metavar="IMAGE", help="the backup that an incremental one builds on")
    group.add_argument("--fallback", choices=("full",), help="what to do where an incremental one is not possible")
    group.add_argument("--bitmaps", metavar="PATH", help="the disk's bitmaps (default: DISK.cbw-bitmaps)")


def add_image(parser: argparse.ArgumentParser) -> None:
    """What it becomes."""
    group = parser.add_argument_group("the image")
    group.add_argument("--format", choices=("raw", "qcow2"), help="default: by TARGET's name")
    group.add_argument("--compress", choices=("zstd",), help="compress it; qcow2 only")
    group.add_argument("--force", dest="overwrite", action="store_true", default=None, help="replace an image")
    group.add_argument("--verify", action="store_true", default=None, help="read it back before it counts")
    group.add_argument("--manifest", metavar="PATH", help="where the manifest goes if TARGET is a block device")


def add_running(parser: argparse.ArgumentParser) -> None:
    """How it is done."""
    group = parser.add_argument_group("how")
    group.add_argument("--speed", metavar="SIZE", type=parse_size, help="bytes a second at most (default: no limit)")
    group.add_argument("--workers", metavar="N", type=int, help="threads that copy (default: 2)")
    group.add_argument("--chunk-size", metavar="SIZE", type=parse_size, help="bytes read at once (default: 1M)")
    again = [str(e) for e in (OnError.REPORT, OnError.IGNORE)]
    for name, what in (("source", "read"), ("target", "written")):
        group.add_argument(
            f"--on-{name}-error", choices=again, help=f"fail, or try again, where it cannot be {what} (default: report)"
        )
    group.add_argument("--fleece", metavar="PATH", help="where old data goes (default: an unnamed file beside DISK)")
    group.add_argument("--fleece-limit", metavar="SIZE", type=parse_size, help="bytes that it may take")
    group.add_argument("--cluster-size", metavar="SIZE", type=parse_size, help="of the snapshot (default: 64K)")
    group.add_argument("--on-cbw-error", choices=[str(p) for p in OnCbwError], help="default: break-guest-write")
    group.add_argument("--cbw-timeout", metavar="SECONDS", type=parse_seconds, help="default: none")
    group.add_argument("--direct", action="store_true", help="read the disk with O_DIRECT")
    group.add_argument("--io", choices=ENGINES, default="auto", help="the I/O engine (default: auto)")


def run(args: argparse.Namespace) -> int:
    """Make the backup, and tell of it."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    with as_usage():
        options = BackupOptions.make(args.target, **given)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as ctrl-C: the partial image goes
    try:
        result = back_up(args, options)
    finally:
        signal.signal(signal.SIGTERM, before)
    if args.json:
        print_json(result)
    else:
        show(args, result)
    return 0


def back_up(args: argparse.Namespace, options: BackupOptions) -> BackupResult:
    """Until it is done. Where no bitmap takes part the disk is only read."""
    with Disk(args.disk, direct=args.direct, io=args.io, read_only=args.bitmap is None, bitmaps=args.bitmaps) as disk:
        job = backup_group([(disk, options)])[0]
        with progress("backup", job.len, quiet=args.json) as bar:
            return watch(job, bar.update)


def watch(job: BackupJob, update: Any) -> BackupResult:
    """The job's result, its progress shown meanwhile."""
    while True:
        try:
            result = job.wait(LOOK_EVERY)
        except TimeoutError:
            update(job.offset)
        else:
            update(job.len)
            return result


def show(args: argparse.Namespace, result: BackupResult) -> None:
    """For people."""
    out = console()
    manifest = result.manifest
    assert manifest is not None
    if result.reason is not None:
        out.out(f"done as a full backup: {result.reason}", highlight=False)
    rate = size_text(int(manifest.data_bytes / max(result.seconds, 1e-3)))
    out.out(
        f"{result.sync} backup {result.id} of {args.disk} in {args.target}: "
        f"{size_text(manifest.data_bytes)} of data in {time_text(result.seconds)}, {rate}/s",
        highlight=False,
    )
    if manifest.bitmap is not None:
        out.out(f"bitmap {manifest.bitmap.name} has what is written from then on", highlight=False)
