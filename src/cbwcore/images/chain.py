"""A backup with its parents, down to the full one: found, opened and checked.

Each image must have its manifest, belong to it, and name the parent that its manifest names, by file and by id.
Whatever does not fit is a StateError that names the file."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cbwcore._cbwcore import zero_units
from cbwcore.errors import StateError
from cbwcore.files import closed_on_error, lock
from cbwcore.images.digest import UNIT, ContentDigest, Piece, records
from cbwcore.images.fileio import named
from cbwcore.images.kinds import ABSENT, DATA, PIECE, WINDOW, ZERO, ImageReader, Run, runs
from cbwcore.images.manifest import Manifest, manifest_path, read_manifest
from cbwcore.images.qcow2 import Header, virtual_size
from cbwcore.images.qcow2_reader import Qcow2Reader
from cbwcore.images.raw_reader import RawReader
from cbwcore.images.workers import work_through

__all__ = ["NOBODY", "Chain", "Member", "ancestors", "check_stored", "open_chain"]

Path = str | os.PathLike[str]
Told = Callable[[int], object]
NOBODY = 0xFFFF  # no image of a chain stores it: zeroes


class Member(NamedTuple):
    """One image of a chain; ``path`` is its own, no link."""

    path: str
    manifest: Manifest
    fd: int
    reader: ImageReader
    header: Header | None


class Chain:
    """The images of a backup, itself first, its full backup last. A context manager that closes them."""

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.size = members[0].manifest.size

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for member in self.members:
            os.close(member.fd)

    @property
    def complete(self) -> bool:
        """Whether it ends with a full backup."""
        return not self.members[-1].manifest.layered

    def check_complete(self) -> None:
        """StateError where it does not end with a full backup."""
        last = self.members[-1]
        if not self.complete:
            what = last.manifest.sync
            raise StateError(
                f"{last.path} is a backup of sync {what} without a parent: the rest of the disk is missing"
            )

    def check_content(self, told: Told = lambda nbytes: None) -> None:
        """Read all of it and compare the digests, parents first; ``told(bytes)`` of each piece. StateError, OSError."""
        for member in reversed(self.members):
            check_digest(member, told)

    def windows(self) -> list[int]:
        """The windows in which any of them stores anything, in order. OSError."""
        return sorted({window for member in self.members for window in member.reader.windows()})

    def owners(self, window: int) -> NDArray[np.uint16]:
        """For each cluster of a window the index of the member whose data it is, or `NOBODY`. StateError, OSError."""
        count = -(-(min((window + 1) * WINDOW, self.size) - window * WINDOW) // UNIT)
        owners = np.full(count, NOBODY, np.uint16)
        open_yet = np.ones(count, bool)
        for index, member in enumerate(self.members):
            kinds = member.reader.kinds(window)
            owners[open_yet & (kinds == DATA)] = index
            open_yet &= kinds == ABSENT
        return owners

    def data_runs(self) -> Iterator[Run]:
        """What is stored, in order, in pieces; each has the index of its member."""
        for window in self.windows():
            for run in runs(self.owners(window), window * WINDOW, self.size):
                if run.value != NOBODY:
                    yield from pieces_of(run)

    def read_into(self, view: memoryview, run: Run) -> None:
        """Read one of `data_runs`."""
        self.members[run.value].reader.read_into(view, run.offset)


def pieces_of(run: Run) -> Iterator[Run]:
    """A run in pieces that one buffer takes."""
    for start in range(0, run.length, PIECE):
        yield Run(run.offset + start, min(PIECE, run.length - start), run.value)


def content_digest(member: Member, told: Told) -> str:
    """The digest of what an image stores, read back. StateError, OSError."""
    layered = member.manifest.layered
    size = member.manifest.size
    digest = ContentDigest(size, layered=layered)

    def pieces() -> Iterator[tuple[Piece, bool]]:
        for window in member.reader.windows():
            for run in runs(member.reader.kinds(window), window * WINDOW, size):
                if run.value == DATA:
                    for part in pieces_of(run):
                        yield digest.begin(part.offset, part.length), True
                elif run.value == ZERO and layered:
                    yield digest.begin(run.offset, run.length), False

    def work(piece_and_data: tuple[Piece, bool], buffer: memoryview) -> None:
        piece, is_data = piece_and_data
        if not is_data:
            digest.put_zeroes(piece)
            return
        view = buffer[: piece.length]
        member.reader.read_into(view, piece.offset)
        zeroes = bytes(-(-piece.length // UNIT)) if layered else zero_units(view, UNIT)
        digest.put(piece, records(piece.offset, view, zeroes, layered))
        told(piece.length)

    work_through(pieces(), work)
    return digest.hexdigest()


def open_chain(image: Path, manifest: Path | None = None) -> Chain:
    """Open a backup and its parents; ``manifest``: where its own is, if not beside it. StateError, OSError."""
    members: list[Member] = []
    with contextlib.ExitStack() as undo:
        path = os.path.realpath(os.fsdecode(image))
        found = read_manifest(path, manifest)
        while True:
            member = open_member(path, found)
            undo.callback(os.close, member.fd)
            members.append(member)
            parent = found.parent
            check_link(member)
            if parent is None:
                break
            above, path = path, os.path.realpath(os.path.join(os.path.dirname(path), parent.file))
            found = read_parent(above, path, parent.id)
            if found.id in [m.manifest.id for m in members]:
                raise StateError(f"{path}, the parent of {above}, is a part of the chain above it already")
            if found.size != member.manifest.size:
                raise StateError(
                    f"{path}, the parent of {above}, is of a disk of {found.size} bytes, not {member.manifest.size}"
                )
        undo.pop_all()
    return Chain(members)


def read_parent(above: str, path: str, wanted: str) -> Manifest:
    """The manifest of the parent of ``above``, which must be the backup ``wanted``. StateError."""
    if is_missing(path):
        raise StateError(f"{path}, the parent of {above} (backup {wanted}), is missing")
    if is_missing(manifest_path(path)):
        raise StateError(f"{path}, the parent of {above} (backup {wanted}), is no finished backup: it has no manifest")
    found = read_manifest(path)
    if found.id != wanted:
        raise StateError(f"{path} is not the parent of {above}: that is backup {wanted}, and this is {found.id}")
    return found


def is_missing(path: str) -> bool:
    """Whether there is nothing at ``path``; OSError where that cannot be told."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def ancestors(image: str) -> list[str]:
    """The files of a backup and of its parents, manifests too, as far as those tell; nothing is opened or checked."""
    found: list[str] = []
    path = os.path.realpath(image)
    while path not in found:
        found += [path, manifest_path(path)]
        try:
            parent = read_manifest(path).parent
        except (StateError, OSError):
            break
        if parent is None:
            break
        path = os.path.realpath(os.path.join(os.path.dirname(path), parent.file))
    return found


