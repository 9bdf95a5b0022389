"""What a cost depends on: the cluster size; the disk's size, how much of it is copied, the number of snapshots."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cbwcore.bench.loads import BUFFERED_MODES, engine, every, floor, load, nanoseconds, qemu_modes
from cbwcore.bench.places import Site
from cbwcore.bench.results import Bound, Figures, Plot, Point, Row, compared, show_size, show_time
from cbwcore.bench.rounds import Run
from cbwcore.bench.setting import (
    BLOCK,
    CLUSTER,
    SEED,
    Item,
    Section,
    Setting,
    random_file,
    sparse_file,
)
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.disk import Disk

__all__ = ["ARM", "CLUSTER_SIZE", "DISK_SIZE", "FILL", "SNAPSHOTS"]

CLIENT = "client: the load generator in C, one thread, 4 KiB writes; depth 1"
TMPFS = "device: files on tmpfs; cache mode: buffered"
CLUSTERS = tuple(1 << shift for shift in range(12, 21))
SIZES = tuple(1 << shift for shift in (30, 34, 38, 42, 44, 46))
FILLS = (0, 25, 50, 75, 100)
COUNTS = (1, 2, 4, 8)
PAGE_BITS = 4096 * 8  # of a map, in one page
MOST_PAUSE = 0.010  # seconds
MOST_MEMORY = 1 << 20  # for arming, before anything is written
MOST_PER_CLUSTER = 5 * 4096  # a page of each map, and one more
TIB = 1 << 40


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    found = re.search(r"^Rss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def size_name(size: int) -> str:
    """In the largest unit that it is a multiple of."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if size >> shift:
            return f"{size >> shift} {unit}"
    return f"{size >> 10} KiB"


# ---- the cluster size ----


