"""The manifest: what is in it, names with any bytes, and that a damaged one is refused as what it is."""

import contextlib
import json
import os
import random

import images_support
import pytest

import cbwcore
from cbwcore import StateError
from cbwcore.images.manifest import (
    BitmapUse,
    Image,
    Manifest,
    Parent,
    Source,
    decode_manifest,
    encode_manifest,
    iso_time,
    manifest_path,
    read_manifest,
)

ID, PARENT_ID = "0123456789abcdef" * 2, "f" * 32


def a_manifest(**changes):
    fields = {
        "id": ID,
        "created": "2026-11-26T07:05:34.000001Z",
        "source": Source(path="/vm/disk.img", identity="disk 1"),
        "size": 1000,
        "image": Image(file="mon.qcow2", format="qcow2", cluster_size=65536, compression="zstd", bytes=327680),
        "sync": "incremental",
        "bitmap": BitmapUse(name="daily", since=PARENT_ID, granularity=65536),
        "parent": Parent(id=PARENT_ID, file="full.qcow2"),
        "data_bytes": 1000,
        "zero_bytes": 0,
        "sha256": "ab" * 32,
        "cbwcore": "0.1.0",
    }
    return Manifest(**(fields | changes))


def test_it_has_the_documented_fields():
    fields = json.loads(encode_manifest(a_manifest()))
    assert fields == {
        "format": "cbwcore-backup",
        "version": 1,
        "id": ID,
        "created": "2026-11-26T07:05:34.000001Z",
        "source": {"path": "/vm/disk.img", "identity": "disk 1"},
        "size": 1000,
        "image": {
            "file": "mon.qcow2",
            "format": "qcow2",
            "cluster_size": 65536,
            "compression": "zstd",
            "bytes": 327680,
        },
        "sync": "incremental",
        "bitmap": {"name": "daily", "since": PARENT_ID, "granularity": 65536},
        "parent": {"id": PARENT_ID, "file": "full.qcow2"},
        "data_bytes": 1000,
        "zero_bytes": 0,
        "sha256": "ab" * 32,
        "cbwcore": "0.1.0",
    }


def test_names_keep_their_bytes(place):
    name = os.fsdecode(b"caf\xc3\xa9 \xff\x80 \"'\n\\.img")
    manifest = a_manifest(
        source=Source(path=name, identity=name), parent=Parent(id=PARENT_ID, file=name), sync="incremental"
    )
    document = encode_manifest(manifest)
    assert document.isascii()
    assert decode_manifest(document, "it") == manifest
    image = place / name
    with open(manifest_path(image), "wb") as f:
        f.write(document)
    assert read_manifest(image) == manifest


def test_a_later_field_is_no_damage():
    fields = json.loads(encode_manifest(a_manifest())) | {"comment": "kept by somebody"}
    assert decode_manifest(json.dumps(fields).encode(), "it") == a_manifest()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "1970-01-01T00:00:00.000000Z"), (1795676734.5, "2026-11-26T07:05:34.500000Z")]
)
def test_times_are_utc_with_microseconds(seconds, text):
    assert iso_time(seconds) == text


CHANGES = {
    "size-negative": {"size": -1},
    "size-huge": {"size": 2**63},
    "size-float": {"size": 1.5},
    "size-text": {"size": "1000"},
    "no-size": {"size": ...},
    "id-short": {"id": "abc"},
    "id-case": {"id": "A" * 32},
    "sha-short": {"sha256": "ab"},
    "sync-unknown": {"sync": "weekly"},
    "format-unknown": {"image": {"file": "x", "format": "vmdk", "cluster_size": 1, "compression": None, "bytes": 0}},
    "image-null": {"image": None},
    "parent-empty-name": {"parent": {"id": PARENT_ID, "file": ""}},
    "parent-nul": {"parent": {"id": PARENT_ID, "file": "a\0b"}},
    "parent-no-bytes": {"parent": {"id": PARENT_ID, "file": "\ud800"}},
    "bitmap-granularity": {"bitmap": {"name": "b", "since": None, "granularity": 0}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_wrong_field_is_damage(change):
    fields = json.loads(encode_manifest(a_manifest())) | change
    fields = {name: value for name, value in fields.items() if value is not ...}
    with pytest.raises(StateError, match=r"^it is damaged"):
        decode_manifest(json.dumps(fields).encode(), "it")


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (b"", "no JSON document"),
        (b"{", "no JSON document"),
        (b"\xff\xfe{}", "no JSON document"),
        (b"[" * 200_000, "no JSON document"),
        (b"[]", "no manifest of a cbwcore backup"),
        (b'{"format": "other", "version": 1}', "no manifest of a cbwcore backup"),
        (b'{"format": "cbwcore-backup"}', "version None"),
        (b'{"format": "cbwcore-backup", "version": 2}', "version 2; this cbwcore reads 1"),
    ],
)
def test_what_is_no_manifest_is_refused(document, why):
    with pytest.raises(StateError, match=why) as e:
        decode_manifest(document, "it")
    assert "\n" not in str(e.value)


def test_flipped_bytes_are_a_manifest_or_a_state_error(rng: random.Random):
    document = encode_manifest(a_manifest())
    for _ in range(2000):
        changed = bytearray(document)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(StateError):
            assert isinstance(decode_manifest(bytes(changed), "it"), Manifest)


def test_a_missing_manifest_names_image_and_manifest(place):
    with pytest.raises(StateError, match=r"a\.img is no finished backup: its manifest .*a\.img\.cbw\.json is missing"):
        read_manifest(place / "a.img")


def test_a_manifest_that_cannot_be_one_is_not_read_whole(place):
    with open(manifest_path(place / "a.img"), "wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(StateError, match="larger than"):
        read_manifest(place / "a.img")


def test_a_fifo_does_not_hang(place):
    os.mkfifo(manifest_path(place / "a.img"))
    with pytest.raises(StateError):
        read_manifest(place / "a.img")


def test_what_a_backup_writes(place, rng):
    content = images_support.layout(rng, 10 * 65536 + 700)
    made = images_support.backup(place / "full", content, bitmap="daily", compress="zstd")
    assert read_manifest(place / "full") == made
    assert made.cbwcore == cbwcore.__version__
    assert made.size == len(content)
    assert made.image.bytes == os.path.getsize(place / "full")
    assert made.data_bytes + made.zero_bytes == len(content)
    assert made.bitmap.name == "daily"
    assert made.parent is None
    assert (os.stat(manifest_path(place / "full")).st_mode & 0o777) == 0o600
