"""The first 4 KiB write into each fresh cluster, whose old data is copied first."""

import pytest
from harness import floor_first, offsets_of, ours_first, peer_first

MOST = 65536  # clusters of one run


@pytest.mark.parametrize("cluster", [65536, 4096, 1 << 20])
def test_first_write(beside, files, floor, cluster):
    is_default = cluster == 65536
    beside(
        f"first 4 KiB write, {cluster >> 10} KiB clusters",
        ours=ours_first(files, cluster, MOST),
        floor=floor_first(files, floor, cluster, MOST),
        peer=peer_first(files, MOST) if is_default else None,
        no_peer="no peer",
        ops=len(offsets_of(cluster, MOST)),
        floor_max=1.25 if is_default else None,
        peer_max=0.25,
    )
