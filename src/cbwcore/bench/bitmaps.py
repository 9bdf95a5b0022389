"""Dirty bitmaps: a scan for runs beside a plain read of the same memory; search and set beside bitarray and NumPy."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator

import bitarray
import numpy as np

from cbwcore._cbwcore import read_words
from cbwcore.bench.loads import nanoseconds
from cbwcore.bench.results import Bound, Figures, Row, compared
from cbwcore.bench.rounds import plainly, ratio
from cbwcore.bench.setting import BenchError, Item, Section, Setting
from cbwcore.bitmaps import DirtyBitmap

__all__ = ["BITMAP"]

GRANULARITY = 65536
BITS = 1 << 28  # of 16 TiB: 32 MiB of map
SMALL = 1 << 24  # where the runs are many
RUNS = 20_000
NEVER_WRITTEN = "scan of a map never written"


def bitmap_of(bits: int) -> DirtyBitmap:
    """Of a disk that has so many."""
    return DirtyBitmap(bits * GRANULARITY, GRANULARITY)


def consume(iterable: Iterable[object]) -> None:
    """To its end."""
    for _ in iterable:
        pass


def written_map(bits: int) -> DirtyBitmap:
    """All of it in memory, one dirty run in every MiB of the map."""
    bitmap = bitmap_of(bits)
    bitmap._put(0, bits, True)
    bitmap._put(0, bits, False)
    for bit in range(12345, bits, 8 << 20):
        bitmap._put(bit, bit + 100, True)
    return bitmap


def whole_map(setting: Setting, what: str) -> Iterator[Row]:
    """In GB/s of map."""
    bits = setting.fewer(BITS, BITS // 8)
    bitmap = bitmap_of(bits) if what == NEVER_WRITTEN else written_map(bits)
    words, raw = bitmap.numpy().view(np.uint64), bitmap.bitarray()
    edge = bitarray.bitarray("01", "little")
    kinds: dict[str, tuple[str, Callable[[], object], Callable[[], object]]] = {
        "scan for dirty runs": (
            "bitarray.search",
            lambda: consume(bitmap.ranges()),
            lambda: consume(raw.search(edge)),
        ),
        NEVER_WRITTEN: ("np.any", lambda: consume(bitmap.ranges()), words.any),
        "count": ("bitarray.count", bitmap.count, raw.count),
    }
    peer_name, ours, peer = kinds[what]
    cases = {
        "floor": plainly(lambda: nanoseconds(read_words(words)[0])),
        "peer": plainly(peer),
        "cbwcore": plainly(ours),
    }
    seconds = setting.seconds(cases, rounds=setting.fewer(20, 5))
    over = ratio(seconds["cbwcore"], seconds["floor"])
    figures = [Figures(tuple(bits / 8 / value for value in seconds[who]), "speed") for who in ("cbwcore", *cases)]
    yield Row(
        case=f"{what}, {bits >> 23} MiB of map (floor: plain read in C; peer: {peer_name})",
        ours=figures[0],
        floor=figures[1],
        over_floor=over,
        peer=figures[2],
        over_peer=ratio(seconds["cbwcore"], seconds["peer"]),
        bounds=(Bound(over, 1.25, "≤ 1.25 × floor"),),
    )


def short_runs() -> list[tuple[int, int]]:
    """(first, end) of short runs, in bits, none touching another."""
    rng = random.Random(7)
    starts = sorted(rng.sample(range(0, SMALL, 64), RUNS))
    return [(start, start + rng.randrange(1, 64)) for start in starts]


def search(setting: Setting) -> Iterator[Row]:
    """For all runs."""
    runs, bitmap = short_runs(), bitmap_of(SMALL)
    for first, end in runs:
        bitmap._put(first, end, True)
    bits, packed = bitmap.bitarray(), bitmap.numpy()

    def by_bitarray() -> list[tuple[int, int]]:
        end, found = 0, []
        while (start := bits.find(1, end)) >= 0:
            end = bits.find(0, start)
            found.append((start, end))
        return found

    def by_numpy() -> object:
        bools = np.unpackbits(packed, bitorder="little")
        return np.flatnonzero(bools[1:] != bools[:-1]).tolist()

    ours = [(start // GRANULARITY, (start + length) // GRANULARITY) for start, length in bitmap.ranges()]
    if not ours == by_bitarray() == runs:
        raise BenchError("the searches do not agree")
    cases = {
        "floor": plainly(by_bitarray),
        "peer": plainly(by_numpy),
        "cbwcore": plainly(lambda: consume(bitmap.ranges())),
    }
    name = f"search: each of {RUNS} runs in 2 MiB of map (floor: bitarray.find; peer: NumPy, unpacked)"
    yield compared(name, setting.seconds(cases, ops=RUNS))


def put(setting: Setting) -> Iterator[Row]:
    """Short runs."""
    runs = short_runs()
    bitmap, bits, bools = bitmap_of(SMALL), bitarray.bitarray(SMALL), np.zeros(SMALL, dtype=bool)

    def by_slice(array: bitarray.bitarray | np.ndarray) -> None:
        for first, end in runs:
            array[first:end] = True

    def by_range() -> None:
        set_range = bitmap.set_range
        for first, end in runs:
            set_range(first * GRANULARITY, (end - first) * GRANULARITY)

    cases = {
        "floor": plainly(lambda: by_slice(bits)),
        "peer": plainly(lambda: by_slice(bools)),
        "cbwcore": plainly(by_range),
    }
    name = f"set: each of {RUNS} short runs (floor: bitarray slice; peer: NumPy slice of bools)"
    yield compared(name, setting.seconds(cases, ops=RUNS))


BITMAP = Section(
    "bitmap",
    "Dirty bitmaps",
    ("client: one Python thread; in memory",),
    (
        *(
            Item(what.replace(" ", "-"), functools.partial(whole_map, what=what))
            for what in ("scan for dirty runs", NEVER_WRITTEN, "count")
        ),
        Item("search", search),
        Item("set", put),
    ),
)