def open_member(path: str, manifest: Manifest) -> Member:
    """Open one image; its header and size must be those of its manifest. StateError, OSError."""
    if is_missing(path):
        raise StateError(f"{path} is missing: only its manifest is there")
    with named(path), closed_on_error(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as fd:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise StateError(f"{path} is neither a regular file nor a block device")
        if not lock(fd, exclusive=False):
            raise StateError(f"{path} is in use: another process writes to it")
        return member_of(fd, path, manifest)


def member_of(fd: int, path: str, manifest: Manifest) -> Member:
    """The image that is open as ``fd``; its header and size must be those of its manifest. StateError, OSError."""
    has = os.lseek(fd, 0, os.SEEK_END)
    if has < manifest.image.bytes or (has > manifest.image.bytes and stat.S_ISREG(os.fstat(fd).st_mode)):
        raise StateError(f"{path} is {has} bytes, and had {manifest.image.bytes} when it was written")
    if manifest.image.format == "raw":
        if manifest.image.bytes != manifest.size:
            raise StateError(f"the manifest of {path} is damaged: {manifest.image.bytes} bytes of {manifest.size}")
        return Member(path, manifest, fd, RawReader(fd, path, manifest.size), None)
    reader = Qcow2Reader(fd, path)
    if reader.header.backup_id != manifest.id:
        raise StateError(f"{path} is backup {reader.header.backup_id}, and its manifest is of {manifest.id}")
    if reader.size != virtual_size(manifest.size):
        raise StateError(f"{path} is of a disk of {reader.size} bytes, and its manifest of {manifest.size}")
    return Member(path, manifest, fd, reader, reader.header)


def check_stored(fd: int, path: str, manifest: Manifest) -> None:
    """Read back what was just written, from the storage as far as the system can be told to forget it, and compare the
    digests; for `Output.finish`. StateError, OSError."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    check_digest(member_of(fd, path, manifest))


def check_digest(member: Member, told: Told = lambda nbytes: None) -> None:
    """Read all that an image stores and compare the digests; ``told(bytes)`` of each piece. StateError, OSError."""
    found = content_digest(member, told)
    if found != member.manifest.sha256:
        raise StateError(
            f"{member.path} is damaged: what it stores has the digest {found}, and had {member.manifest.sha256} when "
            "it was written"
        )


def check_link(member: Member) -> None:
    """Image and manifest must name one parent, or none. StateError."""
    parent, header = member.manifest.parent, member.header
    recorded = None if header is None else header.backing
    wanted = None if parent is None else os.fsencode(parent.file)
    if recorded != wanted:
        names = [None if name is None else os.fsdecode(name) for name in (recorded, wanted)]
        raise StateError(f"{member.path} has the backing file {names[0]}, and its manifest names {names[1]}")
    if parent is not None and not member.manifest.layered:
        raise StateError(f"the manifest of {member.path} is damaged: a full backup with a parent")
