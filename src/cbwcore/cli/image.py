"""Disk images for the demo: an ext4 file system, a seeded pattern, or a copy."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from cbwcore.disk import Disk
from cbwcore.errors import CbwError
from cbwcore.snapshot import Snapshot

__all__ = ["copy_out", "make_image", "naming", "sha256"]

CHUNK = 1 << 20
MOST_DATA = 96 << 20  # bytes that a made image holds; the rest of it is a hole
SBIN = "/usr/sbin:/sbin"  # where mkfs is, for users whose PATH leaves it out
FILE_SIZES = (700, 4096, 30_000, 65536, 300_000, 1 << 20, 4 << 20)


def make_image(path: Path, size: int, seed: int) -> str:
    """A new sparse image of ``size`` bytes, a third of it data; what it is, in words."""
    data = min(size // 3, MOST_DATA)
    with naming(path):
        files = make_ext4(path, size, data, seed)
        if files:
            return f"an ext4 file system with {files} files"
        make_pattern(path, size, data, seed)
    return "a seeded pattern"


def make_ext4(path: Path, size: int, data: int, seed: int) -> int:
    """Make a file system with ``data`` bytes in files; how many, or 0 where mkfs.ext4 is missing or cannot do it."""
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}{os.pathsep}{SBIN}")
    if mkfs is None:
        return 0
    tree = path.with_suffix(".tree")
    try:
        files = make_tree(tree, data, random.Random(seed))
        command = [mkfs, "-q", "-F", "-d", os.fspath(tree), os.fspath(path), f"{size // 1024}k"]
        made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    if made.returncode:
        path.unlink(missing_ok=True)
        return 0
    os.truncate(path, size)
    return files


def make_tree(tree: Path, data: int, rng: random.Random) -> int:
    """Files of mixed sizes, ``data`` bytes in all; how many."""
    tree.mkdir()
    files = 0
    while data > 0:
        n = min(rng.choice(FILE_SIZES), max(data // 4, FILE_SIZES[0]))
        directory = tree / f"dir{files % 8}"
        directory.mkdir(exist_ok=True)
        (directory / f"file{files}").write_bytes(rng.randbytes(n))
        files += 1
        data -= n
    return files


def make_pattern(path: Path, size: int, data: int, seed: int) -> None:
    """Chunks of seeded bytes, ``data`` in all or a little more, and holes between them."""
    rng = random.Random(seed)
    chunks = range(0, size, CHUNK)
    with open(path, "xb") as f:
        f.truncate(size)
        for offset in rng.sample(chunks, -(-data // CHUNK)):
            f.seek(offset)
            f.write(rng.randbytes(min(CHUNK, size - offset)))


def copy_out(source: Disk | Snapshot, path: Path, step: Callable[[int], object] | None = None) -> None:
    """Copy all of a disk or snapshot into the new file ``path``; what its block status calls zero becomes a hole.

    ``step`` is called after each chunk with the bytes that are done."""
    chunk = memoryview(bytearray(CHUNK))
    with naming(path), open(path, "xb") as f:
        f.truncate(source.size)
        for extent in source.block_status():
            end = extent.offset + extent.length
            for offset in range(extent.offset, end, CHUNK):
                part = chunk[: min(CHUNK, end - offset)]
                if not extent.zero:
                    source.pread_into(part, offset)
                    f.seek(offset)
                    f.write(part)
                if step is not None:
                    step(offset + len(part))


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with naming(path), open(path, "rb", buffering=0) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the errors of reads and writes, which name no file, the path."""
    try:
        yield
    except OSError as e:
        if e.filename is None and not isinstance(e, CbwError):
            e.filename = os.fspath(path)
        raise
