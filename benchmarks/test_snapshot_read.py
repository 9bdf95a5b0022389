"""snapshot.pread_into beside os.preadv: of the disk where nothing was copied, of the target where all was."""

import contextlib
import os

import pytest
from harness import descriptor, offsets_of, scattered, write_all

import cbwcore

READS = 50_000
ORDERS = {"sequential 1 MiB": offsets_of(1 << 20), "random 4 KiB": scattered(READS)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("state", ["uncopied", "copied"])
def test_snapshot_read(beside, files, state, order):
    offsets = ORDERS[order]
    buffer = bytearray(4096 if order == "random 4 KiB" else 1 << 20)

    @contextlib.contextmanager
    def ours():
        with cbwcore.Disk(files.disk) as disk, disk.snapshot(files.target) as snapshot:
            if state == "copied":
                write_all(disk, files.data, offsets_of(65536))

            def run(pread_into=snapshot.pread_into):
                for offset in offsets:
                    pread_into(buffer, offset)

            yield run

    @contextlib.contextmanager
    def plain():
        with descriptor(files.target if state == "copied" else files.disk) as fd:

            def run(preadv=os.preadv, into=(buffer,)):
                for offset in offsets:
                    preadv(fd, into, offset)

            yield run

    beside(f"snapshot read, {state}, {order} (floor: os.preadv)", ours=ours, floor=plain, ops=len(offsets))
