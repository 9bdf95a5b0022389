"""Dirty bitmaps: a scan for runs beside a plain read of the same memory; search and set beside bitarray and NumPy."""

import random

import bitarray
import numpy as np
import pytest
from harness import plainly

import cbwcore

GRANULARITY = 65536
BITS = 1 << 28  # of 16 TiB: 32 MiB of map
SMALL = 1 << 24  # where the runs are many
RUNS = 20_000


def bitmap_of(bits):
    return cbwcore.DirtyBitmap(bits * GRANULARITY, GRANULARITY)


def consume(iterable):
    for _ in iterable:
        pass


def edges(bools):
    """Where the runs of a bool array begin and end."""
    return np.flatnonzero(bools[1:] != bools[:-1])


@pytest.fixture(scope="module")
def written():
    """All of it in memory, one dirty run in every MiB of the map."""
    bitmap = bitmap_of(BITS)
    bitmap._put(0, BITS, True)
    bitmap._put(0, BITS, False)
    for bit in range(12345, BITS, 8 << 20):
        bitmap._put(bit, bit + 100, True)
    return bitmap


@pytest.mark.parametrize("what", ["scan for dirty runs", "scan of a map never written", "count"])
def test_map(beside, floor, written, what):
    bitmap = bitmap_of(BITS) if what == "scan of a map never written" else written
    words, bits = bitmap.numpy().view(np.uint64), bitmap.bitarray()
    edge = bitarray.bitarray("01", "little")
    ours, peer_name, peer = {
        "scan for dirty runs": (
            lambda: consume(bitmap.ranges()),
            "bitarray.search",
            lambda: consume(bits.search(edge)),
        ),
        "scan of a map never written": (lambda: consume(bitmap.ranges()), "np.any", words.any),
        "count": (bitmap.count, "bitarray.count", bits.count),
    }[what]
    beside(
        f"{what}, 32 MiB of map (floor: plain read in C; peer: {peer_name})",
        ours=plainly(ours),
        floor=plainly(lambda: floor.read_words(words)),
        peer=plainly(peer),
        show=lambda seconds: f"{BITS / 8 / seconds / 1e9:.2g} GB/s",
        floor_max=1.25,
        rounds=20,
    )


@pytest.fixture(scope="module")
def runs():
    """(first, end) of short runs, in bits, none touching another."""
    rng = random.Random(7)
    starts = sorted(rng.sample(range(0, SMALL, 64), RUNS))
    return [(start, start + rng.randrange(1, 64)) for start in starts]


def test_search(beside, runs):
    bitmap = bitmap_of(SMALL)
    for first, end in runs:
        bitmap._put(first, end, True)
    bits, packed = bitmap.bitarray(), bitmap.numpy()

    def by_bitarray():
        end, found = 0, []
        while (start := bits.find(1, end)) >= 0:
            end = bits.find(0, start)
            found.append((start, end))
        return found

    assert by_bitarray() == runs
    assert [(start // GRANULARITY, length // GRANULARITY) for start, length in bitmap.ranges()] == [
        (first, end - first) for first, end in runs
    ]
    beside(
        f"search: each of {RUNS} runs in 2 MiB of map (floor: bitarray.find; peer: NumPy, unpacked)",
        ours=plainly(lambda: consume(bitmap.ranges())),
        floor=plainly(by_bitarray),
        peer=plainly(lambda: edges(np.unpackbits(packed, bitorder="little")).tolist()),
        ops=RUNS,
    )


def test_set(beside, runs):
    bitmap, bits, bools = bitmap_of(SMALL), bitarray.bitarray(SMALL), np.zeros(SMALL, dtype=bool)

    def by_slice(array):
        for first, end in runs:
            array[first:end] = True

    def by_range(set_range):
        for first, end in runs:
            set_range(first * GRANULARITY, (end - first) * GRANULARITY)

    def by_put(put):
        for first, end in runs:
            put(first, end, True)

    by_put(bitmap._put)
    beside(
        f"set: each of {RUNS} short runs (floor: bitarray slice; peer: NumPy slice of bools)",
        ours=plainly(lambda: by_range(bitmap.set_range)),
        floor=plainly(lambda: by_slice(bits)),
        peer=plainly(lambda: by_slice(bools)),
        ops=RUNS,
    )
