"""``cbwcore restore`` and ``cbwcore verify``: from a backup and its parents to a disk; whether they are as written."""

from __future__ import annotations

import argparse
from typing import Any

from cbwcore.cli.output import console, print_json, size_text, time_text
from cbwcore.cli.progress import phases
from cbwcore.images.restore import CheckedImage, restore, verify_backup

__all__ = ["add_commands"]

IMAGE = "a backup's image, raw or qcow2; its manifest lies beside it, its parents where it names them"


def add_commands(commands: Any) -> None:
    """Put both commands into the parser."""
    about = "write the disk as it was at a backup's T0 to a new file or to a block device"
    parser = commands.add_parser("restore", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("image", metavar="IMAGE", help=IMAGE)
    parser.add_argument(
        "destination", metavar="DEST", help="a file that is to be, or a block device, which may be larger"
    )
    parser.add_argument("--verify", action="store_true", help="read DEST back and compare it with the backup")
    parser.add_argument("--force", action="store_true", help="replace a file at DEST, once the new one is complete")
    add_common(parser)
    parser.set_defaults(run=run_restore)
    about = "read a backup and its parents, and compare them with what was written"
    parser = commands.add_parser("verify", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("image", metavar="IMAGE", help=IMAGE)
    add_common(parser)
    parser.set_defaults(run=run_verify)


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of both."""
    parser.add_argument("--manifest", metavar="PATH", help="where IMAGE's manifest is, if not at IMAGE.cbw.json")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, and no progress")


def run_restore(args: argparse.Namespace) -> int:
    """Restore, and tell what was done."""
    with phases(quiet=args.json) as progress:
        done = restore(
            args.image,
            args.destination,
            verify=args.verify,
            overwrite=args.force,
            manifest=args.manifest,
            progress=progress,
        )
    if args.json:
        print_json(done)
        return 0
    read_back = ", read back and compared" if done.verified else ""
    top = done.chain[0]
    console().print(
        f"restored {size_text(done.size)} ({size_text(done.data_bytes)} of data) to {done.destination} "
        f"in {time_text(done.seconds)}{read_back}: backup {top.id} of {top.created}, {images_text(done.chain)}",
        soft_wrap=True,
    )
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Verify, and tell what was found."""
    with phases(quiet=args.json) as progress:
        found = verify_backup(args.image, manifest=args.manifest, progress=progress)
    if args.json:
        print_json(found)
        return 0
    out = console()
    for image in found.chain:
        out.print(
            f"{image.path}: as written: {image.sync} backup {image.id} of {image.created}, "
            f"{size_text(image.data_bytes)}, SHA-256 {image.sha256}",
            soft_wrap=True,
        )
    if not found.complete:
        out.print("it has no full backup below it, and cannot be restored alone", soft_wrap=True)
    return 0


def images_text(chain: list[CheckedImage]) -> str:
    """How many."""
    return "1 image" if len(chain) == 1 else f"{len(chain)} images"
