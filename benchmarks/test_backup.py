"""Backup jobs beside cp, nbdcopy from QEMU's daemon and qemu-img convert."""

from cbwcore.bench.backup import BACKUP

SECTIONS = (BACKUP,)


def test_case(measure, case):
    measure(case)
