"""Snapshots: taking them, reading them, their state."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from cbwcore._cbwcore import POLICIES, STATES, SnapshotCore, arm_snapshots
from cbwcore.bitmaps import DirtyBitmap, as_scope
from cbwcore.engines import choose_engine
from cbwcore.errors import ConfigError, CopyBeforeWriteError
from cbwcore.extents import Extent, check_bitmap, check_range, walk
from cbwcore.files import BlockFile, create_target, open_target
from cbwcore.forked import forked
from cbwcore.freeze import Freeze
from cbwcore.limits import limits
from cbwcore.options import BitmapRef, SnapshotOptions, check_cluster_size, check_policy, timeout_ns
from cbwcore.policy import OnCbwError, SnapshotState, tell_break
from cbwcore.reader import SnapshotFile
from cbwcore.stats import SnapshotStats

if TYPE_CHECKING:
    from cbwcore.disk import Disk

__all__ = ["Snapshot", "snapshot_group"]

NO_LIMIT = 2**63 - 1


class Snapshot(SnapshotCore):
    """A disk as it was at T0, readable from any thread until closed; made by `Disk.snapshot`. A context manager."""

    def __new__(cls, disk: Disk, options: SnapshotOptions, on_break: Callable[[Snapshot], object] | None) -> Self:  # noqa: D102
        return super().__new__(cls, disk, check_cluster_size(options.cluster_size), options.bitmap is not None)

    def __init__(self, disk: Disk, options: SnapshotOptions, on_break: Callable[[Snapshot], object] | None) -> None:
        self.disk = disk
        self.name = options.name or "snapshot"
        self.target = options.target
        self._on_break = on_break
        self._on_cbw_error = check_policy(options.on_cbw_error)
        self._cbw_timeout = options.cbw_timeout
        self._error: CopyBeforeWriteError | None = None
        self._closing = threading.RLock()

    def __repr__(self) -> str:
        return f"<Snapshot {self.name!r} of {self.disk.path}, {self.state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def state(self) -> SnapshotState:
        """Armed, broken or closed."""
        return SnapshotState(STATES[self._state()])

    @property
    def error(self) -> CopyBeforeWriteError | None:
        """The first cause of the break: errno, operation, offset, length (bytes), time; None while there is none."""
        if self._error is None:
            self._error = self._cause()
        return self._error

    @property
    def on_cbw_error(self) -> OnCbwError:
        """The policy; may be set while armed, and holds for the failures that come."""
        return self._on_cbw_error

    @on_cbw_error.setter
    def on_cbw_error(self, value: str) -> None:
        policy = check_policy(value)
        self._set_policy(POLICIES.index(policy))
        self._on_cbw_error = policy

    @property
    def cbw_timeout(self) -> float:
        """Seconds that one guest write may wait here in all (R8), 0 for no limit.

        May be set while armed, and holds for the guest writes that come."""
        return self._cbw_timeout

    @cbw_timeout.setter
    def cbw_timeout(self, value: float) -> None:
        self._set_timeout(timeout_ns(value))
        self._cbw_timeout = value

    def open(self) -> SnapshotFile:
        """The T0 data as a read-only raw file object."""
        self.pread(0, 0)
        return SnapshotFile(self)

    def block_status(
        self, offset: int = 0, length: int | None = None, *, bitmap: DirtyBitmap | None = None
    ) -> Iterator[Extent]:
        """The extents of a range (bytes; default all) as at T0, lazily.

        What is called zero reads as zeroes, whatever the guest does meanwhile (R20). With ``bitmap``, split by its
        bits. Raises as `pread`, but not outside the scope: such an extent has ``access`` False."""
        end = check_range(offset, length, self.size)
        check_bitmap(bitmap, self.size)
        return walk(self._extent_at, offset, end, bitmap)

    def _extent_at(self, offset: int, end: int) -> Extent:
        stop, access, zero = self._extent(offset, end)
        return Extent(offset, stop - offset, access and not zero, zero, None, access)

    def stats(self) -> SnapshotStats:
        """What the snapshot cost so far. ValueError after close."""
        return SnapshotStats(**self._counters())

    def close(self) -> None:
        """End the snapshot; again does nothing.

        Guest writes that wait for it go on, copies under way are waited for (R8), the target is closed, and stays
        where it is if it has a name. OSError where the target's close reports one."""
        try:
            self._shut()
        finally:
            self._tell_break()

    def _shut(self) -> None:
        if self.disk.closed:
            return  # and so is this; in the child of a fork, nothing is this process's to close
        self._error = self.error
        with self._closing:  # whoever else closes it, or the disk, waits here until it is done
            try:
                self._close()
            finally:
                self.disk._snapshots.pop(self, None)

    def __del__(self) -> None:
        if self.state != SnapshotState.CLOSED and not self.disk.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=1, source=self)

    def _target_path(self) -> str | None:
        return None if self.target is None else os.fspath(self.target)

    def _tell_break(self) -> None:
        """Once after a break, by whoever comes first: a guest write that met it, or close()."""
        if self._take_break():
            cause = self.error
            assert cause is not None
            tell_break(self, cause, self._on_break)


def _open_target(disk: Disk, path: str | os.PathLike[str] | None) -> tuple[BlockFile, bool]:
    """The target, and whether it is new, so that it reads as zeroes."""
    if path is not None and "\0" in os.fsdecode(path):
        raise ConfigError(f"target {os.fsdecode(path)!r} has a NUL in its name")
    if path is not None and os.path.exists(path):
        return open_target(path, disk._file, direct=disk.direct), False
    return create_target(path, disk._file, disk.path, direct=disk.direct), True


