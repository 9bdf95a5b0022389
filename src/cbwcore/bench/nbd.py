"""The NBD server beside nbdkit serving a plain file and QEMU's storage daemon with the same snapshot."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cbwcore.bench.results import Bound, Figures, Row, show_size
from cbwcore.bench.rounds import Case, Run, plainly, ratio
from cbwcore.bench.servers import Measured, Server, Shape, connected, fio, here, serving
from cbwcore.bench.setting import BLOCK, CLUSTER, BenchError, Item, Section, Setting, need, program

__all__ = ["FILES", "LOADS", "NBD", "Load", "cases_of"]

SHAPES = {"1": Shape(1, 1), "32": Shape(32, 1), "4x16": Shape(16, 4)}
DEPTHS = {"1": "depth 1", "32": "depth 32", "4x16": "4 jobs × depth 16"}
FILES = ("nbdkit", "qemu", "cbwcore")  # the servers that have some
IDLE = 100
MOST_IDLE = 20 << 20  # bytes
# How many times the speed of nbdkit, or of QEMU.
COPIED_OF_NBDKIT = {"1": 1.0, "32": 1.2, "4x16": 1.0}
COPIED_OF_QEMU = {"32": 4.0}
FIRST_OF_QEMU = {"1": 2.5, "32": 2.5, "4x16": 2.0}
READS_OF_NBDKIT = {"1": 1.0, "32": 1.0, "4x16": 1.0}


# ---- loads ----


def requests(server: Server, shape: Shape, direction: str, *options: str) -> tuple[int, Measured]:
    """Operations done by all jobs together, and the seconds of one."""
    before = server.cpu()
    done: Any = fio(server, shape, *options)[direction]
    if not done["total_ios"]:
        raise BenchError("fio did nothing")
    measured = Measured(done["runtime"] / 1000 / done["total_ios"])
    measured.cpu = (server.cpu() - before) / done["total_ios"]
    return done["total_ios"], measured


def at_random(server: Server, setting: Setting, *, direction: str, shape: Shape) -> Measured:
    """4 KiB anywhere on the disk; no write of it has a copy to wait for."""
    written = server.written()
    runtime = setting.fewer(700, 150)
    timing = ("--time_based", f"--runtime={runtime}ms", f"--size={setting.size}", "--norandommap")
    count, measured = requests(server, shape, direction, f"--rw=rand{direction}", *timing)
    if server.written() - written >= 2 * count * BLOCK + CLUSTER:
        raise BenchError("the clusters had not been copied")
    return measured


def first_writes(server: Server, setting: Setting, *, shape: Shape) -> Measured:
    """4 KiB anywhere in a cluster, once in each of half the disk, of which each job goes through a part."""
    part = setting.size // 2 // shape.jobs // CLUSTER * CLUSTER
    zones = ("--zonemode=strided", f"--zonesize={BLOCK}", f"--zonerange={CLUSTER}")
    parts = (f"--size={part}", f"--offset_increment={part}", f"--io_size={part // CLUSTER * BLOCK}")
    written = server.written()
    count, measured = requests(server, shape, "write", "--rw=randwrite", *zones, *parts)
    if count != part // CLUSTER * shape.jobs or server.written() - written < count * (CLUSTER + BLOCK):
        raise BenchError("not every write was the first")
    return measured


def copy_all(server: Server, setting: Setting) -> None:
    """A write into every cluster."""
    size, skip = setting.size, f"--rw=write:{CLUSTER - BLOCK}"
    count, _ = requests(server, SHAPES["32"], "write", skip, f"--size={size}", f"--io_size={size // CLUSTER * BLOCK}")
    if count != size // CLUSTER:
        raise BenchError(f"{count} writes, not {size // CLUSTER}")


def nbdcopy(server: Server, setting: Setting) -> Measured:
    """The whole snapshot, to nowhere; the seconds are those of all of it."""
    cpu, started = server.cpu(), time.perf_counter()
    program("nbdcopy", server.uri("snapshot"), "null:")
    measured = Measured(time.perf_counter() - started)
    measured.cpu = server.cpu() - cpu
    return measured


def idle(server: Server, setting: Setting) -> Measured:
    """Connections that have negotiated and read once; the memory is that of all."""
    with contextlib.ExitStack() as held:
        cpu, before, started = server.cpu(), server.resident(), time.perf_counter()
        for _ in range(IDLE):
            held.enter_context(connected(server.socket, "disk"))
        measured = Measured((time.perf_counter() - started) / IDLE)
        measured.cpu = (server.cpu() - cpu) / IDLE
        measured.memory = server.resident() - before
    return measured


class Load(NamedTuple):
    """One kind of work for servers."""

    run: Callable[[Server, Setting], Measured]
    servers: tuple[str, ...]
    fresh: bool = False  # a new server, with a new snapshot, for every run
    copied: bool = False  # every cluster is copied before the first run


def fio_loads() -> Iterator[tuple[str, Load]]:
    """Three kinds in every shape."""
    for name, shape in SHAPES.items():
        write, read = (functools.partial(at_random, direction=way, shape=shape) for way in ("write", "read"))
        yield f"copied-{name}", Load(write, ("null", *FILES), copied=True)
        yield f"first-{name}", Load(functools.partial(first_writes, shape=shape), ("qemu", "cbwcore"), fresh=True)
        yield f"read-{name}", Load(read, FILES)


LOADS = dict(fio_loads()) | {
    "nbdcopy": Load(nbdcopy, FILES),
    "nbdcopy-copied": Load(nbdcopy, FILES, copied=True),
    "idle": Load(idle, FILES, fresh=True),
}


def cases_of(
    load: Load, setting: Setting, place: Path, servers: Sequence[str], held: contextlib.ExitStack
) -> dict[str, Case]:
    """For interleave(), one for each server; what runs through all rounds is in ``held``."""

    @contextlib.contextmanager
    def fresh(kind: str) -> Iterator[Run]:
        with serving(kind, place, setting.size) as server:
            yield lambda: load.run(server, setting)

    def lasting(kind: str) -> Case:
        server = held.enter_context(serving(kind, place, setting.size))
        if load.copied and kind != "null":
            copy_all(server, setting)
        return plainly(lambda: load.run(server, setting))

    return {kind: functools.partial(fresh, kind) if load.fresh else lasting(kind) for kind in servers}


# ---- rows ----


def measured(setting: Setting, name: str) -> dict[str, list[float]]:
    """What each installed server of a load took in every round."""
    need("nbdcopy" if name.startswith("nbdcopy") else "fio")
    load = LOADS[name]
    own = Path(setting.kept("nbd", lambda: tempfile.TemporaryDirectory(prefix="nbd-", dir=setting.place)))
    with contextlib.ExitStack() as held:
        return setting.seconds(cases_of(load, setting, own, here(*load.servers), held), rounds=setting.fewer(3, 1))


def faster(seconds: dict[str, list[float]], other: str, column: str, limit: float | None) -> tuple[Bound, ...]:
    """The bound of our speed against the other's, if any."""
    if limit is None or other not in seconds:
        return ()
    value = ratio(seconds[other], seconds["cbwcore"])
    return (Bound(value, limit, f"≥ {limit:g} × {column}", at_least=True),)


