"""A guest's latency while a backup reads."""

from cbwcore.bench.pull import PULL

SECTIONS = (PULL,)


def test_case(measure, case):
    measure(case)
