"""Starting backup jobs: all is checked and made ready, then there is one T0 for all, or none and nothing is left
behind."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from cbwcore.backup.epoch import Decision, decide, take_bitmap
from cbwcore.backup.job import BackupJob, Making
from cbwcore.backup.options import UNIT, BackupOptions, BitmapMode, Sync
from cbwcore.backup.plan import Plan, plan_all, plan_dirty
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import ConfigError
from cbwcore.files import check_kind, overlap, storage
from cbwcore.identity import identify
from cbwcore.images.chain import is_missing
from cbwcore.images.manifest import BackupFacts, BitmapUse, Source, iso_time
from cbwcore.images.output import Output, open_output
from cbwcore.snapshot import Snapshot, Taken, Wanted, take_snapshots

if TYPE_CHECKING:
    from cbwcore.disk import Disk

__all__ = ["backup_group"]

Target = str | os.PathLike[str] | None


class Ready(NamedTuple):
    """A job before T0."""

    disk: Disk
    options: BackupOptions
    decision: Decision
    bitmap: DirtyBitmap | None
    output: Output | None
    clean_up: contextlib.ExitStack
    job_id: str
    identity: str  # the disk's


def backup_group(
    wanted: Iterable[tuple[Disk, Target | BackupOptions]],
    *,
    progress: Callable[[BackupJob], object] | None = None,
    **options: Any,
) -> list[BackupJob]:
    """Start a backup of each disk, all of one T0, or none, and then nothing is changed.

    ``wanted``: (disk, target) pairs, with ``options``, which are `Disk.backup`'s, for each; or (disk, `BackupOptions`).
    ``progress(job)`` is called from the jobs' threads, now and then. The jobs come in the order of the pairs, run side
    by side and end each by itself. ConfigError, OSError of a target, StateError."""
    pairs = [(disk, options_of(what, options)) for disk, what in wanted]
    disks = {id(disk): disk for disk, _ in pairs}
    for disk in disks.values():
        disk._check_open()
    with contextlib.ExitStack() as locks:
        for key in sorted(disks):
            locks.enter_context(disks[key]._admin)
        with contextlib.ExitStack() as undo:
            ready = [make_ready(disk, each, undo) for disk, each in pairs]
            # Last: bitmaps that cannot be used are replaced, and that is for good.
            ready = [each._replace(bitmap=take_bitmap(each.disk, each.options, each.decision, undo)) for each in ready]
            taken = take_snapshots([wanted_of(each) for each in ready])
            created = time.time()
            for each, found in zip(ready, taken, strict=True):
                undo.callback(give_up, each, found)
            jobs = [
                BackupJob(each.disk, making(each, found, created), each.job_id, progress)
                for each, found in zip(ready, taken, strict=True)
            ]
            undo.pop_all()
        for job in jobs:
            job.disk._jobs[job] = None
    for job in jobs:
        job.start()
    return jobs


def options_of(what: Target | BackupOptions, options: dict[str, Any]) -> BackupOptions:
    """From a target, or as they are."""
    if not isinstance(what, BackupOptions):
        return BackupOptions.make(what, **options)
    if options:
        raise ConfigError(f"{', '.join(options)}: where BackupOptions are given they hold all options")
    return what


def make_ready(disk: Disk, options: BackupOptions, undo: contextlib.ExitStack) -> Ready:
    """All that can fail before T0 but for the bitmap; ``undo`` takes it back."""
    decision = decide(disk, options)
    clean_up = contextlib.ExitStack()
    output = None
    if options.sync != Sync.NONE:
        if options.fleece is not None and os.path.realpath(options.fleece) == os.path.realpath(options.target):
            raise ConfigError(f"target {os.fspath(options.target)} is the fleecing target, too")
        check_not_the_disk(disk, options.target)
        layered = decision.sync != Sync.FULL
        fleece_is_there = options.fleece is not None and not is_missing(options.fleece)
        output = open_output(
            options.target,
            size=disk.size,
            format=options.image_format,
            backing=options.backing if layered else None,
            compress=options.compress,
            layered=layered,
            overwrite=options.overwrite,
            manifest=options.manifest,
            apart=[options.fleece] if fleece_is_there else [],
        )
        undo.callback(output.abort)
        if options.fleece is not None and not fleece_is_there:
            clean_up.callback(os.unlink, options.fleece)
    return Ready(disk, options, decision, None, output, clean_up, uuid.uuid4().hex, identify(disk._file.fd))


def give_up(ready: Ready, taken: Taken) -> None:
    """There was a T0, but there will be no job."""
    if taken.freeze is not None:
        taken.freeze.merge()
    with contextlib.suppress(OSError):
        taken.snapshot.close()
    with contextlib.suppress(OSError):
        ready.clean_up.close()


def check_not_the_disk(disk: Disk, target: str | os.PathLike[str]) -> None:
    """By what they are stored in: the disk may have another name by now. ConfigError; OSError where it is unknown."""
    if is_missing(target):
        return
    fd = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_kind(fd, target)
        if overlap(storage(fd), storage(disk._file.fd)):
            raise ConfigError(f"target {os.fspath(target)} is the disk itself")
    finally:
        os.close(fd)


def wanted_of(ready: Ready) -> Wanted:
    """The job's snapshot: of what it copies, and no more."""
    scope = ready.bitmap if ready.decision.sync in (Sync.INCREMENTAL, Sync.BITMAP) else None
    return Wanted(ready.disk, ready.options.snapshot_options(scope), freeze=ready.bitmap)


def making(ready: Ready, taken: Taken, created: float) -> Making:
    """What the job works with from T0 on."""
    options, decision = ready.options, ready.decision
    rest = None
    if decision.sync == Sync.BITMAP and options.mode == BitmapMode.ALWAYS and ready.bitmap is not None:
        rest = DirtyBitmap(ready.disk.size, UNIT)
        rest.merge(ready.bitmap)
    return Making(
        options=options,
        sync=decision.sync,
        reason=decision.reason,
        snapshot=taken.snapshot,
        freeze=taken.freeze,
        plan=make_plan(ready, taken.snapshot),
        output=ready.output,
        rest=rest,
        facts=None if ready.output is None else manifest_facts(ready, created),
        clean_up=ready.clean_up,
    )


def make_plan(ready: Ready, snapshot: Snapshot) -> Plan | None:
    """None for sync none. A span is a snapshot's cluster at least, so that it can be given up when it is read."""
    chunk = max(ready.options.chunk_size, ready.options.cluster_size)
    if ready.decision.sync == Sync.NONE:
        return None
    if ready.decision.sync == Sync.FULL or ready.bitmap is None:
        return plan_all(snapshot, chunk)
    return plan_dirty(snapshot, ready.bitmap, chunk)


def manifest_facts(ready: Ready, created: float) -> BackupFacts:
    """The job's part of the manifest; ``created``: T0, in seconds since the epoch."""
    disk, sync, bitmap = ready.disk, ready.decision.sync, ready.bitmap
    assert sync != Sync.NONE
    return BackupFacts(
        id=ready.job_id,
        created=iso_time(created),
        source=Source(path=os.path.abspath(disk.path), identity=ready.identity),
        sync=cast(Literal["full", "incremental", "bitmap"], sync.value),
        bitmap=None
        if bitmap is None
        else BitmapUse(name=bitmap.name, since=bitmap.since, granularity=bitmap.granularity),
    )
