"""A file that is not there until it is complete: written as ``NAME.partial``, locked, then renamed to ``NAME``.

A writer that was killed leaves ``NAME.partial`` without a lock behind; the next one replaces it. Both names are in one
folder, which is held open, so that no symbolic link in the path can lead a later step elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat

from cbwcore.errors import ConfigError
from cbwcore.files import lock
from cbwcore.images.fileio import named

__all__ = ["PartialFile", "partial_name"]

SUFFIX = ".partial"
RENAME_NOREPLACE = 1  # <linux/fs.h>
TRIES = 100  # at a name that others take and give up all the time


def partial_name(path: str) -> str:
    """Where the file that is to be ``path`` is until then."""
    return path + SUFFIX


class PartialFile:
    """The file that is to be ``path``, open for reading and writing as ``fd``, of nobody but us (mode 0600).

    ``publish`` gives it its name; until then nothing at ``path`` is changed. ConfigError: there is a file already (and
    not ``overwrite``), or something that no rename may replace, or another writer. OSError."""

    def __init__(self, path: str, *, overwrite: bool) -> None:
        self.path = path
        self.overwrite = overwrite
        folder, self.name = os.path.split(path)
        if not self.name:
            raise ConfigError(f"{path!r} names no file")
        self._partial = partial_name(self.name)
        with named(folder or "."), contextlib.ExitStack() as undo:
            self._folder = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, self._folder)
            with named(path):
                self._check_target()
                self.fd = self._create()
            undo.pop_all()
        self._published = False

    def publish(self) -> None:
        """Give it its name, for good once `sync_folder` has returned. OSError, FileExistsError among them."""
        with named(self.path):
            if self.overwrite:
                self._check_target()
                os.rename(self._partial, self.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            else:
                self._rename_new()
        self._published = True

    def sync_folder(self) -> None:
        """Make the name durable, where the file system can. OSError."""
        with named(os.path.dirname(self.path) or "."):
            try:
                os.fsync(self._folder)
            except OSError as e:
                if e.errno != errno.EINVAL:  # that: it has no such thing
                    raise

    def withdraw(self) -> None:
        """Take the name back. What it replaced is gone. OSError."""
        if self._published:
            with named(self.path):
                os.rename(self.name, self._partial, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._published = False
            self.sync_folder()

    def discard(self, *, keep: bool = False) -> None:
        """Close it, and remove it or ``keep`` it as NAME.partial. OSError."""
        try:
            self.withdraw()
            if not keep:
                with named(self.path), contextlib.suppress(FileNotFoundError):
                    os.unlink(self._partial, dir_fd=self._folder)
        finally:
            self.close()

    def close(self) -> None:
        """Give the descriptors, and with them the lock, back. OSError; both are given back all the same."""
        try:
            os.close(self.fd)
        finally:
            os.close(self._folder)

    def _check_target(self) -> None:
        """Only a regular file, and only if it may be, is replaced: never a link, whatever it leads to."""
        try:
            mode = os.lstat(self.name, dir_fd=self._folder).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISLNK(mode):
            raise ConfigError(f"{self.path} is a symbolic link: name the file that is meant")
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{self.path} is there already, and is no regular file")
        if not self.overwrite:
            raise ConfigError(f"{self.path} is there already; it is replaced only where that is asked for")

    def _create(self) -> int:
        """A new file under the partial name, locked. An unlocked leftover goes first."""
        for _ in range(TRIES):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                fd = os.open(self._partial, flags, 0o600, dir_fd=self._folder)
            except FileExistsError:
                self._remove_leftover()
                continue
            # Between its making and its locking another writer may have taken it for a leftover.
            if lock(fd, exclusive=True) and self._is_partial(fd):
                return fd
            os.close(fd)
        raise ConfigError(f"{self.path} is in use: other writers come and go there")

    def _remove_leftover(self) -> None:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(self._partial, flags, dir_fd=self._folder)
        except FileNotFoundError:
            return
        except OSError as e:
            if e.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise ConfigError(f"{self.path}{SUFFIX} is in the way, and is no regular file") from e
            raise
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{self.path}{SUFFIX} is in the way, and is no regular file")
            if not lock(fd, exclusive=True):
                raise ConfigError(f"{self.path} is in use: another writer has {self.name}{SUFFIX} locked")
            if self._is_partial(fd):
                os.unlink(self._partial, dir_fd=self._folder)
        finally:
            os.close(fd)

    def _is_partial(self, fd: int) -> bool:
        """Whether the partial name is that of the open file."""
        try:
            there = os.lstat(self._partial, dir_fd=self._folder)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(fd))

    def _rename_new(self) -> None:
        """Rename, but not over a file that has come meanwhile."""
        names = os.fsencode(self._partial), os.fsencode(self.name)
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # musl has it since 1.2.5
        if rename is not None:
            if not rename(self._folder, names[0], self._folder, names[1], RENAME_NOREPLACE):
                return
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOSYS):  # those: this file system does not know the flag
                raise OSError(code, os.strerror(code))
        self._check_target()
        os.rename(self._partial, self.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
