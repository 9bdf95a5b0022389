"""The write path on tmpfs: first writes, copied clusters, large writes, several threads; and reads of the snapshot."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from cbwcore.bench.loads import (
    BUFFERED_MODES,
    engine,
    every,
    floor,
    from_python,
    load,
    os_pwrite,
    qemu_modes,
    write_all,
)
from cbwcore.bench.places import Site
from cbwcore.bench.results import Bound, Figures, Row, compared
from cbwcore.bench.rounds import Run, ratio
from cbwcore.bench.setting import BLOCK, CLUSTER, Item, Section, Setting, scattered
from cbwcore.disk import Disk

__all__ = ["CONTENTION", "COPIED_WRITE", "FIRST_WRITE", "LARGE_WRITES", "SNAPSHOT_READ"]

NO_QEMU = "not installed"
TMPFS = "device: files on tmpfs, all allocated; cache mode: buffered (QEMU: writeback)"
GENERATOR = "client: the load generator in C (`cbwcore._cbwcore.Load`), one request in flight a thread; depth = threads"
FLOOR = "floor: the same loop over pread of the cluster, pwrite of it to the target, pwrite of the data"
PEER = (
    "peer: `qemu-img bench` at the same depth over its copy-before-write driver, 64 KiB clusters; the faster of "
    "aio=threads and io_uring, which is named"
)
LEAST_SPEED_UP = 1.6


def in_memory(setting: Setting) -> Site:
    """Disk and target on tmpfs."""
    return Site.of(setting.files, "tmpfs")


# ---- the first write into each cluster ----


def first(setting: Setting, cluster: int, depth: int, bounds: dict[str, Any]) -> Iterator[Row]:
    """4 KiB into each of as many clusters as the disk has at 64 KiB."""
    site, count = in_memory(setting), setting.size // CLUSTER
    writes = load(every(cluster, setting.size, count), setting.data, depth)
    seconds = setting.seconds(
        {
            "floor": floor(site, writes, cluster=cluster),
            **qemu_modes(site, count, depth),
            "cbwcore": engine(site, writes, cluster=cluster, copied=count * cluster),
        },
        ops=count,
    )
    at = " (peer: at its 64 KiB)" if cluster != CLUSTER else ""
    case = f"{cluster >> 10} KiB clusters, depth {depth}{at}"
    yield compared(case, seconds, peers=BUFFERED_MODES, no_peer=NO_QEMU, **bounds)


def first_from_python(setting: Setting, threads: int) -> Iterator[Row]:
    """The same by disk.pwrite."""
    site, count = in_memory(setting), setting.size // CLUSTER
    offsets = every(CLUSTER, setting.size)
    seconds = setting.seconds(
        {
            "floor": floor(site, load(offsets, setting.data, threads, sliced=True)),
            **qemu_modes(site, count, threads),
            "cbwcore": from_python(site, offsets, setting.data, threads, copied=count * CLUSTER),
        },
        ops=count,
    )
    over = ", oversubscribed" if threads > (os.cpu_count() or 1) else ""
    case = f"64 KiB clusters, `disk.pwrite` in {threads} Python thread{'s' * (threads > 1)}{over}"
    yield compared(case, seconds, peers=BUFFERED_MODES, no_peer=NO_QEMU)


def first_items() -> Iterator[Item]:
    """By generator, then from Python."""
    for cluster, depth, bounds in (
        (CLUSTER, 1, {"floor_max": 1.10, "peer_times": 5}),
        (CLUSTER, 32, {"peer_times": 3}),
        (BLOCK, 1, {"peer_times": 15}),
    ):
        run = functools.partial(first, cluster=cluster, depth=depth, bounds=bounds)
        yield Item(f"{cluster >> 10}k-{depth}", run)
    for threads in (1, 2, 16):
        yield Item(f"python-{threads}", functools.partial(first_from_python, threads=threads))


FIRST_WRITE = Section(
    "first-write",
    "First 4 KiB write into a cluster",
    (f"{GENERATOR}, or Python where the line says so", TMPFS, FLOOR, PEER),
    tuple(first_items()),
)


# ---- copied clusters ----


def copied_from_python(setting: Setting, where: str, snapshot: bool) -> Iterator[Row]:
    """disk.pwrite beside os.pwrite."""
    span = BLOCK if where == "one offset" else min(256 << 20, setting.size)
    site, count = in_memory(setting), setting.fewer(100_000, 20_000)
    offsets = scattered(count, span)
    before = load(every(CLUSTER, max(span, CLUSTER)), setting.data)
    ours = from_python(site, offsets, setting.data, snapshot=snapshot, before=before if snapshot else None)
    seconds = setting.seconds({"floor": os_pwrite(site, offsets, setting.data), "cbwcore": ours}, ops=count)
    bounds = {"floor_max": 1.10} if snapshot else {}
    state = "copied clusters" if snapshot else "no snapshot"
    yield compared(f"`disk.pwrite`, {state}, {where} (floor: `os.pwrite`)", seconds, **bounds)  # type: ignore[arg-type]


def copied_by_generator(setting: Setting) -> Iterator[Row]:
    """The engine's own share."""
    span, count = min(256 << 20, setting.size), setting.fewer(200_000, 20_000)
    site, writes = in_memory(setting), load(scattered(count, span), setting.data)
    before = load(every(CLUSTER, span), setting.data)
    ours = engine(site, writes, before=before, copied=-(-span // CLUSTER) * CLUSTER)
    seconds = setting.seconds({"floor": floor(site, writes, copies=False), "cbwcore": ours}, ops=count)
    yield compared("load generator, copied clusters, random offsets (floor: pwrite in C)", seconds)


def copied_items() -> Iterator[Item]:
    """With and without a snapshot."""
    for where in ("random offsets", "one offset"):
        for snapshot in (True, False):
            run = functools.partial(copied_from_python, where=where, snapshot=snapshot)
            yield Item(f"{'copied' if snapshot else 'plain'}-{where.split()[0]}", run)
    yield Item("generator", copied_by_generator)


COPIED_WRITE = Section(
    "copied-write",
    "4 KiB write where no copy is due",
    ("client: one Python thread, or the load generator where the line says so; depth 1", TMPFS),
    tuple(copied_items()),
)


# ---- large writes ----


def large(setting: Setting, length: int, depth: int, cluster: int = CLUSTER) -> Iterator[Row]:
    """Of whole clusters, one after the other."""
    site, count = in_memory(setting), setting.size // length
    writes = load(every(length, setting.size), setting.data * (length // BLOCK), depth)
    seconds = setting.seconds(
        {
            "floor": floor(site, writes, cluster=cluster),
            **(qemu_modes(site, count, depth, length=length, step=length) if cluster == CLUSTER else {}),
            "cbwcore": engine(site, writes, cluster=cluster, copied=setting.size),
        },
        ops=count,
    )
    case = f"{length >> 10} KiB writes over fresh {cluster >> 10} KiB clusters, depth {depth}"
    none = NO_QEMU if cluster == CLUSTER else "not possible in QEMU"
    yield compared(case, seconds, peers=BUFFERED_MODES, no_peer=none)


LARGE_WRITES = Section(
    "large-writes",
    "Whole-cluster and sequential writes over fresh clusters",
    (GENERATOR, TMPFS, FLOOR, PEER),
    (
        *(
            Item(f"{length >> 10}k-{depth}", functools.partial(large, length=length, depth=depth))
            for length in (CLUSTER, 1 << 20)
            for depth in (1, 4)
        ),
        Item("1024k-1-small", functools.partial(large, length=1 << 20, depth=1, cluster=BLOCK)),
    ),
)


# ---- several threads ----


def disjoint(setting: Setting) -> Sequence[int]:
    """The first write of each cluster."""
    return every(CLUSTER, setting.size)


def colliding(setting: Setting) -> Sequence[int]:
    """All blocks of a cluster at once: its first writer copies, the others come meanwhile."""
    return every(BLOCK, setting.size // 4)


def slow_path(setting: Setting, threads: int, collide: bool) -> Iterator[Row]:
    """Copies by several threads, each in clusters of its own, or all in the same."""
    site, offsets = in_memory(setting), (colliding if collide else disjoint)(setting)
    one, many = (load(offsets, setting.data, n, sliced=not collide) for n in (1, threads))
    cases = {"ours, one": engine(site, one), "ours": engine(site, many)}
    if not collide:
        cases = {"floor, one": floor(site, one), "floor": floor(site, many)} | cases
    name = "the same clusters" if collide else "clusters of their own"
    bound = LEAST_SPEED_UP if threads == 2 and not collide else None
    yield speed_up(f"slow path: first writes in {name}", threads, setting.seconds(cases), bound)


def fast_path(setting: Setting, threads: int) -> Iterator[Row]:
    """Copied clusters."""
    span, count = min(256 << 20, setting.size), setting.fewer(200_000, 20_000)
    site = in_memory(setting)
    one, many = (load(scattered(count, span), setting.data, n, sliced=True) for n in (1, threads))
    before = load(every(CLUSTER, span), setting.data)
    cases = {
        "floor, one": floor(site, one, copies=False),
        "floor": floor(site, many, copies=False),
        "ours, one": engine(site, one, before=before),
        "ours": engine(site, many, before=before),
    }
    yield speed_up("fast path: copied clusters, random offsets", threads, setting.seconds(cases))


def speed_up(case: str, threads: int, seconds: dict[str, list[float]], least: float | None = None) -> Row:
    """Of many threads against one, ours beside the floor's."""
    factors = {
        who: tuple(a / b for a, b in zip(seconds[f"{who}, one"], seconds[who], strict=True))
        for who in ("floor", "ours")
        if who in seconds
    }
    ours = Figures(factors["ours"], "factor")
    plain = Figures(factors["floor"], "factor") if "floor" in factors else None
    text = f"≥ {least} × one thread"
    value = None if plain is None else plain.median
    return Row(
        case=f"{case}, {threads} threads{', oversubscribed' if threads > (os.cpu_count() or 1) else ''}",
        ours=ours,
        floor=plain,
        over_floor=None if plain is None else ratio(ours.values, plain.values),
        bounds=() if least is None else (Bound(ours.median, least, text, at_least=True, floor=value),),
    )


CONTENTION = Section(
    "contention",
    "Several guest threads: speed-up against one thread",
    (
        "client: the load generator, 4 KiB writes; each thread goes through its own part of the offsets, or, in the "
        "same clusters, takes the next block that nobody has",
        TMPFS,
        f"{FLOOR}; a speed-up above the ratio 1 is better than the floor's",
    ),
    tuple(
        Item(f"{name}-{threads}", functools.partial(run, threads=threads))
        for name, run in (
            ("slow", functools.partial(slow_path, collide=False)),
            ("slow-same", functools.partial(slow_path, collide=True)),
            ("fast", fast_path),
        )
        for threads in (2, 16)
    ),
)


# ---- reads of the snapshot ----


def snapshot_read(setting: Setting, state: str, length: int) -> Iterator[Row]:
    """snapshot.pread_into beside os.preadv: of the disk where nothing was copied, of the target where all was."""
    files, count = setting.files, setting.fewer(50_000, 5_000)
    offsets = every(length, setting.size) if length > BLOCK else scattered(count, setting.size)
    buffer = bytearray(length)

    @contextlib.contextmanager
    def ours() -> Iterator[Run]:
        with Disk(files.disk) as disk, disk.snapshot(files.target) as snapshot:
            if state == "copied":
                write_all(disk, setting.data, every(CLUSTER, setting.size))

            def run(pread_into=snapshot.pread_into) -> None:  # type: ignore[no-untyped-def]
                for offset in offsets:
                    pread_into(buffer, offset)

            yield run

    @contextlib.contextmanager
    def plain() -> Iterator[Run]:
        with in_memory(setting).descriptors() as (disk, target):
            fd = target if state == "copied" else disk

            def run(preadv=os.preadv, into=(buffer,)) -> None:  # type: ignore[no-untyped-def]
                for offset in offsets:
                    preadv(fd, into, offset)

            yield run

    seconds = setting.seconds({"floor": plain, "cbwcore": ours}, ops=len(offsets))
    order = "random 4 KiB" if length == BLOCK else f"sequential {length >> 20} MiB"
    yield compared(f"{order}, {state} clusters (floor: `os.preadv`)", seconds)


SNAPSHOT_READ = Section(
    "snapshot-read",
    "Reads of the snapshot",
    ("client: one Python thread, `snapshot.pread_into`; depth 1", TMPFS),
    tuple(
        Item(f"{state}-{length >> 10}k", functools.partial(snapshot_read, state=state, length=length))
        for state in ("uncopied", "copied")
        for length in (1 << 20, BLOCK)
    ),
)
