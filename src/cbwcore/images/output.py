"""Where a backup goes: one interface over the formats, and what makes a backup complete.

`open_output` checks everything that can be checked and creates ``NAME.partial`` beside ``NAME``, locked. The job
announces pieces in order (`begin`) and stores them, from any number of threads, in any order (`write`, `write_zeroes`).
`finish` then

1. writes the format's metadata and makes all durable, but for what an image cannot be without (a qcow2 file's header,
   a device's first 64 KiB),
2. writes the manifest as ``NAME.cbw.json.partial``, durably,
3. writes what was held back, durably,
4. gives the manifest and then the image their names, and makes those durable.

Whatever fails before the end of 4, and whenever the process dies before the image has its name, there is no backup: a
failure takes the names back."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from typing import Literal, Protocol, Self

from cbwcore.errors import ConfigError
from cbwcore.images.chain import ancestors
from cbwcore.images.digest import UNIT, ContentDigest, Piece, records
from cbwcore.images.fileio import named, sync, write_all
from cbwcore.images.manifest import (
    BackupFacts,
    Image,
    Manifest,
    Parent,
    encode_manifest,
    manifest_path,
    read_manifest,
)
from cbwcore.images.partial import PartialFile
from cbwcore.images.qcow2_writer import Qcow2Writer, backing_name
from cbwcore.images.raw_output import RawDevice, RawFile
from cbwcore.images.target import check_apart, is_device_at, open_device

__all__ = ["Output", "Store", "open_output"]

Path = str | os.PathLike[str]
Format = Literal["raw", "qcow2"]
Compression = Literal["zstd"]
Check = Callable[[int, str, Manifest], object]


class Store(Protocol):
    """A format: takes pieces from any thread; ``settle`` and ``seal`` when those below are done."""

    def begin(self, piece: Piece) -> None:
        """A piece was announced."""

    def write(self, piece: Piece, view: memoryview, zeroes: bytes) -> None:
        """Store a piece; after an error it may come again."""

    def write_zeroes(self, piece: Piece) -> None:
        """Store a piece of zeroes."""

    def settle(self, offset: int) -> None:
        """All pieces below ``offset`` are stored."""

    def seal(self, backup_id: str) -> int:
        """Write all but what makes it complete, durably; the bytes of the image."""

    def complete(self) -> None:
        """Write the rest, durably."""

    def spoil(self) -> None:
        """Take back what ``complete`` wrote."""


class Output:
    """A backup that is being written; `open_output` makes it.

    ``begin`` is called in order of offset; ``write`` and ``write_zeroes`` may be called from any number of threads at
    once and release the GIL while they hash, compress and write. ``finish`` and ``abort`` are called by one thread,
    when no other call is under way. A context manager: left without ``finish``, it aborts.

    ``cluster_size``: pieces begin at multiples of it and end there or at the disk's end (bytes). ``layered``: a part of
    the disk only, whose zeroes are stored, too. ``is_device``: it has no file of its own. ``data_bytes``,
    ``zero_bytes``: bytes stored so far as data, and told so far as zeroes."""

    cluster_size = UNIT

    def __init__(
        self,
        path: str,
        size: int,
        image: Image,
        store: Store,
        fd: int,
        *,
        file: PartialFile | None,
        sidecar: PartialFile | None,
        parent: Parent | None,
        layered: bool,
    ) -> None:
        self.path = path
        self.size = size
        self.format = image.format
        self.layered = layered
        self.parent = parent
        self.is_device = file is None
        self.data_bytes = 0
        self.zero_bytes = 0
        self._image = image
        self._store = store
        self._fd = fd
        self._file = file
        self._sidecar = sidecar
        self._digest = ContentDigest(size, layered=layered)
        self._lock = threading.Lock()  # of the two figures
        self._beginning = threading.Lock()  # the store hears of pieces in their order, too
        self._completed = False
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()

    def begin(self, offset: int, length: int) -> Piece:
        """Announce a piece, in order of offset, before it is dispatched. What no piece covers is not stored.

        ConfigError."""
        with self._beginning:
            piece = self._digest.begin(offset, length)
            self._store.begin(piece)
        return piece

    def write(self, piece: Piece, view: memoryview, zeroes: bytes) -> None:
        """Store the bytes of a piece. ``zeroes``: ``zero_units(view, 65536)``. Zero clusters are stored as such where
        ``layered``, else left out. OSError: nothing of it counts, and the same piece may be written again."""
        view = view if view.format == "B" and view.ndim == 1 else view.cast("B")
        if len(view) != piece.length or len(zeroes) != -(-piece.length // UNIT):
            raise ConfigError(f"{len(view)} bytes in {len(zeroes)} clusters are not {piece!r}")
        self._digest.check(piece)
        found = records(piece.offset, view, zeroes, self.layered)
        with named(self.path):
            self._store.settle(self._digest.settled)
            self._store.write(piece, view, zeroes)
        self._digest.put(piece, found)
        self._count(piece.length, self._zero_bytes(piece, zeroes))

    def write_zeroes(self, piece: Piece) -> None:
        """The same for a piece that is known to be zeroes."""
        self._digest.check(piece)
        with named(self.path):
            self._store.settle(self._digest.settled)
            self._store.write_zeroes(piece)
        self._digest.put_zeroes(piece)
        self._count(piece.length, piece.length)

    def finish(self, facts: BackupFacts, *, check: Check | None = None) -> Manifest:
        """Make it a backup; its manifest. Once. OSError, ConfigError: it is none, and `abort` is left to be called.

        ``check(fd, path, manifest)`` is called when all is written, before the image has its name; what it raises is
        raised."""
        if self._ended:
            raise ConfigError(f"{self.path} is finished or given up already")
        if (facts.sync != "full") != self.layered:
            raise ConfigError(f"a backup of sync {facts.sync} is {'not ' if facts.sync == 'full' else ''}layered")
        digest = self._digest.hexdigest()
        with named(self.path):
            nbytes = self._store.seal(facts.id)
        manifest = self._manifest(facts, nbytes, digest)
        try:
            self._write_manifest(manifest)
            self._completed = True
            with named(self.path):
                self._store.complete()
            if check is not None:
                check(self._fd, self.path, manifest)
            self._publish()
        except BaseException:
            self._withdraw()
            raise
        self._ended = True
        self._close()
        return manifest

    def abort(self, *, keep: bool = False) -> None:
        """Give it up: the partial is removed, or stays with ``keep``, without a lock. OSError.

        After `finish`, or again, it does nothing."""
        if self._ended:
            return
        self._ended = True
        with contextlib.ExitStack() as steps:  # all of them, backwards, whatever fails
            if self._file is None:
                steps.callback(os.close, self._fd)
            else:
                steps.callback(self._file.discard, keep=keep)
            if self._sidecar is not None:
                steps.callback(self._sidecar.discard)
            if self._completed:
                self._completed = False
                steps.callback(self._store.spoil)

    def _count(self, length: int, zero: int) -> None:
        with self._lock:
            self.data_bytes += length - zero
            self.zero_bytes += zero

    def _zero_bytes(self, piece: Piece, zeroes: bytes) -> int:
        count = zeroes.count(1)
        short = -piece.length % UNIT if count and zeroes[-1] else 0
        return count * UNIT - short

    def _manifest(self, facts: BackupFacts, nbytes: int, digest: str) -> Manifest:
        import cbwcore  # not above: it imports this module

        image = Image(
            file=self._image.file,
            format=self._image.format,
            cluster_size=self._image.cluster_size,
            compression=self._image.compression,
            bytes=nbytes,
        )
        return Manifest(
            id=facts.id,
            created=facts.created,
            source=facts.source,
            size=self.size,
            image=image,
            sync=facts.sync,
            bitmap=facts.bitmap,
            parent=self.parent,
            data_bytes=self.data_bytes,
            zero_bytes=self.zero_bytes if self.layered else self.size - self.data_bytes,
            sha256=digest,
            cbwcore=cbwcore.__version__,
        )

    def _write_manifest(self, manifest: Manifest) -> None:
        if self._sidecar is not None:
            with named(self._sidecar.path):
                write_all(self._sidecar.fd, memoryview(encode_manifest(manifest)), 0)
                sync(self._sidecar.fd)

    def _publish(self) -> None:
        """The image's name comes last: from then on there is a backup. Both are in one folder."""
        files = [file for file in (self._sidecar, self._file) if file is not None]
        for file in files:
            file.publish()
        if files:
            files[-1].sync_folder()

    def _withdraw(self) -> None:
        """Take the names back at once; errors here come after one that is being told."""
        for file in (self._file, self._sidecar):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.withdraw()

    def _close(self) -> None:
        """It is a backup, durably; no close can change that any more."""
        for file in (self._file, self._sidecar):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        if self._file is None:
            with contextlib.suppress(OSError):
                os.close(self._fd)


