"""The manifest of a backup: a small JSON document beside the image (``NAME.cbw.json`` beside ``NAME``).

Without it an image is no backup of ours: it names the backup, its parent, and the digest of what it stores."""

from __future__ import annotations

import datetime
import json
import os
from typing import Annotated, Literal

import msgspec

from cbwcore.errors import StateError

__all__ = [
    "BackupFacts",
    "BitmapUse",
    "Image",
    "Manifest",
    "Parent",
    "Source",
    "decode_manifest",
    "encode_manifest",
    "iso_time",
    "manifest_path",
    "read_manifest",
]

SUFFIX = ".cbw.json"
FORMAT = "cbwcore-backup"
VERSION = 1
MAX_BYTES = 1 << 20  # of a manifest: many times what one takes
Path = str | os.PathLike[str]

Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Id = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """The disk that was backed up: its path, and what tells it from another disk at that path."""

    path: str
    identity: str


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """The image: its file's name (without folder), and the bytes of that file; of a device, the disk's."""

    file: str
    format: Literal["raw", "qcow2"]
    cluster_size: Annotated[int, msgspec.Meta(ge=512, le=1 << 30)]
    compression: Literal["zstd"] | None
    bytes: Bytes


class BitmapUse(msgspec.Struct, frozen=True, kw_only=True):
    """The bitmap that a backup was made by or starts: since which backup (its id) it recorded at T0; bytes per bit."""

    name: str
    since: Id | None
    granularity: Annotated[int, msgspec.Meta(ge=1)]


class Parent(msgspec.Struct, frozen=True, kw_only=True):
    """The backup below: its id, and its file's name as the image records it."""

    id: Id
    file: str


class BackupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What only the job knows of a backup: its part of the manifest.

    ``id``: uuid4 in hex. ``created``: T0, as `iso_time` writes it."""

    id: Id
    created: str
    source: Source
    sync: Literal["full", "incremental", "bitmap"]
    bitmap: BitmapUse | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A backup. ``size``: bytes of the disk, exactly; ``data_bytes``: bytes stored as data; ``zero_bytes``: bytes known
    to be zeroes (of a full backup: all others); ``sha256``: the content digest (`cbwcore.images.digest`)."""

    format: Literal["cbwcore-backup"] = "cbwcore-backup"
    version: Literal[1] = 1
    id: Id
    created: str
    source: Source
    size: Bytes
    image: Image
    sync: Literal["full", "incremental", "bitmap"]
    bitmap: BitmapUse | None
    parent: Parent | None
    data_bytes: Bytes
    zero_bytes: Bytes
    sha256: Sha256
    cbwcore: str

    @property
    def layered(self) -> bool:
        """Whether it stores a part of the disk only, zeroes included, and its parent has the rest."""
        return self.sync != "full"


def manifest_path(image: Path) -> str:
    """Where the manifest of the image file ``image`` lies."""
    return os.fspath(image) + SUFFIX


def iso_time(seconds: float) -> str:
    """A moment in seconds since the epoch as ISO 8601 in UTC with microseconds: 2026-11-26T07:05:34.000001Z."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def encode_manifest(manifest: Manifest) -> bytes:
    """The document, in ASCII: names that are no UTF-8 keep their bytes as Python's surrogate escapes."""
    return (json.dumps(msgspec.to_builtins(manifest), indent=2) + "\n").encode()


def decode_manifest(document: bytes, where: str) -> Manifest:
    """The manifest in ``document``; StateError, naming ``where``, if it is damaged or not one of ours."""
    try:
        fields = json.loads(document)
    except (ValueError, RecursionError) as e:
        raise StateError(f"{where} is damaged: it is no JSON document: {' '.join(str(e).split())}") from e
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise StateError(f"{where} is no manifest of a cbwcore backup")
    if fields.get("version") != VERSION:
        raise StateError(f"{where} is of version {str(fields.get('version'))[:20]}; this cbwcore reads {VERSION}")
    try:
        found = msgspec.convert(fields, Manifest)
    except msgspec.ValidationError as e:
        raise StateError(f"{where} is damaged: {e}") from e
    if found.parent is not None and not _is_name(found.parent.file):
        raise StateError(f"{where} is damaged: its parent has no file's name")
    return found


def _is_name(text: str) -> bool:
    """Whether a file can have that name."""
    try:
        name = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return len(name) > 0 and b"\0" not in name


def read_manifest(image: Path, manifest: Path | None = None) -> Manifest:
    """The manifest of ``image``: the one beside it, or the one at ``manifest``.

    StateError where it is missing, damaged or foreign; OSError where it cannot be read."""
    where = os.fspath(manifest) if manifest is not None else manifest_path(image)
    try:
        with open(where, "rb", opener=_open_at_once) as f:
            document = f.read(MAX_BYTES + 1) or b""  # None: of a pipe that has nothing yet
    except (FileNotFoundError, NotADirectoryError) as e:
        raise StateError(f"{os.fspath(image)} is no finished backup: its manifest {where} is missing") from e
    if len(document) > MAX_BYTES:
        raise StateError(f"{where} is no manifest of a cbwcore backup: it is larger than {MAX_BYTES} bytes")
    return decode_manifest(document, where)


def _open_at_once(path: str, flags: int) -> int:
    """A pipe, too, which `open` would wait for."""
    return os.open(path, flags | os.O_NONBLOCK)
