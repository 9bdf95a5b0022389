"""Dirty bitmaps beside bitarray and NumPy."""

from cbwcore.bench.bitmaps import BITMAP

SECTIONS = (BITMAP,)


def test_case(measure, case):
    measure(case)
