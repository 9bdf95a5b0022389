"""A guest's latency while a backup reads the snapshot at full speed."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cbwcore.bench.results import Bound, Figures, Row
from cbwcore.bench.rounds import Run, Seconds, ratio
from cbwcore.bench.servers import Server, Shape, fio, here, serving
from cbwcore.bench.setting import BenchError, Item, Section, Setting, find, need

__all__ = ["PULL"]

RATE = 2000  # writes a second, of all that are in flight
PERCENTILES = {"p50": "50.000000", "p99": "99.000000", "p99.9": "99.900000"}
MOST_OF_QEMU = 0.5  # of its p99.9
SERVERS = ("nbdkit", "qemu", "cbwcore")


class Latency(Seconds):
    """The 99.9th percentile; the others, and how fast the backup read meanwhile, bytes a second."""

    percentiles: dict[str, float]
    pulled: float


class Puller:
    """nbdcopy of the snapshot to nowhere, again and again, while the block runs."""

    def __init__(self, server: Server) -> None:
        self.command = [find("nbdcopy") or "nbdcopy", server.uri("snapshot"), "null:"]
        self.copies = 0
        self.error = ""
        self._stop = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # guards _process
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Puller:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._stop.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._stop.is_set():
                    return
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
            _, said = self._process.communicate()
            if self._process.returncode == 0:
                self.copies += 1
            elif not self._stop.is_set():
                self.error = said.decode(errors="replace").strip() or f"exit {self._process.returncode}"
                return


def under_pull(server: Server, setting: Setting, depth: int) -> Latency:
    """fio at its rate, beside a reader."""
    seconds = setting.fewer(4, 1)
    options = (
        *("--rw=randwrite", f"--size={setting.size}", "--norandommap", "--time_based", f"--runtime={seconds}"),
        *(f"--rate_iops={RATE}", f"--percentile_list={':'.join(str(float(p)) for p in PERCENTILES.values())}"),
    )
    with Puller(server) as puller:
        told: Any = fio(server, Shape(depth, 1), *options)["write"]
        copies = puller.copies
    if puller.error:
        raise BenchError(f"nbdcopy: {puller.error}")
    found = {name: told["clat_ns"]["percentile"][key] / 1e9 for name, key in PERCENTILES.items()}
    latency = Latency(found["p99.9"])
    latency.percentiles = found
    latency.pulled = copies * setting.size / (told["runtime"] / 1000)
    return latency


def latency(setting: Setting, depth: int) -> Iterator[Row]:
    """Each server with a fresh snapshot in every round."""
    need("fio", "nbdcopy")
    own = Path(setting.kept("pull", lambda: tempfile.TemporaryDirectory(prefix="pull-", dir=setting.place)))
    found: dict[str, list[Latency]] = {}

    @contextlib.contextmanager
    def case(kind: str) -> Iterator[Run]:
        with serving(kind, own, setting.size) as server:

            def run() -> Latency:
                value = under_pull(server, setting, depth)
                found.setdefault(kind, []).append(value)
                return value

            yield run

    setting.seconds({kind: functools.partial(case, kind) for kind in here(*SERVERS)}, rounds=setting.fewer(5, 1))
    for name in PERCENTILES:
        yield row(
            f"guest write, depth {depth}: {name}",
            {kind: [value.percentiles[name] for value in values] for kind, values in found.items()},
            limit=MOST_OF_QEMU if name == "p99.9" else None,
        )
    pulled = {kind: [value.pulled for value in values] for kind, values in found.items()}
    yield row(f"the backup's speed meanwhile, depth {depth}", pulled, "speed")


def row(case: str, values: dict[str, list[float]], kind: str = "time", limit: float | None = None) -> Row:
    """Ours, nbdkit's in the floor's column and QEMU's."""
    figures = {name: Figures(tuple(each), kind) for name, each in values.items()}
    over = {name: ratio(values["cbwcore"], each) for name, each in values.items() if name != "cbwcore" and all(each)}
    bounds: tuple[Bound, ...] = ()
    if limit is not None and "qemu" in over:
        value = None if "nbdkit" not in values else ratio(values["nbdkit"], values["qemu"])
        bounds = (Bound(over["qemu"], limit, f"≤ {limit:g} × peer", floor=value),)
    return Row(
        case=case,
        ours=figures["cbwcore"],
        floor=figures.get("nbdkit"),
        over_floor=over.get("nbdkit"),
        peer=figures.get("qemu"),
        over_peer=over.get("qemu"),
        bounds=bounds,
        note="" if "qemu" in figures else "not installed",
    )


PULL = Section(
    "pull-latency",
    "A guest's latency while a backup reads",
    (
        f"client: fio's nbd engine, random 4 KiB writes, {RATE} a second, completion latency; beside it nbdcopy of the "
        "snapshot to null, again and again; unix sockets; a fresh snapshot in every round",
        "device: files on tmpfs, all allocated; cache mode: buffered",
        "floor: `nbdkit file`, where guest and reader have one plain file; peer: qemu-storage-daemon",
    ),
    (
        Item("1", functools.partial(latency, depth=1)),
        Item("4", functools.partial(latency, depth=4), quick=False),
    ),
)