def open_output(
    path: Path,
    *,
    size: int,
    format: Format,
    backing: Path | None = None,
    compress: Compression | None = None,
    layered: bool = False,
    overwrite: bool = False,
    manifest: Path | None = None,
    apart: Iterable[Path] = (),
) -> Output:
    """Begin a backup of a disk of ``size`` bytes at ``path``: a file that is to be, or a block device (raw only).

    ``backing``: the parent backup, which must have its manifest. ``compress``: "zstd", for qcow2. ``layered``: a part
    of the disk only. ``overwrite``: a file at ``path`` is replaced, in the end. ``manifest``: where a device's goes,
    which has none otherwise. ``apart``: files and devices that it must not be: the disk, the fleecing target.

    ConfigError, StateError (the parent), OSError: nothing was changed. A device is changed from here on."""
    name = os.fsdecode(path)
    is_device = is_device_at(name)
    _check_options(name, size, format, compress, layered, backing, is_device)
    if manifest is not None and not is_device:
        raise ConfigError(f"{name} is a file: its manifest lies beside it, and nowhere else")
    parent = None if backing is None else _parent(name, size, os.fsdecode(backing))
    check_apart(name, [*apart, *([] if backing is None else ancestors(os.fsdecode(backing)))])
    image = Image(file=os.path.basename(name), format=format, cluster_size=UNIT, compression=compress, bytes=0)
    with contextlib.ExitStack() as undo:
        sidecar_path = manifest_path(name) if not is_device else None if manifest is None else os.fsdecode(manifest)
        file = sidecar = None
        if is_device:
            fd = open_device(name, size)
            undo.callback(os.close, fd)
        else:
            file = PartialFile(name, overwrite=overwrite)
            undo.callback(file.discard)
            fd = file.fd
        if sidecar_path is not None:
            sidecar = PartialFile(sidecar_path, overwrite=overwrite or not is_device)
            undo.callback(sidecar.discard)
        with named(name):
            store = _store(fd, size, format, compress, layered, parent, backing, is_device)
        output = Output(name, size, image, store, fd, file=file, sidecar=sidecar, parent=parent, layered=layered)
        undo.pop_all()
    return output


