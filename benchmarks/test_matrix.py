"""First writes on tmpfs, loop devices with O_DIRECT, and ext4, by each I/O engine."""

from cbwcore.bench.matrix import MATRIX

SECTIONS = (MATRIX,)


def test_case(measure, case):
    measure(case)
