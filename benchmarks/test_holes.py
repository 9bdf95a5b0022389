"""Holes: what a file system on an all-hole disk costs the target."""

from cbwcore.bench.holes import HOLES

SECTIONS = (HOLES,)


def test_case(measure, case):
    measure(case)
