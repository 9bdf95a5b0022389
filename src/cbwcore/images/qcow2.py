"""The layout of the qcow2 images that cbwcore writes and reads (QEMU's docs/interop/qcow2).

Version 3, clusters of 64 KiB, 16 bit reference counts, no snapshots, no encryption; zstd compression (incompatible
feature 3) where asked for. The backup's id is in a header extension of our own, which others ignore and keep. All
numbers are big endian."""

from __future__ import annotations

import struct
from typing import NamedTuple

from cbwcore.errors import StateError

__all__ = [
    "CLUSTER",
    "COMPRESSED",
    "COPIED",
    "ENTRY_OFFSET",
    "L2_ENTRIES",
    "L2_SPAN",
    "MAX_SIZE",
    "REFCOUNTS",
    "ZERO",
    "Header",
    "compressed_entry",
    "compressed_range",
    "decode_header",
    "encode_header",
    "l1_entries",
    "virtual_size",
]

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
L2_ENTRIES = CLUSTER // 8
L2_SPAN = L2_ENTRIES * CLUSTER  # bytes of the disk that one L2 table is for: 512 MiB
REFCOUNTS = CLUSTER // 2  # host clusters that one refcount block is for
MAX_SIZE = (32 << 20) // 8 * L2_SPAN  # QEMU's limit: an L1 table of 32 MiB
SECTOR = 512  # QEMU's: virtual sizes, and compressed clusters, are counted in them

ZERO = 1  # of an L2 entry: reads as zeroes
COPIED = 1 << 63  # of an L1 or L2 entry: the refcount is exactly one
COMPRESSED = 1 << 62
ENTRY_OFFSET = 0x00FF_FFFF_FFFF_FE00  # bits 9-55
SECTORS_SHIFT = 62 - (CLUSTER_BITS - 8)  # of a compressed cluster's entry: above it the sectors, below it the offset

MAGIC = b"QFI\xfb"
VERSION = 3
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7x")
FEATURE_ZSTD = 1 << 3
ZSTD = 1  # compression_type
EXTENSION = struct.Struct(">II")
END, BACKING_FORMAT = 0, 0xE2792ACA
BACKUP_ID = 0x43425769  # "CBWi", ours
MAX_NAME = 1023  # bytes of a backing file's name


class Header(NamedTuple):
    """What the first cluster says. ``size``: virtual, bytes; offsets into the file; names as bytes, None for none."""

    size: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    zstd: bool
    backing: bytes | None
    backing_format: str | None
    backup_id: str