def cluster_latency(setting: Setting, cluster: int) -> Iterator[Row]:
    """The first write into each cluster."""
    site, count = Site.of(setting.files), min(setting.size // cluster, setting.size // CLUSTER)
    writes = load(every(cluster, setting.size, count), setting.data)
    cases = {
        "floor": floor(site, writes, cluster=cluster),
        "cbwcore": engine(site, writes, cluster=cluster, copied=count * cluster),
    }
    if cluster == CLUSTER:
        cases = qemu_modes(site, count, 1) | cases
    seconds = setting.seconds(cases, ops=count, rounds=setting.fewer(setting.rounds, 1))
    none = "not possible in QEMU" if cluster < CLUSTER else "–"
    row = compared(f"first write, {cluster >> 10} KiB clusters", seconds, peers=BUFFERED_MODES, no_peer=none)
    names = (("cbwcore", row.ours), ("floor", row.floor), ("QEMU", row.peer))
    points = [Point("latency", name, cluster / 1024, value.median * 1e6) for name, value in names if value]
    points.append(Point("copied", "read, written and written: 2 clusters + 4 KiB", cluster / 1024, moved(cluster)))
    yield msgspec.structs.replace(row, points=tuple(points))


def moved(cluster: int) -> float:
    """KiB that one first write of 4 KiB reads and writes."""
    return (2 * cluster + BLOCK) / 1024


def map_memory(setting: Setting, cluster: int) -> Iterator[Row]:
    """Of a snapshot of a sparse disk, once a cluster in each page of its maps was written."""
    size = setting.fewer(TIB, TIB // 8)
    offsets = range(0, size, PAGE_BITS * cluster)
    with sparse_file(setting.place / "sparse", size) as path, Disk(path) as disk:
        before = resident()
        with disk.snapshot(cluster_size=cluster):
            load(offsets, setting.data).on_disk(disk)
            grown = (resident() - before) * TIB / size
    point = Point("memory", "all of 1 TiB written", cluster / 1024, max(grown, 4096) / (1 << 20))
    yield Row(
        case=f"map memory for 1 TiB, every part of it written, {cluster >> 10} KiB clusters",
        ours=Figures((grown,), "size"),
        points=(point,),
    )


CLUSTER_SIZE = Section(
    "cluster-size",
    "Cost against cluster size",
    (
        CLIENT,
        TMPFS,
        "floor: pread of a cluster, pwrite of it, pwrite of 4 KiB in C; peer: `qemu-img bench -d 1`, the faster "
        "of aio=threads and io_uring",
    ),
    (
        *(Item(f"write-{c >> 10}k", functools.partial(cluster_latency, cluster=c)) for c in CLUSTERS),
        *(
            Item(f"memory-{c >> 10}k", functools.partial(map_memory, cluster=c), quick=c in (4096, CLUSTER, 1 << 20))
            for c in CLUSTERS
        ),
    ),
    (
        Plot(name="latency", title="first 4 KiB write", x="cluster size, KiB", y="µs"),
        Plot(name="copied", title="moved by a first write", x="cluster size, KiB", y="KiB"),
        Plot(name="memory", title="map memory", x="cluster size, KiB", y="MiB for 1 TiB"),
    ),
)


# ---- the disk's size ----


def disk_size(setting: Setting, size: int) -> Iterator[Row]:
    """A sparse disk with data at scattered clusters, which are written."""
    count = setting.fewer(4096, 256)
    offsets = [CLUSTER * k for k in random.Random(SEED).sample(range(size // CLUSTER), count)]
    writes = load(offsets, setting.data)
    pauses: list[float] = []
    armed: list[float] = []
    touched: list[float] = []
    again: list[float] = []
    with (
        sparse_file(setting.place / "sparse", size) as disk_path,
        sparse_file(setting.place / "sparse-target", size) as target_path,
    ):
        for path in (disk_path, target_path):
            fill(path, offsets)
        site = Site(disk_path, target_path, size, "tmpfs")

        @contextlib.contextmanager
        def ours() -> Iterator[Run]:
            with Disk(site.disk) as disk:
                before = resident()
                with disk.snapshot(site.target) as snapshot:
                    armed.append(resident() - before)
                    yield lambda: nanoseconds(writes.on_disk(disk))
                    touched.append((resident() - before) / count)
                    pauses.append(snapshot.stats().arm_pause)
                    again.append(writes.on_disk(disk) / 1e9 / count)

        cases = {"floor": floor(site, writes), "cbwcore": ours}
        seconds = setting.seconds(cases, ops=count, rounds=setting.fewer(setting.rounds, 1))
    yield from disk_size_rows(size, seconds, again, pauses, armed, touched)


def fill(path: Path, offsets: list[int]) -> None:
    """Clusters of data at the offsets."""
    data = random.Random(SEED).randbytes(CLUSTER)
    fd = os.open(path, os.O_RDWR)
    try:
        for offset in offsets:
            os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def disk_size_rows(
    size: int,
    seconds: dict[str, list[float]],
    again: list[float],
    pauses: list[float],
    armed: list[float],
    touched: list[float],
) -> Iterator[Row]:
    """One a figure."""
    name, x = size_name(size), size / (1 << 30)
    first = Point("latency", "first write", x, min(seconds["cbwcore"]) * 1e6)
    plain = Point("latency", "first write, floor", x, min(seconds["floor"]) * 1e6)
    row = compared(f"{name}: first write", seconds, points=(first, plain))
    yield row
    copied = Point("latency", "copied cluster", x, min(again) * 1e6)
    yield Row(case=f"{name}: write of a copied cluster", ours=Figures(tuple(again)), points=(copied,))
    pause = Bound(max(pauses), MOST_PAUSE, f"≤ {show_time(MOST_PAUSE)}", kind="time")
    point = Point("pause", "pause", x, max(pauses) * 1e6)
    yield Row(case=f"{name}: pause of arming", ours=Figures(tuple(pauses)), bounds=(pause,), points=(point,))
    growth = Bound(max(armed), MOST_MEMORY, f"≤ {show_size(MOST_MEMORY)}", kind="size")
    yield Row(case=f"{name}: memory of arming", ours=Figures(tuple(armed), "size"), bounds=(growth,))
    each = Bound(max(touched), MOST_PER_CLUSTER, f"≤ {show_size(MOST_PER_CLUSTER)}", kind="size")
    point = Point("memory", "per cluster written", x, max(max(touched), 1) / 1024)
    yield Row(
        case=f"{name}: memory per scattered cluster written",
        ours=Figures(tuple(touched), "size"),
        bounds=(each,),
        points=(point,),
    )


DISK_SIZE = Section(
    "disk-size",
    "Cost against the disk's size",
    (
        CLIENT,
        f"{TMPFS}; sparse, with data in the clusters that are written, at random",
        "floor: pread 64 KiB, pwrite 64 KiB, pwrite 4 KiB in C. Points of latencies are of the fastest round",
    ),
    tuple(
        Item(size_name(s).replace(" ", ""), functools.partial(disk_size, size=s), quick=s in (SIZES[0], SIZES[-1]))
        for s in SIZES
    ),
    (
        Plot(name="latency", title="4 KiB writes", x="disk, GiB", y="µs"),
        Plot(name="pause", title="pause of arming", x="disk, GiB", y="µs"),
        Plot(name="memory", title="memory per scattered cluster written", x="disk, GiB", y="KiB"),
    ),
)


# ---- scopes ----


def arm(setting: Setting, kind: str) -> Iterator[Row]:
    """A snapshot of a sparse 16 TiB disk, with its scope."""
    size = 16 << 40
    scope = scope_of(kind, size)
    pauses: list[float] = []
    memory: list[float] = []

    with sparse_file(setting.place / "sparse", size) as path:

        @contextlib.contextmanager
        def ours() -> Iterator[Run]:
            with Disk(path) as disk, contextlib.ExitStack() as held:
                before = resident()
                taken = []
                yield lambda: taken.append(held.enter_context(disk.snapshot(bitmap=scope)))
                memory.append(resident() - before)
                pauses.append(taken[0].stats().arm_pause)

        calls = setting.seconds({"cbwcore": ours}, rounds=setting.fewer(20, 3))["cbwcore"]
    pause = Bound(max(pauses), MOST_PAUSE, f"≤ {show_time(MOST_PAUSE)}", kind="time")
    yield Row(case=f"{kind}: pause", ours=Figures(tuple(pauses)), bounds=(pause,))
    yield Row(case=f"{kind}: the whole call", ours=Figures(tuple(calls)))
    yield Row(case=f"{kind}: memory", ours=Figures(tuple(memory), "size"))


def scope_of(kind: str, size: int) -> DirtyBitmap | None:
    """A bitmap of clusters."""
    if kind == "no scope":
        return None
    bitmap = DirtyBitmap(size, CLUSTER)
    if kind == "scope of all":
        bitmap.set_range(0, size)
    else:
        for offset in random.Random(1).choices(range(0, size, CLUSTER), k=1000):
            bitmap.set_range(offset, CLUSTER)
    return bitmap


ARM = Section(
    "arm",
    "Taking a snapshot of a sparse 16 TiB disk",
    ("client: one Python thread, `disk.snapshot`", TMPFS),
    tuple(
        Item(kind.replace(" ", "-"), functools.partial(arm, kind=kind))
        for kind in ("no scope", "scope of 1000 clusters", "scope of all")
    ),
)


# ---- how much is copied ----


def filled(setting: Setting, percent: int) -> Iterator[Row]:
    """First writes into what is left, and writes into what is copied, at random."""
    size = max(setting.size // 4, 1 << 20)
    site, total = Site.of(setting.files)._replace(size=size), size // CLUSTER
    order = [CLUSTER * k for k in random.Random(SEED).sample(range(total), total)]
    done, left = order[: total * percent // 100], order[total * percent // 100 :]
    before = load(done, setting.data) if done else None
    count = min(total // 4, setting.fewer(1024, 128))
    cases = {}
    if left:
        cases["first write"] = engine(site, load(left[:count], setting.data), before=before)
        cases["floor"] = floor(site, load(left[:count], setting.data))
    if done:
        cases["copied cluster"] = engine(site, load(done[:count], setting.data), before=before)
        cases["plain"] = floor(site, load(done[:count], setting.data), copies=False)
    seconds = setting.seconds(cases, ops=count, rounds=setting.fewer(setting.rounds, 1))
    for name, plain in (("first write", "floor"), ("copied cluster", "plain")):
        if name in cases:
            times = {"cbwcore": seconds[name], "floor": seconds[plain]}
            points = tuple(
                Point(name, who, percent, sorted(values)[len(values) // 2] * 1e6) for who, values in times.items()
            )
            yield compared(f"{percent} % copied: {name}", times, points=points)


FILL = Section(
    "fill",
    "Cost against how much is copied",
    (CLIENT, f"{TMPFS}, all allocated; clusters are copied in random order"),
    tuple(Item(f"{percent}", functools.partial(filled, percent=percent)) for percent in FILLS),
    (
        Plot(name="first write", title="first 4 KiB write", x="clusters copied, %", y="µs", linear=True),
        Plot(name="copied cluster", title="4 KiB write, copied cluster", x="clusters copied, %", y="µs", linear=True),
    ),
)


# ---- the number of snapshots ----


@contextlib.contextmanager
def many_targets(setting: Setting, size: int) -> Iterator[list[Path]]:
    """Of random bytes, all allocated."""
    with contextlib.ExitStack() as held:
        paths = []
        for i in range(max(COUNTS)):
            path = setting.place / f"target-{i}"
            held.callback(path.unlink, missing_ok=True)
            paths.append(random_file(path, size, SEED + 10 + i))
        yield paths


def snapshots(setting: Setting, number: int) -> Iterator[Row]:
    """Of one disk, each with its target; the old data is read once."""
    size = max(setting.size // 8, 1 << 20)
    targets = setting.kept("targets", lambda: many_targets(setting, size))[:number]
    disk_path = setting.kept("small disk", lambda: small_disk(setting, size))
    count = size // CLUSTER
    writes = load(every(CLUSTER, size), setting.data)
    again: list[float] = []

    @contextlib.contextmanager
    def ours() -> Iterator[Run]:
        with Disk(disk_path) as disk, contextlib.ExitStack() as held:
            for path in targets:
                held.enter_context(disk.snapshot(path))
            yield lambda: nanoseconds(writes.on_disk(disk))
            again.append(writes.on_disk(disk) / 1e9 / count)

    @contextlib.contextmanager
    def plain() -> Iterator[Run]:
        fds: list[int] = []
        try:
            fds += (os.open(path, os.O_RDWR) for path in (disk_path, *targets))
            yield lambda: nanoseconds(writes.on_files(fds[0], fds[1:]))
        finally:
            for fd in fds:
                os.close(fd)

    seconds = setting.seconds({"floor": plain, "cbwcore": ours}, ops=count, rounds=setting.fewer(setting.rounds, 1))
    name = f"{number} snapshot{'s' * (number > 1)}"
    points = [Point("first", who, number, sorted(seconds[who])[len(seconds[who]) // 2] * 1e6) for who in seconds]
    yield compared(f"{name}: first write (floor: one pread, {number} + 1 pwrites)", seconds, points=tuple(points))
    point = Point("copied", "cbwcore", number, min(again) * 1e6)
    yield Row(case=f"{name}: write of a copied cluster", ours=Figures(tuple(again)), points=(point,))


@contextlib.contextmanager
def small_disk(setting: Setting, size: int) -> Iterator[Path]:
    """Of random bytes."""
    path = setting.place / "small-disk"
    try:
        yield random_file(path, size, SEED + 9)
    finally:
        path.unlink(missing_ok=True)


SNAPSHOTS = Section(
    "snapshots",
    "Cost against the number of snapshots",
    (CLIENT, f"{TMPFS}, all allocated; 64 KiB clusters"),
    tuple(Item(f"{n}", functools.partial(snapshots, number=n)) for n in COUNTS),
    (
        Plot(name="first", title="first 4 KiB write", x="snapshots", y="µs"),
        Plot(name="copied", title="4 KiB write, copied cluster", x="snapshots", y="µs"),
    ),
)
