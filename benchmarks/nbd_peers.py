"""NBD servers side by side, as processes on unix sockets of their own: nbdkit, QEMU's storage daemon, cbwcore.

Each one but ``null`` has its own disk of random bytes on tmpfs, and its own target, allocated. Clients are fio's nbd
engine and nbdcopy. ``python benchmarks/nbd_peers.py CASE ROUNDS [SERVER ...]`` prints one case's rounds, interleaved:

    python benchmarks/nbd_peers.py copied-32 5 nbdkit cbwcore

Cases: copied, first and read, each with -1, -32 and -4x16 (depth; 4 jobs of depth 16); nbdcopy, nbdcopy-copied, idle.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from harness import QUICK, SEED, SIZE, Case, Files, Run, Seconds, plainly, random_file, show_size, show_time, timed

PROGRAMS = ("fio", "nbdcopy", "nbdkit", "qemu-storage-daemon")
CLUSTER = 65536
BLOCK = 4096
RUN_SECONDS = 0.15 if QUICK else 0.7
START_SECONDS = 20.0
IDLE = 100


class Measured(Seconds):
    """Seconds of one operation, with the CPU seconds that the server spent on it, or the memory that it took."""

    cpu = 0.0
    memory = 0


class Server(NamedTuple):
    """A running one."""

    pid: int
    socket: Path

    def uri(self, export: str) -> str:
        """Of its ``disk`` or ``snapshot``; nbdkit takes any name for its one file."""
        return f"nbd+unix:///{export}?socket={quote(os.fspath(self.socket))}"

    def cpu(self) -> float:
        """Seconds, of user and system, that all its threads have used."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def written(self) -> int:
        """Bytes that it has passed to write system calls, those to sockets by sendmsg not included."""
        return int(re.search(r"^wchar: (\d+)", self._proc("io"), re.MULTILINE)[1])

    def resident(self) -> int:
        """Bytes of it in memory."""
        return 1024 * int(re.search(r"^VmRSS:\s+(\d+) kB", self._proc("status"), re.MULTILINE)[1])

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/{name}").read_text()


# ---- the servers ----


def null_command(place: Path, sock: Path) -> list[object]:
    """Nothing behind it: what the client can do at most."""
    return ["nbdkit", "-f", "-U", sock, "null", f"size={SIZE}"]


def nbdkit_command(place: Path, sock: Path) -> list[object]:
    """The plain file."""
    disk = place / "disk"
    if not disk.exists():
        random_file(disk, SEED + 1)
    return ["nbdkit", "-f", "-U", sock, "file", disk]


def qemu_command(place: Path, sock: Path) -> list[object]:
    """copy-before-write and snapshot-access."""
    files = files_in(place)
    nodes = (
        f"driver=file,filename={files.disk},node-name=src",
        f"driver=file,filename={files.target},node-name=tgt",
        "driver=copy-before-write,file=src,target=tgt,node-name=cbw",
        "driver=snapshot-access,file=cbw,node-name=snap",
    )
    return [
        "qemu-storage-daemon",
        *(word for node in nodes for word in ("--blockdev", node)),
        *("--nbd-server", f"addr.type=unix,addr.path={sock},max-connections={2 * IDLE}"),
        *("--export", "type=nbd,id=e0,node-name=cbw,name=disk,writable=on"),
        *("--export", "type=nbd,id=e1,node-name=snap,name=snapshot"),
    ]


def our_command(place: Path, sock: Path) -> list[object]:
    """``cbwcore serve`` of this Python's package."""
    files = files_in(place)
    program = "import sys; from cbwcore.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, "serve", files.disk, "--target", files.target, "--socket", sock]


COMMANDS = {"null": null_command, "nbdkit": nbdkit_command, "qemu": qemu_command, "cbwcore": our_command}


def files_in(place: Path) -> Files:
    """Made once."""
    found = Files(place / "disk", place / "target", b"")
    return found if found.target.exists() else Files.make(place)