def _store(
    fd: int,
    size: int,
    format: Format,
    compress: Compression | None,
    layered: bool,
    parent: Parent | None,
    backing: Path | None,
    is_device: bool,
) -> Store:
    if format == "raw":
        return RawDevice(fd, size) if is_device else RawFile(fd, size)
    backing_format = None if backing is None else read_manifest(backing).image.format
    recorded = None if parent is None else os.fsencode(parent.file)
    return Qcow2Writer(fd, size, compress=compress, layered=layered, backing=recorded, backing_format=backing_format)


def _check_options(
    name: str,
    size: int,
    format: str,
    compress: str | None,
    layered: bool,
    backing: Path | None,
    is_device: bool,
) -> None:
    if format not in ("raw", "qcow2"):
        raise ConfigError(f"format {format!r} is none of raw, qcow2")
    if compress not in (None, "zstd"):
        raise ConfigError(f"compress {compress!r} is none of zstd, None")
    if size < 0:
        raise ConfigError(f"size {size} is negative")
    if format == "raw" and (compress or layered or backing is not None):
        what = "compressed" if compress else "layered on a parent"
        raise ConfigError(f"a raw image cannot be {what}: use qcow2")
    if is_device and format != "raw":
        raise ConfigError(f"{name} is a block device: the format there is raw")
    if backing is not None and not layered:
        raise ConfigError("a backup with a backing file is layered")


def _parent(name: str, size: int, backing: str) -> Parent:
    found = read_manifest(backing)
    if found.size != size:
        raise ConfigError(f"parent {backing} is of a disk of {found.size} bytes, and this one has {size}")
    return Parent(id=found.id, file=os.fsdecode(backing_name(name, backing)))
