"""First writes on each kind of storage, by each I/O engine of this build."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from cbwcore.bench.loads import engine, every, floor, load, qemu_modes
from cbwcore.bench.places import Site, ext4, loop_site
from cbwcore.bench.results import Row, compared
from cbwcore.bench.setting import CLUSTER, Item, Section, Setting
from cbwcore.engines import choose_engine
from cbwcore.errors import ConfigError

__all__ = ["MATRIX"]

ENGINES = ("psync", "io_uring")
PLACES = ("tmpfs", "loop", "ext4", "ext4-direct")
# Of QEMU's time in its best mode, on the loop device, by depth.
MOST_ON_LOOP = {1: 0.8, 32: 1.0}


def site_of(setting: Setting, place: str) -> Site:
    """Made once for the section; disks of a quarter of the usual size."""
    size = max(setting.size // 4, 1 << 20)
    if place == "tmpfs":
        return Site.of(setting.files, "tmpfs")._replace(size=size)
    if place == "loop":
        return setting.kept("loop", lambda: loop_site(setting.place, size))
    return setting.kept("ext4", lambda: ext4(setting.place, size))._replace(direct=place == "ext4-direct")


def first(setting: Setting, place: str, depth: int) -> Iterator[Row | str]:
    """4 KiB into each cluster."""
    site = site_of(setting, place)
    writes, count = load(every(CLUSTER, site.size), setting.data, depth), site.size // CLUSTER
    cases = {"floor": floor(site, writes)}
    modes = qemu_modes(site, count, depth)
    ours = {}
    for io in ENGINES:
        try:
            choose_engine(io)
        except ConfigError as e:
            yield str(e)
            continue
        ours[io] = engine(site, writes, io=io, copied=count * CLUSTER)
    seconds = setting.seconds(cases | modes | ours, ops=count, rounds=setting.fewer(3, 1))
    for io in ours:
        limit = MOST_ON_LOOP[depth] if place == "loop" and io == list(ours)[-1] else None
        yield compared(
            f"{site.device}, {site.cache}, depth {depth}, {io}",
            {"floor": seconds["floor"], "cbwcore": seconds[io]} | {mode: seconds[mode] for mode in modes},
            peers=tuple(modes),
            peer_max=limit,
            no_peer="not installed",
        )


MATRIX = Section(
    "matrix",
    "First 4 KiB write on each kind of storage, by each I/O engine",
    (
        "client: the load generator, 64 KiB clusters; depth = threads; device and cache mode as the lines say, backing "
        "files on the benchmark's directory",
        "floor: pread 64 KiB, pwrite 64 KiB, pwrite 4 KiB by plain calls at the same depth and cache mode",
        "peer: `qemu-img bench` over its copy-before-write driver, the fastest of aio=threads, native (O_DIRECT only) "
        "and io_uring, which is named; buffered: `-t writeback`, O_DIRECT: `-t none` with cache.direct=on",
    ),
    tuple(
        Item(f"{place}-{depth}", functools.partial(first, place=place, depth=depth))
        for place in PLACES
        for depth in (1, 32)
    ),
)