@contextlib.contextmanager
def serving(kind: str, place: Path) -> Iterator[Server]:
    """It answers, with a snapshot just taken; afterwards it is gone, with its socket."""
    own = place / kind
    own.mkdir(exist_ok=True)
    sock = own / "socket"
    command = [os.fspath(word) for word in COMMANDS[kind](own, sock)]  # type: ignore[call-overload]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(sock):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise RuntimeError(f"{' '.join(command)} does not serve: {said.read().decode(errors='replace')}")
                time.sleep(0.01)
            yield Server(process.pid, sock)
        finally:
            stop(process)
            sock.unlink(missing_ok=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """By its own pid; what does not end on SIGTERM is killed."""
    process.terminate()
    try:
        process.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---- the clients ----


def answers(sock: Path) -> bool:
    """Whether a client gets its first block."""
    try:
        connected(sock, "disk").close()
    except OSError:
        return False
    return True


def connected(sock: Path, export: str) -> socket.socket:
    """A client that has negotiated with GO and has done one read."""
    client = socket.socket(socket.AF_UNIX)
    try:
        client.settimeout(START_SECONDS)
        client.connect(os.fspath(sock))
        take(client, 18)
        name = export.encode()
        go = struct.pack(f">I{len(name)}sH", len(name), name, 0)
        client.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 7, len(go)) + go)
        while (reply := negotiated(client)) != 1:  # NBD_REP_ACK
            if reply & 1 << 31:
                raise ConnectionError(f"GO of {export} was refused: {reply:#x}")
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, BLOCK))
        take(client, 16 + BLOCK)
    except BaseException:
        client.close()
        raise
    return client


def negotiated(client: socket.socket) -> int:
    """The type of the next reply to an option."""
    _, _, kind, length = struct.unpack(">QIII", take(client, 20))
    take(client, length)
    return kind


def take(client: socket.socket, length: int) -> bytes:
    """Exactly ``length`` bytes."""
    data = bytearray()
    while len(data) < length:
        piece = client.recv(length - len(data))
        if not piece:
            raise ConnectionError("the server has closed the connection")
        data += piece
    return bytes(data)


class Shape(NamedTuple):
    """Of fio's load: requests in flight in each job."""

    depth: int
    jobs: int


SHAPES = {"1": Shape(1, 1), "32": Shape(32, 1), "4x16": Shape(16, 4)}


def client(*command: object) -> str:
    """What it printed."""
    done = subprocess.run([os.fspath(word) for word in command], capture_output=True, text=True, check=False)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout


def fio(server: Server, shape: Shape, direction: str, *options: str) -> tuple[int, Measured]:
    """Operations done by all jobs together, and the seconds of one."""
    before = server.cpu()
    printed = client(
        *("fio", "--name=x", "--ioengine=nbd", f"--uri={server.uri('disk')}", f"--bs={BLOCK}"),
        *(f"--iodepth={shape.depth}", f"--numjobs={shape.jobs}", "--group_reporting", "--output-format=json"),
        *options,
    )
    done = json.loads(printed[printed.index("{") :])["jobs"][0][direction]
    measured = Measured(done["runtime"] / 1000 / done["total_ios"])
    measured.cpu = (server.cpu() - before) / done["total_ios"]
    return done["total_ios"], measured


# ---- the loads ----


def at_random(direction: str, server: Server, shape: Shape) -> Measured:
    """4 KiB anywhere on the disk, for RUN_SECONDS; no write of it has a copy to wait for."""
    written = server.written()
    timing = ("--time_based", f"--runtime={RUN_SECONDS * 1000:.0f}ms", f"--size={SIZE}", "--norandommap")
    count, measured = fio(server, shape, direction, f"--rw=rand{direction}", *timing)
    assert server.written() - written < 2 * count * BLOCK, "the clusters had not been copied"
    return measured


def first_writes(server: Server, shape: Shape) -> Measured:
    """4 KiB anywhere in a cluster, once in each of half the disk, of which each job goes through a part."""
    part = SIZE // 2 // shape.jobs // CLUSTER * CLUSTER
    zones = ("--zonemode=strided", f"--zonesize={BLOCK}", f"--zonerange={CLUSTER}")
    parts = (f"--size={part}", f"--offset_increment={part}", f"--io_size={part // CLUSTER * BLOCK}")
    written = server.written()
    count, measured = fio(server, shape, "write", "--rw=randwrite", *zones, *parts)
    assert count == part // CLUSTER * shape.jobs
    assert server.written() - written >= count * (CLUSTER + BLOCK), "not every write was the first"
    return measured


def copy_all(server: Server) -> None:
    """A write into every cluster."""
    skip = f"--rw=write:{CLUSTER - BLOCK}"
    count, _ = fio(server, SHAPES["32"], "write", skip, f"--size={SIZE}", f"--io_size={SIZE // CLUSTER * BLOCK}")
    assert count == SIZE // CLUSTER


