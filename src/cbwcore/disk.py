"""The disk: the guest's requests, and the snapshots and bitmaps on it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

from cbwcore._cbwcore import DiskCore
from cbwcore.backup.group import backup_group
from cbwcore.backup.job import BackupJob
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.disk_bitmaps import Bitmaps
from cbwcore.engines import choose_engine
from cbwcore.extents import Extent, check_bitmap, check_range, walk
from cbwcore.files import open_disk
from cbwcore.forked import forked
from cbwcore.policy import OnCbwError, SnapshotState
from cbwcore.snapshot import Snapshot, snapshot_group
from cbwcore.stats import DiskStats

__all__ = ["Disk"]

logger = logging.getLogger(__name__)


class Disk(DiskCore):
    """A disk in use by its guest: a file or block device. Thread-safe, a context manager, the GIL released in all I/O.

    ``direct``: O_DIRECT; any offset, length and memory still work (R13). ``io``: "auto", "psync" or "io_uring".
    The disk is locked: for this object alone, or, where ``read_only``, against writers. OSError, ConfigError.

    ``bitmaps``: the file of its persistent bitmaps, by default ``path`` with ``.cbw-bitmaps`` appended, and none for a
    block device. Where it is there its bitmaps are loaded, and record again; where it is damaged or of another disk,
    ``disk.bitmaps.problem`` says so. StateError where another process or disk has it."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        direct: bool = False,
        io: str = "auto",
        read_only: bool = False,
        bitmaps: str | os.PathLike[str] | None = None,
    ) -> None:
        self._check_new()
        self.direct = direct
        self.read_only = read_only
        self._io = io
        self.io, why = choose_engine(io, direct=direct)
        # Guards the taking of snapshots and the bitmaps' lists; taken before any lock of the core.
        self._admin = threading.RLock()
        self._closing = False  # set once, before _admin is taken to close
        self._snapshots: dict[Snapshot, None] = {}
        self._jobs: dict[BackupJob, None] = {}  # those that are not concluded
        self.bitmaps = Bitmaps(self)
        self._file = open_disk(path, direct=direct, read_only=read_only)
        self._attach(os.fsdecode(path), *self._file, read_only, self.io == "io_uring")
        forked.add(self)
        try:
            self.bitmaps._load(bitmaps)
        except BaseException:
            self._close()
            raise
        if direct and io == "auto" and self.io == "psync":
            logger.info("disk %s: I/O by psync: %s", self.path, why)

    def __repr__(self) -> str:
        return f"<Disk {self.path} {'closed' if self.closed else f'{self.size} bytes'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots that are armed or broken, oldest first."""
        return tuple(s for s in tuple(self._snapshots) if s.state != SnapshotState.CLOSED)

    def snapshot(
        self,
        target: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        bitmap: Any = None,
        on_cbw_error: str = OnCbwError.BREAK_GUEST_WRITE,
        cbw_timeout: float = 0.0,
        cluster_size: int = 65536,
        target_limit: int | None = None,
        on_break: Callable[[Snapshot], object] | None = None,
    ) -> Snapshot:
        """Take a snapshot. T0 is a moment during this call; guest writes pause until those in flight are done (R10).

        ``target``: a file or block device for the old data, at least as large as the disk; created sparse if it does
        not exist; None for an unnamed file beside the disk. ``bitmap``: the scope, a `DirtyBitmap`, the name of one of
        ``disk.bitmaps``, or a bitarray or NumPy bool array with a bit per cluster. ``cbw_timeout``: seconds, 0 for
        none. ``cluster_size``, ``target_limit``: bytes. ``on_break(snapshot)`` is called once after a break: in the
        thread of a guest write that met it, when that write is done, or of close().

        ConfigError: something was refused, and nothing was opened, created or changed."""
        return snapshot_group(
            [(self, target)],
            name=name,
            bitmap=bitmap,
            on_cbw_error=on_cbw_error,
            cbw_timeout=cbw_timeout,
            cluster_size=cluster_size,
            target_limit=target_limit,
            on_break=on_break,
        )[0]

    def backup(
        self,
        target: str | os.PathLike[str] | None,
        *,
        progress: Callable[[BackupJob], object] | None = None,
        sync: str = "full",
        bitmap: str | None = None,
        bitmap_mode: str | None = None,
        format: str | None = None,
        compress: str | None = None,
        backing: str | os.PathLike[str] | None = None,
        fallback: str | None = None,
        overwrite: bool = False,
        verify: bool = False,
        manifest: str | os.PathLike[str] | None = None,
        speed: int = 0,
        workers: int = 2,
        chunk_size: int = 1 << 20,
        on_source_error: str = "report",
        on_target_error: str = "report",
        name: str | None = None,
        fleece: str | os.PathLike[str] | None = None,
        fleece_limit: int | None = None,
        cluster_size: int = 65536,
        on_cbw_error: str = OnCbwError.BREAK_GUEST_WRITE,
        cbw_timeout: float = 0.0,
    ) -> BackupJob:
        """Start a backup of the disk as it is at T0, a moment during this call (QMP blockdev-backup).

        The options are those of `BackupOptions`, which says what they mean and which go together; ``progress(job)`` is
        called from the job's threads, now and then. ConfigError: something was refused, and nothing was opened, created
        or changed; OSError where the target cannot be made."""
        return backup_group(
            [(self, target)],
            progress=progress,
            sync=sync,
            bitmap=bitmap,
            bitmap_mode=bitmap_mode,
            format=format,
            compress=compress,
            backing=backing,
            fallback=fallback,
            overwrite=overwrite,
            verify=verify,
            manifest=manifest,
            speed=speed,
            workers=workers,
            chunk_size=chunk_size,
            on_source_error=on_source_error,
            on_target_error=on_target_error,
            name=name,
            fleece=fleece,
            fleece_limit=fleece_limit,
            cluster_size=cluster_size,
            on_cbw_error=on_cbw_error,
            cbw_timeout=cbw_timeout,
        )[0]

    def block_status(
        self, offset: int = 0, length: int | None = None, *, bitmap: DirtyBitmap | None = None
    ) -> Iterator[Extent]:
        """The extents of a range (bytes; default all) as the file system tells of them, lazily.

        With ``bitmap``, split by its bits. ConfigError, OSError, ValueError after close."""
        end = check_range(offset, length, self.size)
        check_bitmap(bitmap, self.size)
        return walk(self._extent_at, offset, end, bitmap)

    def _extent_at(self, offset: int, end: int) -> Extent:
        stop, hole = self._extent(offset, end)
        return Extent(offset, stop - offset, not hole, hole)

    def stats(self) -> DiskStats:
        """What the guest did since the disk was opened."""
        writes, written, reads, read = self._counters()
        return DiskStats(
            guest_writes=writes,
            guest_write_bytes=written,
            guest_reads=reads,
            guest_read_bytes=read,
            snapshots=len(self.snapshots),
        )

    def close(self) -> None:
        """Cancel the backup jobs, close the snapshots, let requests under way finish, close the disk, then its bitmaps.
        Again does nothing.

        It does not flush, unless there are persistent bitmaps, which are clean only if the disk is safe. All of it
        happens, whatever fails; then the error is raised: OSError of a close, or of the flush."""
        if self._forked():
            return
        self._closing = True
        for job in tuple(self._jobs):
            job.cancel()
            job.join()
        with contextlib.ExitStack() as afterwards, self._admin, contextlib.ExitStack() as steps:  # backwards
            steps.push(self._close_bitmaps)  # not before: what guests write up to then is recorded
            steps.callback(self._close)
            for snapshot in tuple(self._snapshots):  # those that another thread is closing, too: it is waited for
                afterwards.callback(snapshot._tell_break)  # without _admin, which its callback may wait for
                steps.callback(snapshot._shut)

    def _close_bitmaps(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bitmaps._close(clean=kind is None)

    def __del__(self) -> None:
        if not self.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=1, source=self)

    def _check_forked(self) -> None:
        if self._forked():
            raise ValueError(f"disk {self.path} was opened before a fork and is not usable in the child")

    def _check_open(self) -> None:
        self._check_forked()
        if self._closing or self.closed:
            raise ValueError(f"disk {self.path} is closed")

    def _report_breaks(self) -> None:
        """Called by the core after a guest write that met a break."""
        with contextlib.ExitStack() as all_of_them:
            for snapshot in tuple(self._snapshots):
                all_of_them.callback(snapshot._tell_break)
