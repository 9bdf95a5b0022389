"""``cbwcore bitmap``: the persistent bitmaps of a disk that nobody has open."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import msgspec
from rich.table import Table

from cbwcore.bitmap_export import read_bitmap, write_bitmap
from cbwcore.bitmaps import DirtyBitmap, check_granularity
from cbwcore.cli.arguments import UsageError, as_usage, parse_size
from cbwcore.cli.output import console, print_json, size_text
from cbwcore.disk import Disk
from cbwcore.errors import ConfigError, StateError
from cbwcore.options import check_name

__all__ = ["add_command"]


class BitmapFacts(msgspec.Struct, frozen=True):
    """One bitmap. Granularity and what is dirty in bytes; None where it is inconsistent, and ``inconsistent`` says
    why."""

    name: str
    granularity: int
    enabled: bool
    dirty: int | None
    since: str | None
    inconsistent: str | None


class ListFacts(msgspec.Struct, frozen=True):
    """What ``cbwcore bitmap list --json`` prints. Size in bytes; ``file`` None: there is no place for one."""

    disk: str
    size: int
    file: str | None
    bitmaps: list[BitmapFacts]


# ---- the command line ----


def add_command(commands: Any) -> None:
    """Put the command into the parser."""
    about = "list and change the persistent bitmaps of a disk"
    parser = commands.add_parser(
        "bitmap",
        help=about,
        description=f"{about[0].upper()}{about[1:]} that nobody has open, by QEMU's names for it.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    add_listing(actions)
    add_add(actions)
    add_action(actions, "remove", "forget bitmaps, inconsistent ones, too", run_remove, names="+")
    add_action(
        actions, "clear", "make bitmaps clean; no incremental backup can rely on them any more", run_clear, names="+"
    )
    merge = add_action(actions, "merge", "add to a bitmap what others have", run_merge, names=None)
    merge.add_argument("others", metavar="OTHER", nargs="+", help="these stay as they are")
    export = add_action(actions, "export", "write what a bitmap has to a new file, as JSON", run_export, names=None)
    export.add_argument("file", metavar="FILE", help="does not exist yet")
    add_import(actions)
    add_action(actions, "reset", "forget all bitmaps, and start a new file in place of a damaged one", run_reset)


def add_action(actions: Any, name: str, about: str, run: Any, *, names: str | None = "") -> Any:
    """An action on a disk. ``names``: how many bitmaps it takes, as argparse counts; None: one."""
    parser = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.add_argument("disk", metavar="DISK", help="a file or block device")
    if names is None:
        parser.add_argument("name", metavar="NAME", help="the bitmap")
    elif names:
        parser.add_argument("names", metavar="NAME", nargs=names, help="the bitmaps")
    parser.add_argument(
        "--bitmaps", metavar="PATH", help="their file (default: DISK.cbw-bitmaps beside a regular file)"
    )
    parser.set_defaults(run=run)
    return parser


def add_listing(actions: Any) -> None:
    """``list``."""
    parser = add_action(actions, "list", "what bitmaps there are; nothing is changed", run_list)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def add_add(actions: Any) -> None:
    """``add``."""
    parser = add_action(actions, "add", "make a bitmap, which records whenever the disk is open", run_add, names=None)
    parser.add_argument(
        "--granularity", metavar="SIZE", type=parse_size, default=65536, help="bytes per bit (default: 64K)"
    )
    parser.add_argument("--disabled", action="store_true", help="it does not record")


def add_import(actions: Any) -> None:
    """``import``."""
    parser = add_action(actions, "import", "make a bitmap of what was exported from one", run_import)
    parser.add_argument("file", metavar="FILE", help="what export wrote, of a disk of the same size")
    parser.add_argument("--name", help="the bitmap's (default: that in the file)")
    parser.add_argument("--disabled", action="store_true", help="it does not record")


# ---- the actions ----


def opened(args: argparse.Namespace, *, read_only: bool = False) -> Disk:
    """The disk, its bitmap file usable. ConfigError, StateError, OSError."""
    with contextlib.ExitStack() as undo:
        disk = undo.enter_context(Disk(args.disk, read_only=read_only, bitmaps=args.bitmaps))
        if disk.bitmaps.path is None:
            raise UsageError(f"{args.disk} is a block device: --bitmaps says where the file of its bitmaps is")
        if disk.bitmaps.problem is not None:
            raise StateError(disk.bitmaps.problem)
        undo.pop_all()
    return disk


def find(disk: Disk, name: str) -> DirtyBitmap:
    """ConfigError where there is none of that name."""
    if name not in disk.bitmaps:
        raise ConfigError(f"disk {disk.path} has no bitmap {name!r}")
    return disk.bitmaps[name]


def run_list(args: argparse.Namespace) -> int:
    """Print what there is."""
    with opened(args, read_only=True) as disk:
        facts = ListFacts(args.disk, disk.size, disk.bitmaps.path, [facts_of(disk, b) for b in disk.bitmaps.values()])
    if args.json:
        print_json(facts)
    else:
        show(facts)
    return 0


def facts_of(disk: Disk, bitmap: DirtyBitmap) -> BitmapFacts:
    """About one."""
    why = bitmap.inconsistent
    dirty = bitmap.count() if why is None else None
    return BitmapFacts(bitmap.name, bitmap.granularity, disk.bitmaps._is_enabled(bitmap), dirty, bitmap.since, why)


def show(facts: ListFacts) -> None:
    """For people."""
    out = console()
    if not facts.bitmaps:
        out.print(f"no bitmaps in {facts.file}", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "granularity", "state", "dirty", "since"):
        table.add_column(heading, no_wrap=heading == "granularity", overflow="fold")
    for each in facts.bitmaps:
        name = each.name if each.name.isprintable() else ascii(each.name)
        state = (
            f"inconsistent: {each.inconsistent}" if each.inconsistent else "recording" if each.enabled else "disabled"
        )
        dirty = "-" if each.dirty is None else size_text(each.dirty)
        table.add_row(name, size_text(each.granularity), state, dirty, each.since or "-")
    out.print(table)


def run_add(args: argparse.Namespace) -> int:
    """Make one."""
    with as_usage():
        check_name(args.name)
        check_granularity(args.granularity)
    with opened(args) as disk:
        disk.bitmaps.add(args.name, granularity=args.granularity, enabled=not args.disabled, persistent=True)
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Forget some; where one of them is not there, none."""
    with opened(args) as disk:
        for bitmap in [find(disk, name) for name in args.names]:
            if bitmap.name in disk.bitmaps:  # not named twice
                disk.bitmaps.remove(bitmap.name)
    return 0


def run_clear(args: argparse.Namespace) -> int:
    """Clear some; where one of them is not there, none."""
    with opened(args) as disk:
        for bitmap in [find(disk, name) for name in args.names]:
            bitmap.clear()
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """Merge."""
    with opened(args) as disk:
        find(disk, args.name).merge(*[find(disk, name) for name in args.others])
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Write one to a file."""
    with opened(args, read_only=True) as disk:
        write_bitmap(find(disk, args.name), args.file)
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Make one of a file."""
    with as_usage():
        if args.name is not None:
            check_name(args.name)
    with opened(args) as disk:
        found = read_bitmap(args.file, disk.size)
        name = found.name if args.name is None else args.name
        if name in disk.bitmaps:
            raise ConfigError(f"disk {disk.path} has a bitmap {name!r} already: import under another --name, and merge")
        disk.bitmaps._add(name, found.granularity, enabled=not args.disabled, persistent=True, content=found)
    return 0


def run_reset(args: argparse.Namespace) -> int:
    """Start anew."""
    with Disk(args.disk, bitmaps=args.bitmaps) as disk:
        disk.bitmaps.reset()
    return 0
