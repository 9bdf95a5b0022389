"""disk.pwrite of 4 KiB where no copy is due, beside os.pwrite: the fast path of every guest write."""

import contextlib
import os

import pytest
from harness import descriptor, offsets_of, scattered, write_all

import cbwcore

WRITES = 100_000
SPANS = {"random offsets": 256 << 20, "one offset": 4096}


def plain(files, offsets):
    """os.pwrite, called from Python."""

    @contextlib.contextmanager
    def case():
        with descriptor(files.disk) as fd:

            def run(pwrite=os.pwrite, data=files.data):
                for offset in offsets:
                    pwrite(fd, data, offset)

            yield run

    return case


@pytest.mark.parametrize("where", SPANS)
@pytest.mark.parametrize("state", ["copied cluster", "no snapshot"])
def test_copied_write(beside, files, state, where):
    offsets = scattered(WRITES, SPANS[where])

    @contextlib.contextmanager
    def ours():
        with contextlib.ExitStack() as held:
            disk = held.enter_context(cbwcore.Disk(files.disk))
            if state == "copied cluster":
                held.enter_context(disk.snapshot(files.target))
                write_all(disk, files.data, offsets_of(65536, -(-SPANS[where] // 65536)))
            yield lambda: write_all(disk, files.data, offsets)

    case = f"4 KiB write, {state}, {where} (floor: os.pwrite)"
    beside(case, ours=ours, floor=plain(files, offsets), ops=WRITES, floor_max=1.25)


@pytest.mark.parametrize("where", SPANS)
def test_os_pwrite(beside, files, floor, where):
    """What of os.pwrite is Python's."""
    offsets = scattered(WRITES, SPANS[where])

    @contextlib.contextmanager
    def in_c():
        with descriptor(files.disk) as fd:
            yield lambda: floor.plain_writes(fd, offsets, files.data)

    beside(f"os.pwrite, {where} (floor: pwrite in C)", ours=plain(files, offsets), floor=in_c, ops=WRITES)
