"""Pull backups: clients that nobody here wrote read the snapshot, and of later ones only what the frozen bitmap has."""

import random
import shutil
import threading

import pytest
from interop_support import CLUSTER, MIB, joined, mixed, nbd_map, need_libnbd_python
from programs_support import run_json

from cbwcore.errors import JobCancelledError

CONTEXT = "qemu:dirty-bitmap:daily"
SIZE = 24 * MIB + 1000
READ_DIRTY = """
import sys, nbd
h = nbd.NBD()
h.add_meta_context(sys.argv[3])
h.connect_uri(sys.argv[1])
size, dirty, position = h.get_size(), [], 0
while position < size:
    found = []
    def extent(context, offset, entries, error):
        found.extend(entries)
    h.block_status(size - position, position, extent)
    for length, flags in zip(found[::2], found[1::2]):
        if flags & 1:
            dirty.append((position, min(length, size - position)))
        position += length
with open(sys.argv[2], "r+b") as f:
    for offset, length in dirty:
        f.seek(offset)
        f.write(h.pread(length, offset))
print(sum(length for _, length in dirty))
"""


class Writer(threading.Thread):
    """A guest that writes at random, here and there, until stopped; then the disk is still."""

    def __init__(self, disk, seed):
        super().__init__(daemon=True)
        self._disk, self._rng, self._stop_it = disk, random.Random(seed), threading.Event()
        self.writes = 0

    def run(self):
        while not self._stop_it.is_set():
            offset = self._rng.randrange(SIZE - 5000)
            what = self._rng.randrange(4)
            if what == 0:
                self._disk.pwrite_zeroes(offset, 5000)
            elif what == 1:
                self._disk.discard(offset, 5000)
            else:
                self._disk.pwrite(self._rng.randbytes(self._rng.randrange(1, 5000)), offset)
            self.writes += 1
            if self.writes > 40:
                self._stop_it.wait(0.002)  # so that a part of the disk stays clean

    def stop(self):
        self._stop_it.set()
        self.join()


@pytest.mark.parametrize("reader", ["libnbd", "nbdinfo"])
def test_a_full_and_two_incremental_pulls(host, image, run, place, program, reader):
    """The disk is still at each T0, and written during each pull. A pull that is given up between loses nothing."""
    program("nbdcopy", "nbdinfo", "qemu-img")
    here = host(image(mixed(SIZE)))
    disk, copy = here.disk, place / "copy"
    disk.bitmaps.add("daily")
    for day in range(4):
        t0 = disk.pread(SIZE, 0)
        job = disk.backup(None, sync="none", bitmap="daily")
        here.server.add_export("snapshot", job.snapshot, bitmaps=[job.bitmap])
        uri = here.uri("snapshot")
        guest = Writer(disk, day)
        guest.start()
        dirty = [e[:2] for e in joined(nbd_map(uri, CONTEXT)) if e[2]]
        assert dirty == list(job.bitmap.ranges())
        if day == 0:
            assert dirty == []
            run("nbdcopy", uri, copy)
        elif reader == "libnbd":
            assert int(run(need_libnbd_python(), "-c", READ_DIRTY, uri, copy, CONTEXT).stdout) == sum(
                n for _, n in dirty
            )
        else:
            pull_with_nbdcopy(here, run, place, copy, dirty)
        check_qemu_map(here, dirty)
        guest.stop()
        assert guest.writes > 40
        here.server.remove_export("snapshot")
        if day == 2:
            job.cancel()
            with pytest.raises(JobCancelledError):
                job.wait(20)
        else:
            job.complete()
        assert copy.read_bytes() == t0, f"day {day}"
        assert 0 < disk.bitmaps["daily"].count() < SIZE


def pull_with_nbdcopy(here, run, place, copy, dirty):
    """A whole copy, of which only the dirty extents are taken over: what is clean must be the same already."""
    whole = place / "whole"
    run("nbdcopy", here.uri("snapshot"), whole)
    merged = place / "merged"
    shutil.copyfile(copy, merged)
    with open(whole, "rb") as source, open(merged, "r+b") as f:
        for offset, length in dirty:
            source.seek(offset)
            f.seek(offset)
            f.write(source.read(length))
    assert merged.read_bytes() == whole.read_bytes()
    merged.replace(copy)
    whole.unlink()


def check_qemu_map(here, dirty):
    """QEMU's reader of the bitmap: what is dirty it calls no data; it rounds the size up to a sector."""
    options = f"driver=nbd,server.type=unix,server.path={here.socket},export=snapshot,x-dirty-bitmap={CONTEXT}"
    extents = run_json("qemu-img", "map", "--output=json", "--image-opts", options)
    found = [(e["start"], e["length"], e["data"]) for e in extents]
    inside = [(start, min(length, SIZE - start), data) for start, length, data in found if start < SIZE]
    assert [(start, length) for start, length, data in joined(inside) if not data] == dirty


def test_the_frozen_bitmap_is_that_of_t0(host, image, program):
    program("nbdinfo")
    here = host(image(mixed(SIZE)))
    bitmap = here.disk.bitmaps.add("daily")
    here.disk.pwrite(b"1", 5 * CLUSTER)
    job = here.disk.backup(None, sync="none", bitmap="daily")
    here.server.add_export("snapshot", job.snapshot, bitmaps=[job.bitmap])
    here.disk.pwrite(b"1", 9 * CLUSTER)
    extents = joined(nbd_map(here.uri("snapshot"), CONTEXT))
    assert [e[:2] for e in extents if e[2]] == [(5 * CLUSTER, CLUSTER)]
    here.server.remove_export("snapshot")
    job.complete()
    assert list(bitmap.ranges()) == [(9 * CLUSTER, CLUSTER)]