def virtual_size(size: int) -> int:
    """The virtual size of an image of a disk of ``size`` bytes: QEMU would round others down."""
    return -(-size // SECTOR) * SECTOR


def l1_entries(size: int) -> int:
    """Entries of the L1 table for ``size`` bytes."""
    return -(-size // L2_SPAN)


def compressed_entry(offset: int, length: int) -> int:
    """The L2 entry of a cluster whose ``length`` compressed bytes are at ``offset`` of the file."""
    more_sectors = (offset + length - 1) // SECTOR - offset // SECTOR
    return COMPRESSED | more_sectors << SECTORS_SHIFT | offset


def compressed_range(entry: int) -> tuple[int, int]:
    """(offset, bytes up to the end of the last sector) of the compressed cluster of an L2 entry."""
    offset = entry & ((1 << SECTORS_SHIFT) - 1)
    more_sectors = (entry & (COMPRESSED - 1)) >> SECTORS_SHIFT
    return offset, (more_sectors + 1) * SECTOR - offset % SECTOR


def encode_header(header: Header) -> bytes:
    """The header cluster up to its last used byte."""
    extensions = b""
    if header.backing_format is not None:
        extensions += _extension(BACKING_FORMAT, header.backing_format.encode())
    extensions += _extension(BACKUP_ID, header.backup_id.encode()) + EXTENSION.pack(END, 0)
    name_offset = HEADER.size + len(extensions) if header.backing is not None else 0
    fixed = HEADER.pack(
        MAGIC,
        VERSION,
        name_offset,
        len(header.backing or b""),
        CLUSTER_BITS,
        header.size,
        0,  # crypt_method
        header.l1_size,
        header.l1_offset,
        header.refcount_offset,
        header.refcount_clusters,
        0,  # snapshots
        0,
        FEATURE_ZSTD if header.zstd else 0,
        0,  # compatible features
        0,  # autoclear features
        4,  # refcount_order: 16 bits
        HEADER.size,
        ZSTD if header.zstd else 0,
    )
    return fixed + extensions + (header.backing or b"")


def decode_header(cluster: bytes, where: str) -> Header:
    """The header in an image's first ``cluster``; StateError, naming ``where`` and what is foreign or damaged."""
    if len(cluster) < HEADER.size or cluster[:4] != MAGIC:
        raise StateError(f"{where} is no qcow2 image")
    fields = HEADER.unpack_from(cluster)
    version, name_offset, name_size, cluster_bits, size, crypt, l1_size, l1_offset = fields[1:9]
    refcount_offset, refcount_clusters, snapshots, _, incompatible = fields[9:14]
    refcount_order, header_length, compression = fields[16:]
    foreign = {
        f"version {version}": version != VERSION,
        f"clusters of 2^{cluster_bits} bytes": cluster_bits != CLUSTER_BITS,
        f"encryption method {crypt}": crypt != 0,
        f"{snapshots} internal snapshots": snapshots != 0,
        f"incompatible features {incompatible:#x}": incompatible & ~FEATURE_ZSTD != 0,
        f"compression type {compression}": compression != (ZSTD if incompatible & FEATURE_ZSTD else 0),
        f"refcount order {refcount_order}": refcount_order != 4,
        f"a header of {header_length} bytes": header_length != HEADER.size,
    }
    for what, is_so in foreign.items():
        if is_so:
            raise StateError(f"{where} has {what}, which cbwcore does not write")
    if size % SECTOR or size > MAX_SIZE or l1_size != l1_entries(size):
        raise StateError(f"{where} is damaged: an L1 table of {l1_size} entries for {size} bytes")
    if l1_offset % CLUSTER or refcount_offset % CLUSTER or refcount_clusters > (8 << 20) // CLUSTER:
        raise StateError(f"{where} is damaged: its tables are at {l1_offset} and {refcount_offset}")
    extensions = _decode_extensions(cluster, where)
    backup_id = extensions.get(BACKUP_ID)
    if backup_id is None:
        raise StateError(f"{where} was not written by cbwcore: it has no backup's id")
    backing = None
    if name_offset:
        if not 0 < name_size <= MAX_NAME or not HEADER.size <= name_offset <= len(cluster) - name_size:
            raise StateError(f"{where} is damaged: its backing file's name is {name_size} bytes at {name_offset}")
        backing = cluster[name_offset : name_offset + name_size]
    backing_format = extensions.get(BACKING_FORMAT)
    return Header(
        size,
        l1_size,
        l1_offset,
        refcount_offset,
        refcount_clusters,
        bool(incompatible & FEATURE_ZSTD),
        backing,
        None if backing_format is None else backing_format.decode("ascii", "replace"),
        backup_id.decode("ascii", "replace"),
    )


def _extension(kind: int, data: bytes) -> bytes:
    return EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)


def _decode_extensions(cluster: bytes, where: str) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    position = HEADER.size
    while position + EXTENSION.size <= len(cluster):
        kind, length = EXTENSION.unpack_from(cluster, position)
        position += EXTENSION.size
        if kind == END:
            return found
        if length > len(cluster) - position:
            break
        found[kind] = cluster[position : position + length]
        position += length + -length % 8
    raise StateError(f"{where} is damaged: its header extensions do not end")
