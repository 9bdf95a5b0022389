"""The content digest: anybody can compute it from docs/backup.md, and pieces in any order give the same."""

import hashlib
import struct
import tracemalloc

import images_support
import pytest

from cbwcore import ConfigError
from cbwcore._cbwcore import zero_units
from cbwcore.images.digest import UNIT, ContentDigest, records


def by_the_book(content, stored=None):
    """The definition, as a third party would write it: ``stored``: the units of a layered backup."""
    whole = hashlib.sha256()
    for offset in range(0, len(content), 65536):
        unit = content[offset : offset + 65536]
        zero = not any(unit)
        if zero if stored is None else offset // 65536 not in stored:
            continue
        whole.update(struct.pack("<Q", offset) + (bytes(32) if zero else hashlib.sha256(unit).digest()))
    return whole.hexdigest()


@pytest.mark.parametrize("size", [0, 1, UNIT - 1, UNIT, UNIT + 1, 20 * UNIT + 77])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_full_backup_has_the_digest_of_the_definition(place, rng, size, format):
    content = images_support.layout(rng, size)
    made = images_support.backup(place / "full", content, format=format, rng=rng)
    assert made.sha256 == by_the_book(content)


@pytest.mark.parametrize("size", [1, UNIT + 1, 20 * UNIT + 77])
@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_layered_backup_has_the_digest_of_the_definition(place, rng, size, compress):
    content = images_support.layout(rng, size)
    images_support.backup(place / "full", content)
    new, dirty = images_support.changed(rng, content, share=0.7)
    made = images_support.backup(
        place / "inc", new, dirty=dirty, backing=place / "full", compress=compress, rng=rng, longest=3
    )
    assert made.sha256 == by_the_book(new, set(dirty))


def test_the_digest_does_not_depend_on_the_pieces(place, rng):
    content = images_support.layout(rng, 40 * UNIT + 5)
    found = {
        images_support.backup(place / f"{longest}", content, rng=rng, longest=longest, format="raw").sha256
        for longest in (1, 2, 7, 64)
    }
    assert found == {by_the_book(content)}


def test_zeroes_by_the_piece_are_zeroes_by_the_unit():
    size = 10_000 * UNIT + 1
    at_once = ContentDigest(size, layered=True)
    at_once.put_zeroes(at_once.begin(0, size))
    by_unit = hashlib.sha256()
    for offset in range(0, size, UNIT):
        by_unit.update(struct.pack("<Q", offset) + bytes(32))
    assert at_once.hexdigest() == by_unit.hexdigest()


def test_zeroes_take_no_memory_while_they_wait():
    size = 1 << 36
    digest = ContentDigest(size, layered=True)
    first = digest.begin(0, UNIT)
    rest = digest.begin(UNIT, size - UNIT)
    tracemalloc.start()
    try:
        digest.put_zeroes(rest)
        digest.put_zeroes(first)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_settled_is_the_first_piece_that_is_missing():
    digest = ContentDigest(10 * UNIT, layered=False)
    a, b, c = (digest.begin(i * UNIT, UNIT) for i in (0, 2, 3))
    assert digest.settled == 0
    digest.put(c, b"")
    assert digest.settled == 0
    digest.put(a, b"")
    assert digest.settled == 2 * UNIT
    digest.put(b, b"")
    assert digest.settled == 4 * UNIT


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (1, UNIT),
        (0, 0),
        (0, -UNIT),
        (-UNIT, UNIT),
        (3 * UNIT, 1),
        (3 * UNIT, UNIT),
        (0, UNIT),
        (UNIT, 1),
        (4 * UNIT, 1),
    ],
)
def test_pieces_that_are_refused(offset, length):
    digest = ContentDigest(3 * UNIT + 100, layered=False)
    digest.put(digest.begin(0, UNIT), b"")
    with pytest.raises(ConfigError, match="a piece at"):
        digest.begin(offset, length)
    digest.put(digest.begin(UNIT, 2 * UNIT + 100), b"")
    digest.hexdigest()


def test_a_piece_counts_once_and_all_must_come():
    digest = ContentDigest(UNIT, layered=True)
    piece = digest.begin(0, UNIT)
    with pytest.raises(ConfigError, match="is not stored"):
        digest.hexdigest()
    digest.put_zeroes(piece)
    with pytest.raises(ConfigError, match="stored already"):
        digest.put_zeroes(piece)


def test_threads(in_threads, rng):
    content = images_support.layout(rng, 64 * UNIT)
    view = memoryview(content)
    digest = ContentDigest(len(content), layered=False)
    pieces = [digest.begin(i * UNIT, UNIT) for i in range(64)]
    rng.shuffle(pieces)

    def put(some):
        for piece in some:
            part = view[piece.offset : piece.offset + UNIT]
            digest.put(piece, records(piece.offset, part, zero_units(part, UNIT), False))

    in_threads(*[lambda i=i: put(pieces[i::4]) for i in range(4)])
    assert digest.hexdigest() == by_the_book(content)
