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

from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import ConfigError

if TYPE_CHECKING:
    from cbwcore.disk import Disk

__all__ = ["Freeze"]


class Freeze:
    """A bitmap of a disk's from before T0 until `commit`, `merge` or `release`, which each end it, once.

    Made under the disk's ``_admin``, as it is armed. A bitmap that does not record has no successor. ConfigError where
    another job has the bitmap."""

    def __init__(self, disk: Disk, bitmap: DirtyBitmap) -> None:
        if bitmap._disk is not disk:
            raise ConfigError(f"bitmap {bitmap.name!r} is none of disk {disk.path}")
        bitmap._check_idle()
        self.disk = disk
        self.bitmap = bitmap
        self.successor = DirtyBitmap(bitmap.size, bitmap.granularity, name=bitmap.name) if bitmap.enabled else None
        bitmap._freeze = self

    def starts(self) -> list[tuple[Disk, DirtyBitmap]]:
        """What is to record from T0 on, for `arm_snapshots`."""
        return [] if self.successor is None else [(self.disk, self.successor)]

    def stops(self) -> list[tuple[Disk, DirtyBitmap]]:
        """What is to record up to T0."""
        return [] if self.successor is None else [(self.disk, self.bitmap)]

    def release(self) -> None:
        """There was no T0: all is as it was."""
        self.bitmap._freeze = None

    def commit(self, since: str | None) -> None:
        """What the bitmap had at T0 is in the backup ``since``: have only what was written from then on."""
        with self._ending():
            self.bitmap._reset()
            self._take_over()
            self.bitmap.since = since

    def merge(self) -> None:
        """No backup has it: have all of it, and what was written from T0 on."""
        with self._ending():
            self._take_over()

    def replace(self, rest: DirtyBitmap) -> None:
        """A part of it is in a backup that did not become one (QEMU's bitmap-mode always): have ``rest``, and what was
        written from T0 on."""
        with self._ending():
            self.bitmap._reset()
            self.bitmap._merge(rest)
            self._take_over()
            self.bitmap.since = None

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        with self.disk._admin:
            if self.bitmap._freeze is not self:
                raise ConfigError(f"bitmap {self.bitmap.name!r} has left this job already")
            yield
            self.bitmap._freeze = None

    def _take_over(self) -> None:
        """Record again, and have what the successor has. For a moment both record, so that no write is missed."""
        if self.successor is None:
            return
        if not self.disk.closed:
            self.bitmap._record(self.disk)
        self.bitmap._merge(self.successor)
        self.successor._record(None)
