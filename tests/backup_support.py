"""Sizes and guests for the tests of backup jobs."""

UNIT = 65536
CHUNK = 1 << 20
ONE_AT_A_TIME = 1  # as a job's speed: its first span is copied at once, the next after hours


def overwrite(disk, value=b"x"):
    """All of it, as a guest."""
    for offset in range(0, disk.size, CHUNK):
        disk.pwrite(value * min(CHUNK, disk.size - offset), offset)
