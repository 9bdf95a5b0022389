"""Whether a bitmap has all that an incremental backup needs, and what is done where it has not.

A bitmap's *epoch*, ``since``, is the backup since whose T0 it has recorded every guest write. What it has is enough on
top of that backup, and on top of any later one that was made from the same bitmap in the same epoch (where the process
died after the image was complete and before the bitmap was told).
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, NamedTuple

from cbwcore.backup.options import BackupOptions, Sync
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import CbwError, ConfigError
from cbwcore.images.manifest import read_manifest

if TYPE_CHECKING:
    from cbwcore.disk import Disk

__all__ = ["Decision", "decide", "take_bitmap"]

logger = logging.getLogger(__name__)


class Decision(NamedTuple):
    """What a job does: ``sync``, and ``reason`` where that is not what was asked for."""

    sync: Sync
    reason: str | None


class Unusable(Exception):  # noqa: N818 - caught in this module
    """The reason why the bitmap will not do."""


def decide(disk: Disk, options: BackupOptions) -> Decision:
    """Under the disk's ``_admin``. ConfigError where it is refused. It changes nothing."""
    if not options.layered:
        return Decision(options.sync, None)
    try:
        check_parent(usable_bitmap(disk, options), disk, options)
    except Unusable as e:
        if options.fallback is None:
            raise ConfigError(f"{options.sync} backup of {disk.path} is refused: {e}") from e.__cause__
        return Decision(Sync.FULL, str(e))
    return Decision(options.sync, None)


def take_bitmap(
    disk: Disk, options: BackupOptions, decision: Decision, undo: contextlib.ExitStack
) -> DirtyBitmap | None:
    """The job's bitmap, if it has one. ConfigError, StateError, OSError.

    For a full backup one that there is records again, and one that there is not, or that cannot be used, is made;
    persistent where it can be."""
    name = options.bitmap
    if name is None:
        return None
    if decision.sync in (Sync.INCREMENTAL, Sync.BITMAP):
        return disk.bitmaps[name]
    if disk.bitmaps.problem is not None:
        logger.warning("disk %s: new bitmaps take the place of those that cannot be used", disk.path)
        disk.bitmaps.reset()
    if name in disk.bitmaps and disk.bitmaps[name].inconsistent is not None:
        disk.bitmaps.remove(name)
    if name not in disk.bitmaps:
        can_persist = disk.bitmaps.path is not None and not disk.read_only
        disk.bitmaps.add(name, persistent=can_persist)
        undo.callback(disk.bitmaps.remove, name)
    bitmap = disk.bitmaps[name]
    if not bitmap.enabled and not disk.read_only:
        bitmap.enable()
    return bitmap


def usable_bitmap(disk: Disk, options: BackupOptions) -> DirtyBitmap:
    """The bitmap, if nothing is wrong with it. ConfigError while another job has it: no other way round that."""
    name = options.bitmap
    assert name is not None
    if disk.bitmaps.problem is not None:
        raise Unusable(f"the bitmaps of {disk.path} cannot be used: {disk.bitmaps.problem}")
    if name not in disk.bitmaps:
        raise Unusable(f"it has no bitmap {name!r}")
    bitmap = disk.bitmaps[name]
    if bitmap.inconsistent is not None:
        raise Unusable(f"bitmap {name!r} is inconsistent: {bitmap.inconsistent}")
    bitmap._check_idle()
    if bitmap.since is None:
        raise Unusable(f"bitmap {name!r} has recorded since no backup; a full one starts it")
    return bitmap


def check_parent(bitmap: DirtyBitmap, disk: Disk, options: BackupOptions) -> None:
    """Whether the bitmap has all that was written since the backup to build on."""
    backing = os.fspath(options.backing)
    try:
        parent = read_manifest(backing)
    except (OSError, CbwError) as e:
        raise Unusable(f"backing {backing} is no backup to build on: {e}") from e
    if parent.size != disk.size:
        raise Unusable(f"backing {backing} is of {parent.size} bytes, the disk of {disk.size}")
    same_epoch = parent.bitmap is not None and parent.bitmap.name == bitmap.name and parent.bitmap.since == bitmap.since
    if parent.id != bitmap.since and not same_epoch:
        raise Unusable(f"bitmap {bitmap.name!r} has recorded since backup {bitmap.since}, and {backing} is {parent.id}")