def row(case: str, seconds: dict[str, list[float]], kind: str, bounds: tuple[Bound, ...]) -> Row:
    """Ours, nbdkit's in the floor's column and QEMU's."""

    def beside(other: str) -> tuple[Figures | None, float | None]:
        if other not in seconds:
            return None, None
        return Figures(tuple(seconds[other]), kind), ratio(seconds["cbwcore"], seconds[other])

    floor, over_floor = beside("nbdkit")
    peer, over_peer = beside("qemu")
    ours = Figures(tuple(seconds["cbwcore"]), kind)
    return Row(case=case, ours=ours, floor=floor, over_floor=over_floor, peer=peer, over_peer=over_peer, bounds=bounds)


def copied(setting: Setting, shape: str) -> Iterator[Row]:
    """Writes of copied clusters; and how close that is to what the client itself can do."""
    seconds = measured(setting, f"copied-{shape}")
    case = f"random 4 KiB writes, copied clusters, {DEPTHS[shape]}"
    bounds = faster(seconds, "nbdkit", "floor", COPIED_OF_NBDKIT[shape])
    yield row(case, seconds, "rate", bounds + faster(seconds, "qemu", "peer", COPIED_OF_QEMU.get(shape)))
    if "null" in seconds:
        ours, null = (Figures(tuple(seconds[kind]), "rate") for kind in ("cbwcore", "null"))
        over = ratio(seconds["cbwcore"], seconds["null"])
        yield Row(
            case=f"{case}; floor here: nbdkit `null`, where the client ends", ours=ours, floor=null, over_floor=over
        )


