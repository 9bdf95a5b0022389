"""Two guest threads beside one: first writes, each thread in its own half of the disk."""

import pytest
from harness import Bound, Row, floor_first, ours_first, ratio

MOST = 65536  # clusters of one run
LEAST = 1.6


@pytest.mark.parametrize("cluster", [65536, 4096])
def test_two_threads(rounds, benchmark, rows, files, floor, cluster):
    seconds = rounds(
        {
            "floor, one": floor_first(files, floor, cluster, MOST, 1),
            "floor, two": floor_first(files, floor, cluster, MOST, 2),
            "cbwcore, one": ours_first(files, cluster, MOST, 1),
            "cbwcore, two": ours_first(files, cluster, MOST, 2),
        }
    )
    ours, plain = (ratio(seconds[f"{who}, one"], seconds[f"{who}, two"]) for who in ("cbwcore", "floor"))
    benchmark.extra_info |= {"seconds": seconds, "speedups": {"cbwcore": ours, "floor": plain}}
    bound = Bound(ours, LEAST, f"≥ {LEAST} × one thread", at_least=True, floor=plain)
    rows.append(
        Row(
            f"two threads' speed-up, first writes, {cluster >> 10} KiB clusters",
            f"{ours:.2f} ×",
            f"{plain:.2f} ×",
            f"{ours / plain:.2f}",
            bounds=(bound,) if cluster == 65536 else (),
        )
    )
