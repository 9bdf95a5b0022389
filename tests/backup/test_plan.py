"""What a job copies: all of what it is to copy, in whole units, and called zero only where it is."""

import os

import pytest
from backup_support import CHUNK, UNIT
from hypothesis import given
from hypothesis import strategies as st

import cbwcore
from cbwcore._cbwcore import FaultPlan
from cbwcore.backup.plan import dirty_units, plan_all, plan_dirty
from cbwcore.bitmaps import DirtyBitmap

SIZE = 4 * CHUNK + 777
RANGES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 5 * UNIT)), max_size=8)


def all_of(plan):
    spans = []
    while (span := plan.next()) is not None:
        spans.append(span)
    return spans


def check_spans(spans, snapshot, chunk):
    """In order, apart, of whole units, data within a chunk, and zero where it says so."""
    position = 0
    for offset, length, zero in spans:
        end = offset + length
        assert length > 0
        assert offset >= position
        assert offset % UNIT == 0
        assert end % UNIT == 0 or end == SIZE
        assert zero or offset // chunk == (end - 1) // chunk
        if zero:
            assert not any(snapshot.pread(length, offset))
        position = end


def units_of(spans):
    return {unit for offset, length, _ in spans for unit in range(offset // UNIT, (offset + length - 1) // UNIT + 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


def laid_out(folder, ranges):
    path = folder / "disk"
    with open(path, "wb") as f:
        f.truncate(SIZE)
        for offset, length in ranges:
            f.seek(offset)
            f.write(b"1" * min(length, SIZE - offset))
    return cbwcore.Disk(path)


@given(RANGES, st.sampled_from([UNIT, 3 * UNIT, CHUNK]))
def test_all_of_a_snapshot(folder, ranges, chunk):
    with laid_out(folder, ranges) as disk, disk.snapshot() as snapshot:
        plan = plan_all(snapshot, chunk)
        spans = all_of(plan)
        check_spans(spans, snapshot, chunk)
        assert sum(span.length for span in spans) == plan.total == SIZE


@given(RANGES, RANGES, st.sampled_from([512, UNIT, 4 * UNIT]))
def test_what_a_bitmap_has(folder, ranges, dirty, granularity):
    bitmap = DirtyBitmap(SIZE, granularity)
    for offset, length in dirty:
        bitmap.set_range(offset, min(length, SIZE - offset))
    with laid_out(folder, ranges) as disk, disk.snapshot() as snapshot:
        plan = plan_dirty(snapshot, bitmap, CHUNK)
        spans = all_of(plan)
        check_spans(spans, snapshot, CHUNK)
        assert sum(span.length for span in spans) == plan.total
        assert units_of(spans) == units_of((o, n, False) for o, n in bitmap.ranges())


def test_ranges_in_one_unit_are_one():
    bitmap = DirtyBitmap(SIZE, 512)
    for offset in (0, 5000, UNIT + 1, 3 * UNIT, SIZE - 1):
        bitmap.set_range(offset, 1)
    assert list(dirty_units(bitmap, 0)) == [(0, 2 * UNIT), (3 * UNIT, 4 * UNIT), (SIZE - SIZE % UNIT, SIZE)]
    assert list(dirty_units(bitmap, UNIT)) == [(UNIT, 2 * UNIT), (3 * UNIT, 4 * UNIT), (SIZE - SIZE % UNIT, SIZE)]


def test_an_error_leaves_the_plan_as_it_was(folder):
    with laid_out(folder, [(i * UNIT, 1) for i in range(0, 60, 2)]) as disk, disk.snapshot() as snapshot:
        expected = all_of(plan_all(snapshot, CHUNK))
        faults = FaultPlan()
        disk._inject(faults)
        plan, spans, failures = plan_all(snapshot, CHUNK), [], 0
        for turn in range(1000):
            if turn % 3 == 0:
                faults.error("seek", times=1)
            try:
                span = plan.next()
            except OSError:
                failures += 1
                continue
            if span is None:
                break
            spans.append(span)
        faults.release()
        disk._inject(None)
        assert spans == expected
        assert failures > 5


def test_the_time_follows_what_is_dirty(tmp_path):
    """A bitmap of a 15 TiB disk with little in it is walked by its bits, not by the disk's bytes."""
    path = tmp_path / "large"
    with open(path, "wb") as f:
        f.truncate(15 << 40)
    bitmap = DirtyBitmap(15 << 40)
    for i in range(100):
        bitmap.set_range(i << 37, 1)
    with cbwcore.Disk(path) as disk, disk.snapshot(bitmap=bitmap) as snapshot:
        faults = FaultPlan()
        disk._inject(faults)
        spans = all_of(plan_dirty(snapshot, bitmap, CHUNK))
        assert len(spans) == 100
        assert len(faults.calls("seek")) <= 400
        disk._inject(None)
    os.unlink(path)
