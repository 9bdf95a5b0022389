"""The NBD server beside nbdkit and QEMU's storage daemon."""

from cbwcore.bench.nbd import NBD

SECTIONS = (NBD,)


def test_case(measure, case):
    measure(case)
