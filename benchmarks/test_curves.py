"""Cost against cluster size, disk size, fill and number of snapshots; arming."""

from cbwcore.bench.curves import ARM, CLUSTER_SIZE, DISK_SIZE, FILL, SNAPSHOTS

SECTIONS = (CLUSTER_SIZE, DISK_SIZE, FILL, SNAPSHOTS, ARM)


def test_case(measure, case):
    measure(case)
