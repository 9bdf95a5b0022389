"""The write path on tmpfs, and reads of the snapshot."""

from cbwcore.bench.writes import CONTENTION, COPIED_WRITE, FIRST_WRITE, LARGE_WRITES, SNAPSHOT_READ

SECTIONS = (FIRST_WRITE, COPIED_WRITE, LARGE_WRITES, CONTENTION, SNAPSHOT_READ)


def test_case(measure, case):
    measure(case)
