"""The bitmaps of a disk: those in memory, and those in its bitmap file, which it opens and closes with the disk."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cbwcore.bitmap_store import BitmapStore, UnusableError, create_store, default_path, open_store
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import ConfigError, StateError
from cbwcore.options import check_name

if TYPE_CHECKING:
    from cbwcore.disk import Disk

__all__ = ["Bitmaps"]

logger = logging.getLogger(__name__)


class Bitmaps(Mapping[str, DirtyBitmap]):
    """A disk's bitmaps by name. Persistent ones are in one file, and come with the disk whenever it is opened."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._by_name: dict[str, DirtyBitmap] = {}
        self._path: str | None = None
        self._store: BitmapStore | None = None  # None: there is no file yet, or it cannot be used
        self._problem: str | None = None
        self._ending: list[DirtyBitmap] = []  # successors that record on, because the file still names them

    def __getitem__(self, name: str) -> DirtyBitmap:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._by_name))

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def path(self) -> str | None:
        """The file of the persistent bitmaps, whether it is there or not; None where there is no place for one."""
        return self._path

    @property
    def problem(self) -> str | None:
        """Why the file as a whole cannot be used, or not any more; None while it can. See `reset`."""
        store = self._store
        if store is not None and store.failed is not None:
            return f"{store.path} is not written any more: {store.failed}"
        return self._problem

    def add(
        self, name: str, *, granularity: int = 65536, enabled: bool = True, persistent: bool = False
    ) -> DirtyBitmap:
        """Make a bitmap (QMP block-dirty-bitmap-add); ``persistent``: in the disk's bitmap file, which is made if need
        be.

        ConfigError for a name in use, for a granularity that is no power of two from 512 to 2**31 bytes, where there is
        no place for the file or the disk is open read-only; StateError where the file cannot be used; OSError, such as
        ENOSPC. Then all is as it was."""
        return self._add(name, granularity, enabled=enabled, persistent=persistent)

    def _add(
        self, name: str, granularity: int, *, enabled: bool, persistent: bool, content: DirtyBitmap | None = None
    ) -> DirtyBitmap:
        """With ``content`` it has those bits when it comes to be: nobody ever finds it without them."""
        self._disk._check_open()
        with self._disk._admin:
            self._disk._check_open()
            if check_name(name) in self._by_name:
                raise ConfigError(f"disk {self._disk.path} has a bitmap {name!r} already")
            bitmap = DirtyBitmap(self._disk.size, granularity, name=name)
            bitmap._disk = self._disk
            with contextlib.ExitStack() as undo:
                if persistent:
                    self._make_persistent(bitmap, enabled, content, undo)
                elif content is not None:
                    bitmap._merge(content)
                if enabled:
                    bitmap._record(self._disk)
                undo.pop_all()
            self._by_name[name] = bitmap
            return bitmap

    def _make_persistent(
        self, bitmap: DirtyBitmap, enabled: bool, content: DirtyBitmap | None, undo: contextlib.ExitStack
    ) -> None:
        if self._disk.read_only:
            raise ConfigError(f"disk {self._disk.path} is open read-only, and gets no persistent bitmap")
        if self._store is None:
            path = self._file_path()
            if self._problem is not None:
                raise StateError(f"{self._problem}; reset() starts a new file")
            self._store = create_store(path, self._disk._file)
            undo.callback(self._forget_file)
        store = self._store
        store.add(bitmap, bitmap.name, enabled=enabled, content=content)
        bitmap._persistent = True
        undo.callback(self._take_out, bitmap)

    def _forget_file(self) -> None:
        store, self._store = self._store, None
        assert store is not None
        store.abandon()
        os.unlink(store.path)

    def _take_out(self, bitmap: DirtyBitmap) -> None:
        """Of the file: from here on its bits are in memory."""
        store = self._open_store()
        area = store.remove(bitmap.name)
        bitmap._record(None)
        bitmap._unmap_file()
        bitmap._persistent = False
        store.free(area)

    def remove(self, name: str) -> None:
        """Stop and forget a bitmap (QMP block-dirty-bitmap-remove), also an inconsistent one; of a persistent one the
        file does, too. KeyError where there is none of that name; ConfigError while a job has it."""
        self._disk._check_forked()
        with self._disk._admin:
            bitmap = self._by_name[name]
            if bitmap.inconsistent is None:
                bitmap._check_idle()
            elif self._disk.read_only:
                raise ConfigError(f"bitmap {name!r} is in a file, and disk {self._disk.path} is open read-only")
            if bitmap.persistent:
                self._take_out(bitmap)
            bitmap._record(None)
            bitmap._since = None
            bitmap._disk = None
            del self._by_name[name]

    def reset(self) -> None:
        """Forget all persistent bitmaps, and start a new file in place of one that cannot be used.

        ConfigError while a job has one of them, where there is no place for a file, or the disk is open read-only;
        OSError, StateError. Then all is as it was."""
        self._disk._check_open()
        with self._disk._admin:
            self._disk._check_open()
            if self._disk.read_only:
                raise ConfigError(f"disk {self._disk.path} is open read-only")
            gone = [bitmap for bitmap in self._by_name.values() if bitmap.persistent]
            for bitmap in gone:
                if bitmap.frozen:
                    bitmap._check_idle()
            before, self._store = self._store, create_store(self._file_path(), self._disk._file)
            self._problem = None
            for bitmap in [*gone, *self._ending]:
                bitmap._record(None)
                bitmap._unmap_file()
                bitmap._persistent = False
                bitmap._since = None
                bitmap._disk = None
            for bitmap in gone:
                del self._by_name[bitmap.name]
            self._ending.clear()
            if before is not None:
                before.abandon()

    def _is_enabled(self, bitmap: DirtyBitmap) -> bool:
        """Whether it records, or would if the disk were not open read-only."""
        if bitmap.persistent and self._store is not None:
            return self._store.entry(bitmap.name).enabled
        return bitmap.enabled

    def _file_path(self) -> str:
        if self._path is None:
            raise ConfigError(
                f"{self._disk.path} is a block device, there is no place beside it for persistent bitmaps: "
                "Disk(path, bitmaps=PATH) names one"
            )
        return self._path

    def _open_store(self) -> BitmapStore:
        if self._store is None:
            raise ValueError(f"the bitmap file of disk {self._disk.path} is closed")
        return self._store

    # ---- with the disk ----

    def _load(self, path: str | os.PathLike[str] | None) -> None:
        """Open the file, if there is one, and record what is to be recorded. OSError; StateError where it is in use."""
        disk = self._disk
        self._path = default_path(disk.path, disk._file) if path is None else os.path.abspath(os.fsdecode(path))
        if self._path is None:
            return
        try:
            store = open_store(self._path, disk._file, read_only=disk.read_only)
        except UnusableError as e:
            self._problem = str(e)
            logger.warning("disk %s: no persistent bitmap can be used: %s", disk.path, e)
            return
        if store is None:
            return
        try:
            for entry in store.entries:
                self._load_one(store, entry.name, entry.granularity)
            if not disk.read_only:
                store.begin_use()
                for entry in store.entries:
                    if entry.enabled and entry.inconsistent is None:
                        self._by_name[entry.name]._record(disk)
        except BaseException:
            store.abandon()
            raise
        self._store = store

    def _load_one(self, store: BitmapStore, name: str, granularity: int) -> None:
        bitmap = DirtyBitmap(self._disk.size, granularity, name=name)
        store.load(name, bitmap)
        bitmap._disk = self._disk
        bitmap._persistent = True
        bitmap._since = store.entry(name).since
        self._by_name[name] = bitmap
        if bitmap.inconsistent is not None:
            logger.warning("disk %s: bitmap %r is inconsistent: %s", self._disk.path, name, bitmap.inconsistent)

    def _close(self, *, clean: bool) -> None:
        """After the disk: no guest write comes any more. OSError."""
        with contextlib.ExitStack() as steps:
            for bitmap in self._ending:
                steps.callback(bitmap._unmap_file)
            for bitmap in [*self._by_name.values(), *self._ending]:
                steps.callback(bitmap._record, None)
            store, self._store = self._store, None
            if store is None:
                return
            persistent = {name: bitmap for name, bitmap in self._by_name.items() if bitmap.persistent}
            for bitmap in persistent.values():
                if bitmap._freeze is not None:  # its job has not ended: what QEMU calls a reclaim
                    bitmap._freeze._give_back()
            store.close(persistent, clean=clean)