def _resolve_bitmap(disk: Disk, bitmap: Any, cluster_size: int) -> DirtyBitmap | None:
    if bitmap is None:
        return None
    if isinstance(bitmap, (BitmapRef, str)):
        name = bitmap if isinstance(bitmap, str) else bitmap.name
        if name not in disk.bitmaps:
            raise ConfigError(f"disk {disk.path} has no bitmap {name!r}")
        bitmap = disk.bitmaps[name]
    return as_scope(bitmap, disk.size, cluster_size)


def _prepare(
    disk: Disk,
    options: SnapshotOptions,
    on_break: Callable[[Snapshot], object] | None,
    undo: contextlib.ExitStack,
) -> Snapshot:
    """A snapshot with its target and scope, ready to be armed; ``undo`` takes all of it back."""
    disk._check_open()
    scope = _resolve_bitmap(disk, options.bitmap, options.cluster_size)
    snapshot = Snapshot(disk, options, on_break)
    target, is_new = _open_target(disk, options.target)
    if is_new and options.target is not None:
        undo.callback(os.unlink, options.target)
    if target.align > options.cluster_size or disk._file.align > options.cluster_size:
        block = max(target.align, disk._file.align)
        target.close()
        raise ConfigError(f"cluster_size {options.cluster_size} is less than a block, {block} bytes")
    undo.callback(snapshot._close)
    forked.add(snapshot)
    snapshot._attach(
        *target,
        choose_engine(disk._io, direct=target.align > 1)[0] == "io_uring",
        is_new,
        POLICIES.index(options.on_cbw_error),
        timeout_ns(options.cbw_timeout),
        NO_LIMIT if options.target_limit is None else options.target_limit,
        limits.copies,
        limits.copy_bytes,
    )
    if scope is not None:
        snapshot._begin_scope(scope.enabled)
        snapshot._add_scope(scope)
    return snapshot


class Wanted(NamedTuple):
    """A snapshot to be taken, and what becomes of bitmaps of the same disk at its T0.

    ``freeze``: a bitmap for a job, see `Freeze`. ``copies``: bitmaps of which copies are wanted, as they are at T0."""

    disk: Disk
    options: SnapshotOptions
    on_break: Callable[[Snapshot], object] | None = None
    freeze: DirtyBitmap | None = None
    copies: Sequence[DirtyBitmap] = ()


class Taken(NamedTuple):
    """A snapshot that was taken, and what was `Wanted` with it."""

    snapshot: Snapshot
    freeze: Freeze | None
    copies: list[DirtyBitmap]


def take_snapshots(wanted: Sequence[Wanted]) -> list[Taken]:
    """One T0 for all of it, or none is taken, no target is left behind and no bitmap is changed (R10)."""
    disks = {id(each.disk): each.disk for each in wanted}
    for disk in disks.values():
        disk._check_open()
    with contextlib.ExitStack() as locks:
        for key in sorted(disks):
            locks.enter_context(disks[key]._admin)
        with contextlib.ExitStack() as undo:
            taken = [_make_ready(each, undo) for each in wanted]
            for each in taken:
                undo.callback(each.snapshot.disk._snapshots.pop, each.snapshot, None)
                each.snapshot.disk._snapshots[each.snapshot] = (
                    None  # before T0: who meets a break must find whom to tell
                )
            freezes = [each.freeze for each in taken if each.freeze is not None]
            copies = [(each.snapshot.disk, copy) for each in taken for copy in each.copies]
            arm_snapshots(
                [each.snapshot for each in taken],
                [pair for freeze in freezes for pair in freeze.starts()],
                [pair for freeze in freezes for pair in freeze.stops()] + [c for c in copies if c[1].enabled],
            )
            undo.pop_all()
    return taken


def _make_ready(wanted: Wanted, undo: contextlib.ExitStack) -> Taken:
    snapshot = _prepare(wanted.disk, wanted.options, wanted.on_break, undo)
    freeze = None
    if wanted.freeze is not None:
        freeze = Freeze(wanted.disk, wanted.freeze)
        undo.callback(freeze.release)
    copies = []
    for bitmap in wanted.copies:
        bitmap._check_consistent()
        copy = DirtyBitmap(bitmap.size, bitmap.granularity, name=bitmap.name)
        if bitmap.enabled:  # from here on it gets what the bitmap gets, until T0
            copy._record(wanted.disk)
            undo.callback(copy._record, None)
        copy._merge(bitmap)
        copies.append(copy)
    return Taken(snapshot, freeze, copies)


def snapshot_group(
    pairs: Iterable[tuple[Disk, str | os.PathLike[str] | None]],
    *,
    name: str | None = None,
    bitmap: Any = None,
    on_cbw_error: str = OnCbwError.BREAK_GUEST_WRITE,
    cbw_timeout: float = 0.0,
    cluster_size: int = 65536,
    target_limit: int | None = None,
    on_break: Callable[[Snapshot], object] | None = None,
) -> list[Snapshot]:
    """One T0 for all the (disk, target) pairs, or none is taken and no target is left behind (R10).

    The options are `Disk.snapshot`'s and hold for each; the snapshots come in the order of the pairs."""
    pairs = list(pairs)
    for disk, _ in pairs:
        disk._check_open()
    wanted = [
        Wanted(
            disk,
            SnapshotOptions(
                target=target,
                name=name,
                bitmap=bitmap,
                on_cbw_error=check_policy(on_cbw_error),
                cbw_timeout=cbw_timeout,
                cluster_size=cluster_size,
                target_limit=target_limit,
            ),
            on_break,
        )
        for disk, target in pairs
    ]
    return [taken.snapshot for taken in take_snapshots(wanted)]
