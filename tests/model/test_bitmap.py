"""The core's bitmap, through DirtyBitmap, against a plain Python set: word boundaries, page boundaries, short tails."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cbwcore import DirtyBitmap

QUICK = settings(max_examples=150, deadline=None, print_blob=True, derandomize=False)
EDGES = [1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 511, 512, 513, 575, 576, 577, 1023, 1024, 1025, 32767, 32768, 32769]

nbits = st.one_of(st.sampled_from(EDGES), st.integers(1, 1500))


@st.composite
def bit_ranges(draw: st.DrawFn, n: int) -> tuple[int, int]:
    """A range of bits that likes the edges of words."""
    near = st.builds(lambda word, d: min(max(word * 64 + d, 0), n), st.integers(0, n // 64 + 1), st.integers(-2, 2))
    first = draw(st.one_of(near, st.integers(0, n)))
    end = draw(st.one_of(near, st.integers(0, n), st.just(n)))
    return min(first, end), max(first, end)


def bits_of(bitmap: DirtyBitmap) -> set[int]:
    """What the buffer protocol shows."""
    shown = np.unpackbits(bitmap.numpy(), bitorder="little")
    assert not shown[len(bitmap) :].any(), "a bit past the last is set"
    return set(np.flatnonzero(shown[: len(bitmap)]).tolist())


def filled(data: st.DataObject, n: int, granularity: int, size: int) -> tuple[DirtyBitmap, set[int]]:
    bitmap = DirtyBitmap(size, granularity)
    assert len(bitmap) == n
    model: set[int] = set()
    for _ in range(data.draw(st.integers(0, 8), label="changes")):
        first, end = data.draw(bit_ranges(n))
        value = data.draw(st.booleans())
        bitmap._put(first, end, value)
        model = model | set(range(first, end)) if value else model - set(range(first, end))
    return bitmap, model


def sized(n: int, granularity: int, data: st.DataObject) -> int:
    """A disk size that needs exactly n bits."""
    return (n - 1) * granularity + data.draw(st.sampled_from([1, 13, granularity - 1, granularity]), label="tail")


@QUICK
@given(n=nbits, data=st.data())
def test_put_next_count_agree_with_a_set(n: int, data: st.DataObject) -> None:
    bitmap, model = filled(data, n, 512, sized(n, 512, data))
    assert bitmap._count() == len(model)
    assert bits_of(bitmap) == model
    for start in {0, n - 1, n, n + 1, data.draw(bit_ranges(n))[0]}:
        assert bitmap._next(start, True) == min((i for i in model if i >= start), default=n)
        assert bitmap._next(start, False) == next((i for i in range(start, n) if i not in model), n)
    as_bits = bitmap.bitarray()
    assert {i for i in range(n) if as_bits[i]} == model
    bitmap._put(0, n + 1000, True)  # the end is cut to the last bit
    assert bitmap._count() == n
    assert bits_of(bitmap) == set(range(n))
    bitmap.clear()
    assert bitmap._count() == 0
    assert bitmap._next(0, True) == n


@QUICK
@given(n=nbits, shift=st.integers(9, 20), data=st.data())
def test_ranges_and_bytes_agree_with_a_set(n: int, shift: int, data: st.DataObject) -> None:
    granularity = 1 << shift
    size = sized(n, granularity, data)
    bitmap, model = filled(data, n, granularity, size)
    ranges = list(bitmap.ranges())
    assert [b for o, length in ranges for b in range(o // granularity, -(-(o + length) // granularity))] == sorted(
        model
    )
    assert all(length > 0 and o % granularity == 0 and o + length <= size for o, length in ranges)
    assert all(a + m < b for (a, m), (b, _) in itertools.pairwise(ranges)), "neighbours are one range"
    assert bitmap.count() == sum(length for _, length in ranges)
    off = data.draw(st.integers(0, size - 1), label="offset")
    assert bitmap.is_dirty(off) == (off // granularity in model)
    dirty, stop = bitmap.run_at(off, size)
    assert dirty == (off // granularity in model)
    assert off < stop <= size
    assert all((b in model) == dirty for b in range(off // granularity, -(-stop // granularity)))
    assert stop == size or (stop // granularity in model) != dirty
    rest = list(bitmap.ranges(off))
    assert [b for o, length in rest for b in range(o // granularity, -(-(o + length) // granularity))] == sorted(
        b for b in model if b >= off // granularity
    )


@QUICK
@given(
    size=st.integers(1, 300_000),
    offset=st.integers(0, 300_000),
    length=st.integers(0, 300_000),
    shift=st.integers(9, 17),
)
def test_set_range_rounds_outward(size: int, offset: int, length: int, shift: int) -> None:
    offset = min(offset, size)
    length = min(length, size - offset)
    bitmap = DirtyBitmap(size, 1 << shift)
    bitmap.set_range(offset, length)
    touched = set(range(offset >> shift, ((offset + length - 1) >> shift) + 1)) if length else set()
    assert bits_of(bitmap) == touched


@QUICK
@given(size=st.integers(1, 600_000), into=st.integers(9, 16), other=st.integers(9, 16), data=st.data())
def test_merge_rounds_outward_between_granularities(size: int, into: int, other: int, data: st.DataObject) -> None:
    a, in_a = filled(data, ((size - 1) >> into) + 1, 1 << into, size)
    b, in_b = filled(data, ((size - 1) >> other) + 1, 1 << other, size)
    a.merge(b)
    expected = set(in_a)
    for bit in in_b:
        start, end = bit << other, min((bit + 1) << other, size)
        expected |= set(range(start >> into, ((end - 1) >> into) + 1))
    assert bits_of(a) == expected
    assert bits_of(b) == in_b
