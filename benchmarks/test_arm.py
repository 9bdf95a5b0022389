"""Arming a snapshot of a sparse 16 TiB disk, and closing it: time, and memory from /proc."""

import contextlib
import random
import re
from pathlib import Path

import pytest
from harness import Bound, Row, show_size, show_time, spread, timed

import cbwcore

SIZE = 16 << 40
CLUSTER = 65536
MOST_PAUSE = 0.010
MOST_MEMORY = 16 << 20


def resident():
    """Bytes of this process in memory."""
    return 1024 * int(re.search(r"^Rss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)[1])


def scope_of(kind):
    if kind == "no scope":
        return None
    bitmap = cbwcore.DirtyBitmap(SIZE, CLUSTER)
    if kind == "scope of all":
        bitmap.set_range(0, SIZE)
    else:
        for offset in random.Random(1).choices(range(0, SIZE, CLUSTER), k=1000):
            bitmap.set_range(offset, CLUSTER)
    return bitmap


@pytest.fixture
def sparse(place):
    path = place / "sparse"
    with path.open("wb") as f:
        f.truncate(SIZE)
    yield path
    path.unlink()


@pytest.mark.parametrize("kind", ["no scope", "scope of 1000 clusters", "scope of all"])
def test_arm(rounds, benchmark, rows, sparse, kind):
    scope = scope_of(kind)
    pauses, memory, closing = [], [], []

    @contextlib.contextmanager
    def case():
        snapshots = []
        with cbwcore.Disk(sparse) as disk:
            before = resident()
            yield lambda: snapshots.append(disk.snapshot(cluster_size=CLUSTER, bitmap=scope))
            memory.append(resident() - before)
            pauses.append(snapshots[0].stats().arm_pause)
            closing.append(timed(snapshots[0].close))

    calls = rounds({"cbwcore": case}, 20)["cbwcore"]
    benchmark.extra_info |= {"pause": pauses, "memory": memory, "call": calls, "close": closing}
    name = f"arming a 16 TiB disk, {kind}"
    pause = Bound(max(pauses), MOST_PAUSE, f"< {show_time(MOST_PAUSE)}")
    growth = Bound(max(memory), MOST_MEMORY, f"< {show_size(MOST_MEMORY)}")
    rows += [
        Row(f"{name}: pause", spread(pauses), bounds=(pause,)),
        Row(f"{name}: memory", spread(memory, show_size), bounds=(growth,)),
        Row(f"{name}: the whole call", spread(calls)),
        Row(f"{name}: close", spread(closing)),
    ]