def first(setting: Setting, shape: str) -> Iterator[Row]:
    """The first write of each cluster."""
    seconds = measured(setting, f"first-{shape}")
    bounds = faster(seconds, "qemu", "peer", FIRST_OF_QEMU[shape])
    yield row(f"4 KiB writes, the first of each cluster, {DEPTHS[shape]}", seconds, "rate", bounds)


def reads(setting: Setting, shape: str) -> Iterator[Row]:
    """Of the disk."""
    seconds = measured(setting, f"read-{shape}")
    bounds = faster(seconds, "nbdkit", "floor", READS_OF_NBDKIT[shape])
    yield row(f"random 4 KiB reads of the disk, {DEPTHS[shape]}", seconds, "rate", bounds)


def copies(setting: Setting, load: str) -> Iterator[Row]:
    """Of the whole snapshot."""
    seconds = measured(setting, load)
    state = "copied" if load.endswith("copied") else "uncopied"
    bounds: tuple[Bound, ...] = ()
    if "nbdkit" in seconds:
        bounds = (Bound(ratio(seconds["cbwcore"], seconds["nbdkit"]), 1, "≤ 1 × floor"),)
    yield row(f"nbdcopy of the snapshot to null, {state} clusters", seconds, "time", bounds)


def idle_connections(setting: Setting) -> Iterator[Row]:
    """Their memory."""
    own = Path(setting.kept("nbd", lambda: tempfile.TemporaryDirectory(prefix="nbd-", dir=setting.place)))
    memory: dict[str, float] = {}
    for kind in here(*FILES):
        with serving(kind, own, setting.size) as server:
            memory[kind] = idle(server, setting).memory
    ours = memory["cbwcore"]
    yield row(
        f"memory of {IDLE} idle connections",
        {kind: [max(value, 1.0)] for kind, value in memory.items()},
        "size",
        (Bound(ours, MOST_IDLE, f"≤ {show_size(MOST_IDLE)}", kind="size"),),
    )


NBD = Section(
    "nbd",
    "The NBD server",
    (
        "client: fio's nbd engine (4 KiB requests) or nbdcopy on a unix socket; depth as the lines say",
        "device: files on tmpfs, all allocated; cache mode: buffered",
        "floor: `nbdkit file` with a plain file, no snapshot; peer: qemu-storage-daemon with copy-before-write and "
        "snapshot-access; figures of speed are operations a second, ratios are of times",
    ),
    (
        *(
            Item(f"{name}-{shape}", functools.partial(run, shape=shape), quick=shape != "4x16" and name != "read")
            for name, run in (("copied", copied), ("first", first), ("read", reads))
            for shape in SHAPES
        ),
        Item("nbdcopy", functools.partial(copies, load="nbdcopy")),
        Item("nbdcopy-copied", functools.partial(copies, load="nbdcopy-copied"), quick=False),
        Item("idle", idle_connections),
    ),
)
