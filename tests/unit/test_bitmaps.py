"""Dirty bitmaps against a set of granules, their memory in NumPy and bitarray, and what guest writes leave in them."""

import gc
import threading

import bitarray
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cbwcore

GRANULARITIES = [512, 4096, 65536]
CLUSTER = 65536


class NaiveBitmap:
    """What a DirtyBitmap is, in the plainest words: a set of granule numbers."""

    def __init__(self, size, granularity):
        self.size, self.granularity, self.granules = size, granularity, set()

    def set_range(self, offset, length):
        if length:
            self.granules.update(range(offset // self.granularity, (offset + length - 1) // self.granularity + 1))

    def merge(self, other):
        for granule in other.granules:
            start = granule * other.granularity
            self.set_range(start, min(other.granularity, self.size - start))

    def dirty_bytes(self):
        return b"".join(
            bytes([granule in self.granules]) * min(self.granularity, self.size - granule * self.granularity)
            for granule in range(-(-self.size // self.granularity))
        )

    def ranges(self, offset=0):
        """Runs of dirty bytes at or after ``offset``."""
        dirty, found = self.dirty_bytes(), []
        while (start := dirty.find(1, offset)) >= 0:
            end = dirty.find(0, start)
            end = self.size if end < 0 else end
            found.append((start, end - start))
            offset = end
        return found


@st.composite
def bitmap_and_model(draw, size=None):
    if size is None:
        size = draw(st.integers(0, 300_000) | st.sampled_from([0, 1, 511, 512, 513, 65536, 64 * 512, 64 * 512 + 1]))
    granularity = draw(st.sampled_from(GRANULARITIES))
    bitmap, model = cbwcore.DirtyBitmap(size, granularity), NaiveBitmap(size, granularity)
    for _ in range(draw(st.integers(0, 6))):
        offset = draw(st.integers(0, size))
        length = draw(st.integers(0, min(size - offset, draw(st.sampled_from([1, 5000, 300_000])))))
        bitmap.set_range(offset, length)
        model.set_range(offset, length)
    return bitmap, model


def assert_same(bitmap, model):
    dirty = model.dirty_bytes()
    assert list(bitmap.ranges()) == model.ranges()
    assert bitmap.count() == dirty.count(1)
    assert len(bitmap) == -(-model.size // model.granularity)
    assert set(np.flatnonzero(np.unpackbits(bitmap.numpy(), bitorder="little"))) == model.granules
    assert {i for i, bit in enumerate(bitmap.bitarray()) if bit} == model.granules
    for offset in {0, model.size // 2, model.size - 1} & set(range(model.size)):
        assert bitmap.is_dirty(offset) == bool(dirty[offset])


@given(bitmap_and_model())
def test_ranges_counts_and_bits_are_those_of_the_model(pair):
    assert_same(*pair)


@given(bitmap_and_model(), st.data())
def test_ranges_from_an_offset_begin_there(pair, data):
    bitmap, model = pair
    offset = data.draw(st.integers(0, model.size))
    assert list(bitmap.ranges(offset)) == model.ranges(offset)


@given(st.integers(0, 300_000).flatmap(lambda size: st.tuples(bitmap_and_model(size), bitmap_and_model(size))))
def test_merge_rounds_outward_across_granularities(pairs):
    (into, into_model), (other, other_model) = pairs
    before = list(other.ranges())
    into.merge(other)
    into_model.merge(other_model)
    assert_same(into, into_model)
    assert list(other.ranges()) == before


@given(bitmap_and_model(), st.data())
def test_a_run_ends_where_the_state_changes(pair, data):
    bitmap, model = pair
    if model.size == 0:
        return
    offset = data.draw(st.integers(0, model.size - 1))
    end = data.draw(st.integers(offset + 1, model.size))
    dirty, stop = bitmap.run_at(offset, end)
    rest = model.dirty_bytes()[offset:end]
    assert dirty == bool(rest[0])
    assert stop - offset == len(rest) - len(rest.lstrip(rest[:1]))


def test_merge_of_several_and_of_itself():
    a, b, c = (cbwcore.DirtyBitmap(10 * CLUSTER) for _ in range(3))
    b.set_range(0, 1)
    c.set_range(5 * CLUSTER, CLUSTER + 1)
    a.merge(b, c)
    a.merge(a)
    a.merge()
    assert list(a.ranges()) == [(0, CLUSTER), (5 * CLUSTER, 2 * CLUSTER)]


@pytest.mark.parametrize(("size", "last"), [(1, 1), (511, 511), (512, 512), (513, 1), (65536 + 100, 100)])
def test_the_last_granule_may_be_short(size, last):
    bitmap = cbwcore.DirtyBitmap(size, 512)
    bitmap.set_range(size - 1, 1)
    assert bitmap.count() == last
    assert list(bitmap.ranges()) == [(size - last, last)]
    bitmap.set_range(0, size)
    assert bitmap.count() == size


def test_clear_empties_it_and_the_views_see_it():
    bitmap = cbwcore.DirtyBitmap(10 * CLUSTER)
    view = bitmap.numpy()
    bitmap.set_range(0, 10 * CLUSTER)
    assert view.any()
    bitmap.clear()
    assert not view.any()
    assert bitmap.count() == 0
    bitmap.set_range(0, 1)
    assert view[0] == 1, "the memory is the same after a clear"


# ---- the same bytes elsewhere ----


def test_numpy_and_bitarray_share_the_memory_and_may_not_write_it():
    bitmap = cbwcore.DirtyBitmap(20 * CLUSTER)
    array, bits, view = bitmap.numpy(), bitmap.bitarray(), memoryview(bitmap)
    assert not array.any()
    assert not bits.any()
    bitmap.set_range(9 * CLUSTER, 1)
    assert array[1] == view[1] == 0b10
    assert bits[9]
    assert bits.count() == 1
    assert array.ctypes.data == np.frombuffer(view, np.uint8).ctypes.data == bits.buffer_info().address
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(TypeError, match="read-only"):
        bits[0] = 1
    assert bitmap.count() == CLUSTER


def test_a_view_keeps_the_memory():
    bitmap = cbwcore.DirtyBitmap(20 * CLUSTER)
    bitmap.set_range(0, 1)
    array = bitmap.numpy()
    del bitmap
    gc.collect()
    assert array.tolist() == [1, 0, 0]


def test_a_bitmap_of_a_huge_disk_costs_only_what_is_set():
    bitmap = cbwcore.DirtyBitmap(1 << 60, 4096)
    bitmap.set_range((1 << 60) - 1, 1)
    assert list(bitmap.ranges((1 << 60) - (1 << 30))) == [((1 << 60) - 4096, 4096)]


# ---- guest writes ----

GUEST_WRITES = {
    "pwrite": lambda d: d.pwrite(b"x" * 2, 2 * CLUSTER - 1),
    "pwrite_zeroes": lambda d: d.pwrite_zeroes(2 * CLUSTER - 1, 2),
    "discard": lambda d: d.discard(2 * CLUSTER - 1, 2),
}


@pytest.mark.parametrize("write", GUEST_WRITES.values(), ids=GUEST_WRITES.keys())
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_guest_write_is_recorded_in_every_bitmap(make_disk, write, granularity):
    disk = make_disk(5 * CLUSTER)
    bitmap = disk.bitmaps.add("b", granularity=granularity)
    idle = disk.bitmaps.add("idle", enabled=False)
    write(disk)
    first = 2 * CLUSTER - granularity
    assert list(bitmap.ranges()) == [(first, 2 * granularity)]
    assert idle.count() == 0


def test_reads_flushes_and_refused_requests_are_not_recorded(make_disk):
    disk = make_disk(5 * CLUSTER)
    bitmap = disk.bitmaps.add("b")
    disk.pread(10, 10)
    disk.flush()
    disk.pwrite(b"", 0)
    with pytest.raises(cbwcore.ConfigError):
        disk.pwrite(b"xx", 5 * CLUSTER - 1)
    assert bitmap.count() == 0


def test_the_bit_is_set_before_the_write_is_submitted(make_disk, plan):
    disk = make_disk(5 * CLUSTER)
    bitmap = disk.bitmaps.add("b")
    plan.stall("pwrite")
    disk._inject(plan)
    writer = threading.Thread(target=disk.pwrite, args=(b"x", CLUSTER))
    writer.start()
    plan.wait_stalled()
    assert list(bitmap.ranges()) == [(CLUSTER, CLUSTER)]
    plan.release()
    writer.join()
    disk._inject(None)


def test_a_write_that_fails_stays_recorded(make_disk, plan):
    """Nobody knows how much of it reached the disk."""
    disk = make_disk(5 * CLUSTER)
    bitmap = disk.bitmaps.add("b")
    plan.error("pwrite")
    disk._inject(plan)
    with pytest.raises(OSError, match="Input/output error"):
        disk.pwrite(b"x", CLUSTER)
    disk._inject(None)
    assert bitmap.is_dirty(CLUSTER)


def test_enable_disable_and_clear(make_disk):
    disk = make_disk(5 * CLUSTER)
    bitmap = disk.bitmaps.add("b", enabled=False)
    steps = [(0, False), (1, True), (2, False), (3, True)]
    for cluster, enabled in steps:
        for _ in range(2):  # again changes nothing
            (bitmap.enable if enabled else bitmap.disable)()
        assert bitmap.enabled == enabled
        disk.pwrite(b"x", cluster * CLUSTER)
    assert list(bitmap.ranges()) == [(CLUSTER, CLUSTER), (3 * CLUSTER, CLUSTER)]
    bitmap.clear()
    assert bitmap.count() == 0
    disk.pwrite(b"x", 4 * CLUSTER)
    assert list(bitmap.ranges()) == [(4 * CLUSTER, CLUSTER)], "a cleared bitmap goes on recording"


def test_bitmaps_are_kept_by_name_until_removed(make_disk):
    disk = make_disk(5 * CLUSTER)
    a, b = disk.bitmaps.add("a"), disk.bitmaps.add("b")
    assert list(disk.bitmaps) == ["a", "b"]
    assert disk.bitmaps["a"] is a
    assert "b" in disk.bitmaps
    disk.bitmaps.remove("a")
    disk.pwrite(b"x", 0)
    assert list(disk.bitmaps) == ["b"]
    assert a.count() == 0
    assert not a.enabled
    assert b.count() == CLUSTER
    with pytest.raises(cbwcore.ConfigError, match="no disk"):
        a.enable()
    disk.bitmaps.add("a")


def test_bitmaps_can_be_read_after_the_disk_is_closed(make_disk):
    disk = make_disk(5 * CLUSTER)
    bitmap = disk.bitmaps.add("b")
    disk.pwrite(b"x", 0)
    disk.close()
    assert not bitmap.enabled
    assert bitmap.count() == CLUSTER


def test_a_recording_bitmap_keeps_its_disk(make_image):
    disk = cbwcore.Disk(make_image(5 * CLUSTER))
    bitmap = disk.bitmaps.add("b")
    disk.pwrite(b"x", 0)
    del disk
    gc.collect()
    bitmap.disable()
    bitmap.enable()
    assert bitmap.count() == CLUSTER
    del bitmap
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()


def test_clearing_under_fire_loses_no_completed_write(make_disk, in_threads):
    """A write that begins after clear() returned is in the bitmap."""
    disk = make_disk(64 * 4096)
    bitmap = disk.bitmaps.add("b", granularity=4096)
    stop = threading.Event()

    def write():
        for i in range(10**9):
            disk.pwrite(b"x", i % 32 * 4096)
            if stop.is_set():
                return

    def clear():
        for i in range(200):
            bitmap.clear()
            disk.pwrite(b"y", (32 + i % 32) * 4096)
            assert bitmap.is_dirty((32 + i % 32) * 4096)
        stop.set()

    in_threads(write, write, clear)


# ---- as a scope ----


def scope_of(kind, clusters, total):
    """The clusters as a scope; DirtyBitmaps mark a single byte of each."""
    if kind.startswith("bitmap"):
        bitmap = cbwcore.DirtyBitmap(total, int(kind.removeprefix("bitmap")))
        for cluster in clusters:
            bitmap.set_range(cluster * CLUSTER + 4000, 1)
        return bitmap
    bools = [i in clusters for i in range(-(-total // CLUSTER))]
    return {
        "bitarray-little": lambda: bitarray.bitarray(bools, endian="little"),
        "bitarray-big": lambda: bitarray.bitarray(bools, endian="big"),
        "numpy": lambda: np.array(bools),
        "numpy-strided": lambda: np.array([b for x in bools for b in (x, not x)])[::2],
    }[kind]()


SCOPES = ["bitmap512", "bitmap4096", "bitmap65536", "bitmap262144"]
SCOPES += ["bitarray-little", "bitarray-big", "numpy", "numpy-strided"]


@pytest.mark.parametrize("kind", SCOPES)
@pytest.mark.parametrize("clusters", [[], [0], [3, 4], [0, 9], list(range(10))], ids=str)
def test_a_scope_limits_the_snapshot(make_disk, assert_status, kind, clusters):
    """Finer granularity rounds outward to clusters, coarser covers several (R4); the tail cluster is short."""
    size = 9 * CLUSTER + 5000
    disk = make_disk(size)
    t0 = disk.pread(size, 0)
    covered = set(clusters)
    if kind == "bitmap262144":
        covered = {c for cluster in clusters for c in range(cluster // 4 * 4, cluster // 4 * 4 + 4) if c < 10}
    scope = scope_of(kind, clusters, size)
    with disk.snapshot(bitmap=scope) as snapshot:
        disk.pwrite(b"\xff" * size, 0)
        assert disk.pread(size, 0) == b"\xff" * size
        for cluster in range(10):
            start, end = cluster * CLUSTER, min((cluster + 1) * CLUSTER, size)
            if cluster in covered:
                assert snapshot.pread(end - start, start) == t0[start:end]
                continue
            for offset in (start, end - 1):
                with pytest.raises(cbwcore.SnapshotAccessError) as refused:
                    snapshot.pread(1, offset)
                assert refused.value.errno == 13
        accessible = set()
        for e in assert_status(snapshot, t0):
            if e.access:
                accessible.update(range(e.offset // CLUSTER, -(-(e.offset + e.length) // CLUSTER)))
        assert accessible == covered
        assert snapshot.stats().cbw_bytes == sum(min(CLUSTER, size - c * CLUSTER) for c in covered)


def test_a_scope_is_copied_when_the_snapshot_is_taken(make_disk):
    """Later changes to the bitmap have no effect, in either direction."""
    disk = make_disk(4 * CLUSTER)
    t0 = disk.pread(4 * CLUSTER, 0)
    bitmap = disk.bitmaps.add("b")
    disk.pwrite(b"A", 0)
    with disk.snapshot(bitmap=bitmap) as snapshot:
        disk.pwrite(b"B", CLUSTER)
        assert bitmap.is_dirty(CLUSTER)
        bitmap.clear()
        bitmap.set_range(2 * CLUSTER, 1)
        disk.pwrite(b"C", 0)
        assert snapshot.pread(CLUSTER, 0) == b"A" + t0[1:CLUSTER]
        for cluster in (1, 2):
            with pytest.raises(cbwcore.SnapshotAccessError):
                snapshot.pread(1, cluster * CLUSTER)


def test_a_scope_by_the_name_of_a_bitmap(make_disk):
    disk = make_disk(4 * CLUSTER)
    disk.bitmaps.add("b")
    disk.pwrite(b"A", 2 * CLUSTER)
    with disk.snapshot(bitmap="b") as snapshot:
        assert [(e.offset, e.length) for e in snapshot.block_status() if e.access] == [(2 * CLUSTER, CLUSTER)]


def test_a_scope_taken_under_fire_has_every_write_before_t0(make_disk, in_threads):
    """What lies outside a scope that records is what no guest write has touched since the bitmap was cleared."""
    disk = make_disk(64 * 4096)
    bitmap = disk.bitmaps.add("b", granularity=4096)
    stop = threading.Event()

    def write():
        for i in range(10**9):
            disk.pwrite(bytes([i % 255 + 1]) * 10, i * 7 % 64 * 4096)
            if stop.is_set():
                return

    def check():
        try:
            for _ in range(30):
                bitmap.clear()
                with disk.snapshot(cluster_size=4096) as before, disk.snapshot(cluster_size=4096) as after:
                    with disk.snapshot(bitmap=bitmap, cluster_size=4096) as scoped:
                        outside = [e for e in scoped.block_status() if not e.access]
                    for e in outside:
                        assert before.pread(e.length, e.offset) == after.pread(e.length, e.offset)
        finally:
            stop.set()

    in_threads(write, write, check)


# ---- block status by a bitmap ----


def test_block_status_is_split_by_a_bitmap(make_disk):
    disk = make_disk(4 * CLUSTER)
    bitmap = disk.bitmaps.add("b", granularity=4096)
    disk.pwrite(b"x", 4096)
    disk.pwrite_zeroes(2 * CLUSTER, CLUSTER)
    with disk.snapshot() as snapshot:
        for source in (disk, snapshot):
            extents = list(source.block_status(bitmap=bitmap))
            assert [(e.offset, e.length, e.zero, e.dirty) for e in extents] == [
                (0, 4096, False, False),
                (4096, 4096, False, True),
                (8192, 2 * CLUSTER - 8192, False, False),
                (2 * CLUSTER, CLUSTER, True, True),
                (3 * CLUSTER, CLUSTER, False, False),
            ]
            part = list(source.block_status(5000, 100, bitmap=bitmap))
            assert [(e.offset, e.length, e.dirty) for e in part] == [(5000, 100, True)]