def nbdcopy(server: Server) -> Measured:
    """The whole snapshot, to nowhere; the seconds are those of all of it."""
    cpu, started = server.cpu(), time.perf_counter()
    client("nbdcopy", server.uri("snapshot"), "null:")
    measured = Measured(time.perf_counter() - started)
    measured.cpu = server.cpu() - cpu
    return measured


def idle(server: Server) -> Measured:
    """Connections that have negotiated and read once; the memory is that of all."""
    with contextlib.ExitStack() as held:
        cpu, before, started = server.cpu(), server.resident(), time.perf_counter()
        for _ in range(IDLE):
            held.enter_context(connected(server.socket, "disk"))
        measured = Measured((time.perf_counter() - started) / IDLE)
        measured.cpu = (server.cpu() - cpu) / IDLE
        measured.memory = server.resident() - before
    return measured


FILES = ("nbdkit", "qemu", "cbwcore")  # those that have some
MEASURED = ("nbdkit", "cbwcore") if QUICK else FILES  # where the bound is nbdkit's


class Load(NamedTuple):
    """One case."""

    run: Callable[[Server], Measured]
    servers: tuple[str, ...]
    fresh: bool = False  # a new server, with a new snapshot, for every run
    copied: bool = False  # every cluster is copied before the first run


def fio_loads() -> Iterator[tuple[str, Load]]:
    """Three kinds in every shape."""
    for name, shape in SHAPES.items():
        write, read = (functools.partial(at_random, direction, shape=shape) for direction in ("write", "read"))
        yield f"copied-{name}", Load(write, ("null", *MEASURED), copied=True)
        yield f"first-{name}", Load(functools.partial(first_writes, shape=shape), ("qemu", "cbwcore"), fresh=True)
        yield f"read-{name}", Load(read, MEASURED)


LOADS = dict(fio_loads()) | {
    "nbdcopy": Load(nbdcopy, FILES),
    "nbdcopy-copied": Load(nbdcopy, FILES, copied=True),
    "idle": Load(idle, FILES, fresh=True),
}


def cases(load: Load, place: Path, servers: Sequence[str], held: contextlib.ExitStack) -> dict[str, Case]:
    """For harness.interleave, one for each server; what runs through all rounds is in ``held``."""

    @contextlib.contextmanager
    def fresh(kind: str) -> Iterator[Run]:
        with serving(kind, place) as server:
            yield lambda: load.run(server)

    def lasting(kind: str) -> Case:
        server = held.enter_context(serving(kind, place))
        if load.copied and kind != "null":
            copy_all(server)
        return plainly(lambda: load.run(server))

    return {kind: functools.partial(fresh, kind) if load.fresh else lasting(kind) for kind in servers}


# ---- by hand ----


def show_rate(seconds: float) -> str:
    """Operations a second."""
    return f"{1e-3 / seconds:.1f} K/s"


def main() -> None:
    """Print every round of a case, and its medians."""
    parser = argparse.ArgumentParser(description="One case of the NBD benchmarks; CBWCORE_BENCH_* as for pytest.")
    parser.add_argument("case", choices=LOADS)
    parser.add_argument("rounds", type=int)
    parser.add_argument("server", nargs="*", help="default: all of the case's")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end and files go
    load = LOADS[args.case]
    show = show_time if args.case.startswith("nbdcopy") else show_rate
    with contextlib.ExitStack() as held:
        parent = os.environ.get("CBWCORE_BENCH_DIR", "/dev/shm")
        place = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="cbwcore-nbd-", dir=parent)))
        runs = cases(load, place, [kind for kind in load.servers if kind in (args.server or load.servers)], held)
        results: dict[str, list[Measured]] = {kind: [] for kind in runs}
        for _ in range(args.rounds):
            for kind, case in runs.items():
                with case() as run:
                    results[kind].append(timed(run))  # type: ignore[arg-type]
            print("  ".join(f"{kind} {show(values[-1])}" for kind, values in results.items()), flush=True)
        for kind, values in results.items():
            cpu = show_time(statistics.median(value.cpu for value in values))
            memory = show_size(max(value.memory for value in values))
            print(f"median {kind}: {show(statistics.median(values))}, server CPU {cpu} each, memory {memory}")


if __name__ == "__main__":
    main()
