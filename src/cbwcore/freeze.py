"""The life of a bitmap in a job: frozen at T0, with a successor that records what the guest writes from then on.

=============  ===========================  ======================================  ==========================
               before T0                    from T0 to the end                      after
=============  ===========================  ======================================  ==========================
the bitmap     records                      stays as it was at T0                   records
the successor  is empty                     records                                 is gone
=============  ===========================  ======================================  ==========================

At the end the bitmap becomes what the successor has (`commit`: what it had is in a backup), or gets that in addition
(`merge`: nothing is lost). QEMU's names: bdrv_dirty_bitmap_create_successor, _abdicate, _reclaim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cbwcore import bitmap_file
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import ConfigError, StateError

if TYPE_CHECKING:
    from cbwcore.bitmap_store import BitmapStore
    from cbwcore.disk import Disk

__all__ = ["Freeze"]


class Freeze:
    """A bitmap of a disk's from before T0 until `commit`, `merge` or `release`, which each end it, once.

    Made under the disk's ``_admin``, as it is armed. A bitmap in memory that does not record has no successor; a
    persistent one has one in any case, as the file's word for what the job leaves. ConfigError where another job has
    the bitmap; StateError where it is inconsistent; OSError of its file."""

    def __init__(self, disk: Disk, bitmap: DirtyBitmap) -> None:
        if bitmap._disk is not disk:
            raise ConfigError(f"bitmap {bitmap.name!r} is none of disk {disk.path}")
        bitmap._check_idle()
        self.disk = disk
        self.bitmap = bitmap
        self._records = bitmap.enabled
        self.successor: DirtyBitmap | None = None
        if self._records or bitmap.persistent:
            self.successor = DirtyBitmap(bitmap.size, bitmap.granularity, name=bitmap.name)
        if self.successor is not None and bitmap.persistent:
            # Durable before T0. Whoever dies from here on, the bitmap gets what the successor has in addition.
            self._store.begin_job(bitmap.name, self.successor)
        bitmap._freeze = self

    @property
    def _store(self) -> BitmapStore:
        return self.disk.bitmaps._open_store()

    def starts(self) -> list[tuple[Disk, DirtyBitmap]]:
        """What is to record from T0 on, for `arm_snapshots`."""
        return [(self.disk, self.successor)] if self.successor is not None and self._records else []

    def stops(self) -> list[tuple[Disk, DirtyBitmap]]:
        """What is to record up to T0."""
        return [(self.disk, self.bitmap)] if self._records else []

    def release(self) -> None:
        """There was no T0: all is as it was."""
        self._drop_successor(self.bitmap.since)
        self.bitmap._freeze = None

    def commit(self, since: str | None) -> None:
        """What the bitmap had at T0 is in the backup ``since``: have only what was written from then on.

        Of a persistent bitmap it is durable on return. OSError, StateError where its file cannot say so, ValueError
        where the disk is closed; then nothing has changed, and `merge` is what is left."""
        with self._ending():
            self._settle(since)

    def merge(self) -> None:
        """No backup has it: have all of it, and what was written from T0 on."""
        with self._ending():
            self._take_over(self.bitmap.since)

    def replace(self, rest: DirtyBitmap) -> None:
        """A part of it is in a backup that did not become one (QEMU's bitmap-mode always): have ``rest``, and what was
        written from T0 on. Raises as `commit`."""
        with self._ending():
            if self.successor is not None:
                self.successor._merge(rest)
            self._settle(None)
            if self.successor is None:
                self.bitmap._merge(rest)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        with self.disk._admin:
            if self.bitmap._freeze is not self:
                raise ConfigError(f"bitmap {self.bitmap.name!r} has left this job already")
            yield
            self.bitmap._freeze = None

    def _settle(self, since: str | None) -> None:
        """Have what the successor has, alone."""
        if self.bitmap.persistent:
            # Before a bit is cleared. Whoever dies from here on, the bitmap becomes what the successor has.
            self._store.succeed_job(self.bitmap.name, since)
        bitmap_file.step("commit: reset")
        self.bitmap._reset()
        self._take_over(since)
        self.bitmap._since = since

    def _take_over(self, since: str | None) -> None:
        """Record again, and have what the successor has. For a moment both record, so that no write is missed."""
        if self._records and not self.disk.closed:
            self.bitmap._record(self.disk)
        bitmap_file.step("take over: merge")
        if self.successor is not None:
            self.bitmap._merge(self.successor)
        bitmap_file.step("take over: end")
        # The successor records until the file has forgotten it: up to then it is what whoever dies leaves.
        self._drop_successor(since)

    def _drop_successor(self, since: str | None) -> None:
        if self.successor is None:
            return
        if not self.bitmap.persistent or self.disk.bitmaps._store is None:
            self.successor._record(None)
            return
        try:
            area = self._store.end_job(self.bitmap.name, since)
        except (OSError, StateError):
            # The store has logged it, and writes no more: the file goes on to say "running", or "succeeded". So that
            # either is right until the disk is closed, the successor has all that the bitmap has, and records on.
            if self._records and not self.disk.closed:
                self.successor._record(self.disk)
            self.successor._merge(self.bitmap)
            self.disk.bitmaps._ending.append(self.successor)
            return
        self.successor._record(None)
        self.successor._unmap_file()
        self._store.free(area)

    def _give_back(self) -> None:
        """The disk is closed, and the job has not ended: as `merge`, but the file is told by whoever closes it."""
        if self.successor is not None:
            self.bitmap._merge(self.successor)
            self.successor._record(None)
            self.successor._unmap_file()
