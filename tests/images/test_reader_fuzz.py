"""Damaged images: a clear StateError, or the very same data; never another exception, endless work or much memory."""

import json
import os
import struct
import time
import tracemalloc

import pytest
from images_support import UNIT, backup, facts, layout, qemu_img

import cbwcore
from cbwcore import StateError
from cbwcore.images.output import open_output
from cbwcore.images.qcow2 import COMPRESSED, COPIED, HEADER, L2_SPAN

SIZE = 12 * UNIT + 100


@pytest.fixture(params=[None, "zstd"])
def image(request, place, rng):
    """An image with a parent; and its bytes."""
    content = layout(rng, SIZE, data=0.8)
    backup(place / "full", content, format="raw")
    backup(place / "inc", content, dirty=range(0, 12), backing=place / "full", compress=request.param)
    return place / "inc", (place / "inc").read_bytes()


def verify_changed(path, original, at, new):
    """Verify with the bytes ``new`` at ``at``; whether it was refused."""
    changed = original[:at] + new + original[at + len(new) :]
    path.write_bytes(changed[: len(original)])
    started = time.monotonic()
    tracemalloc.start()
    error = ""
    try:
        cbwcore.verify_backup(path)
    except StateError as e:
        error = str(e)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 32 << 20
    assert time.monotonic() - started < 5
    if error:
        assert str(path.parent) in error
        assert "\n" not in error
    return bool(error)


def test_every_byte_of_the_header(image):
    path, original = image
    assert not verify_changed(path, original, 0, b"")
    end = HEADER.size + 120
    accepted = [
        at
        for at in range(end)
        for flip in (0x01, 0x80, 0xFF)
        if not verify_changed(path, original, at, bytes([original[at] ^ flip]))
    ]
    # What may differ: where snapshots would be, features that all may ignore, where the refcounts are (we do not read
    # them), the padding, and extensions that are not ours.
    harmless = {*range(48, 60), *range(64, 72), *range(80, 96), *range(105, 112)}
    assert set(accepted) <= harmless | set(range(HEADER.size, end))


def table_at(original, kind):
    l1 = struct.unpack(">Q", original[40:48])[0]
    return l1 if kind == "l1" else struct.unpack(">Q", original[l1 : l1 + 8])[0] & ~COPIED


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_every_bit_of_a_table(image, kind):
    path, original = image
    start = table_at(original, kind)
    for entry in range(3 if kind == "l2" else 1):
        for bit in range(64):
            at = start + entry * 8 + 7 - bit // 8
            refused = verify_changed(path, original, at, bytes([original[at] ^ 1 << bit % 8]))
            assert refused, f"bit {bit} of {kind} entry {entry}"


HUGE = [0, 1, COPIED, COMPRESSED, COMPRESSED | 0xFF << 54, 2**64 - 1, COPIED | 1, COPIED | UNIT, COPIED | UNIT * 10**6]


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("value", HUGE, ids=hex)
def test_wild_entries(image, kind, value):
    path, original = image
    start = table_at(original, kind)
    new = struct.pack(">Q", value)
    if new == original[start : start + 8]:
        return
    assert verify_changed(path, original, start, new)


@pytest.mark.parametrize("at", [0, UNIT + 512, UNIT * 10**6, 2**55])
def test_tables_that_are_not_inside_the_file(image, at):
    path, original = image
    start = table_at(original, "l1")
    path.write_bytes(original[:start] + struct.pack(">Q", COPIED | at) + original[start + 8 :])
    with pytest.raises(StateError, match="a table at" if at % UNIT == 0 else "a table at|L1 entry"):
        cbwcore.verify_backup(path)
    path.write_bytes(original[:40] + struct.pack(">Q", at) + original[48:])
    with pytest.raises(StateError, match="table"):
        cbwcore.verify_backup(path)


def test_entries_beyond_the_disk(image):
    path, original = image
    start = table_at(original, "l2")
    assert verify_changed(path, original, start + 13 * 8, struct.pack(">Q", COPIED | UNIT))


def test_a_table_that_is_everywhere(place):
    """All L1 entries point to one L2 table: linear work, and refused."""
    size = 64 * L2_SPAN
    with open_output(place / "inc", size=size, format="qcow2") as out:
        out.write(out.begin(0, UNIT), memoryview(b"\1" * UNIT), b"\0")
        out.finish(facts())
    original = (place / "inc").read_bytes()
    l1 = table_at(original, "l1")
    assert verify_changed(place / "inc", original, l1, original[l1 : l1 + 8] * 64)


@pytest.mark.parametrize("fields", [{"size": 1 << 62, "l1_size": 1 << 31}, {"size": 1 << 45, "l1_size": 1 << 16}])
def test_huge_sizes_allocate_nothing(image, fields):
    path, original = image
    new = struct.pack(">QII", fields["size"], 0, fields["l1_size"])
    assert verify_changed(path, original, 24, new)


def test_random_damage(image, rng):
    path, original = image
    for _ in range(150):
        at = rng.randrange(len(original))
        length = rng.choice([1, 1, 4, 8, 64])
        verify_changed(path, original, at, rng.randbytes(length))


def test_any_truncation(image, rng):
    path, original = image
    for size in [0, 1, 4, 103, 104, 111, 112, 200, UNIT, *(rng.randrange(len(original)) for _ in range(20))]:
        path.write_bytes(original[:size])
        with pytest.raises(StateError, match="when it was written"):
            cbwcore.verify_backup(path)


def test_compressed_data(place, rng):
    """Damage inside compressed clusters is found, also in the frames' headers, but for their one unused bit."""
    content = layout(rng, SIZE, data=1).replace(b"\0", b"text")[:SIZE]
    backup(place / "inc", content, compress="zstd")
    original = (place / "inc").read_bytes()
    for at in range(UNIT, UNIT + 24):
        for flip in (1, 0x10, 0x80):
            refused = verify_changed(place / "inc", original, at, bytes([original[at] ^ flip]))
            assert refused or (at, flip) == (UNIT + 4, 0x10)
    for _ in range(100):
        at = rng.randrange(UNIT, UNIT + 1000)
        verify_changed(place / "inc", original, at, bytes([original[at] ^ 1 << rng.randrange(8)]))


def test_foreign_images_are_refused_by_what_they_have(place, rng):
    """Images of qemu-img beside a manifest of ours."""
    content = layout(rng, SIZE)
    backup(place / "inc", content)
    (place / "raw").write_bytes(content)
    manifest = (place / "inc.cbw.json").read_text()
    cases = {
        "": "no backup's id",
        "cluster_size=4k": r"clusters of 2\^12 bytes",
        "compat=0.10": "version 2",
        "extended_l2=on": "incompatible features 0x10",
        "refcount_bits=1": "refcount order 0",
        f"data_file={place}/data,data_file_raw=on": "incompatible features 0x4",
    }
    for options, why in cases.items():
        os.unlink(place / "inc")
        more = ["-o", options] if options else []
        qemu_img("convert", "-O", "qcow2", *more, place / "raw", place / "inc")
        size = os.path.getsize(place / "inc")
        fields = json.loads(manifest)
        fields["image"]["bytes"] = size
        (place / "inc.cbw.json").write_text(json.dumps(fields))
        with pytest.raises(StateError, match=why):
            cbwcore.verify_backup(place / "inc")
