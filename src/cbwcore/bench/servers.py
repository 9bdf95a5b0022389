"""NBD servers as processes on unix sockets of their own: nbdkit, QEMU's storage daemon, cbwcore; and fio, their guest.

Each one but ``null`` has its own disk and target. A server is stopped by its own pid."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from cbwcore.bench.rounds import Seconds
from cbwcore.bench.setting import BLOCK, BenchError, Files, missing, program

__all__ = ["Measured", "Server", "Shape", "connected", "fio", "here", "serving"]

START_SECONDS = 20.0
MOST_CONNECTIONS = 200
NEEDED = {"null": "nbdkit", "nbdkit": "nbdkit", "qemu": "qemu-storage-daemon"}
Maker = Callable[[Path, int], Files]


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
        return self._number("io", r"^wchar: (\d+)")

    def resident(self) -> int:
        """Bytes of it in memory."""
        return 1024 * self._number("status", r"^VmRSS:\s+(\d+) kB")

    def _number(self, name: str, pattern: str) -> int:
        found = re.search(pattern, self._proc(name), re.MULTILINE)
        return int(found[1]) if found else 0

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/{name}").read_text()


def here(*kinds: str) -> tuple[str, ...]:
    """Which of these servers are installed."""
    return tuple(kind for kind in kinds if not missing(*filter(None, (NEEDED.get(kind),))))


# ---- the servers ----


def command_of(kind: str, files: Files, sock: Path) -> list[object]:
    """That of a server which stays in the foreground. ``null`` has nothing behind it."""
    if kind == "null":
        return ["nbdkit", "-f", "-U", sock, "null", f"size={files.size}"]
    if kind == "nbdkit":
        return ["nbdkit", "-f", "-U", sock, "file", files.disk]
    if kind == "qemu":
        return qemu_command(files, sock)
    serve = "import sys; from cbwcore.cli import main; sys.exit(main())"
    return [sys.executable, "-c", serve, "serve", files.disk, "--target", files.target, "--socket", sock]


def qemu_command(files: Files, sock: Path) -> list[object]:
    """copy-before-write and snapshot-access."""
    nodes = (
        f"driver=file,filename={files.disk},node-name=src",
        f"driver=file,filename={files.target},node-name=tgt",
        "driver=copy-before-write,file=src,target=tgt,node-name=cbw",
        "driver=snapshot-access,file=cbw,node-name=snap",
    )
    return [
        "qemu-storage-daemon",
        *(word for node in nodes for word in ("--blockdev", node)),
        *("--nbd-server", f"addr.type=unix,addr.path={sock},max-connections={MOST_CONNECTIONS}"),
        *("--export", "type=nbd,id=e0,node-name=cbw,name=disk,writable=on"),
        *("--export", "type=nbd,id=e1,node-name=snap,name=snapshot"),
    ]


def files_in(own: Path, size: int, kind: str) -> Files:
    """Of random bytes, made once; nbdkit needs no target, ``null`` nothing."""
    files = Files(own / "disk", own / "target", size)
    if kind == "null" or files.disk.exists():
        return files
    Files.make(own, size)
    if kind == "nbdkit":
        files.target.unlink()
    return files


@contextlib.contextmanager
def serving(kind: str, place: Path, size: int, make: Maker | None = None) -> Iterator[Server]:
    """It answers, with a snapshot just taken; afterwards it is gone, with its socket. ``make`` makes its files; without
    it they are of random bytes."""
    own = place / kind
    own.mkdir(exist_ok=True)
    files = make(own, size) if make else files_in(own, size, kind)
    # The socket's path must be short, whatever the place's is.
    with tempfile.TemporaryDirectory(prefix="cbw-") as name, tempfile.TemporaryFile() as said:
        sock = Path(name) / "socket"
        command = [os.fspath(word) for word in command_of(kind, files, sock)]  # type: ignore[call-overload]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(sock):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    text = said.read().decode(errors="replace")
                    raise BenchError(f"{' '.join(command)} does not serve: {text}")
                time.sleep(0.01)
            yield Server(process.pid, sock)
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """By its own pid; what does not end on SIGTERM is killed."""
    process.terminate()
    try:
        process.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---- a client of our own ----


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
    return int(kind)


def take(client: socket.socket, length: int) -> bytes:
    """Exactly ``length`` bytes."""
    data = bytearray()
    while len(data) < length:
        piece = client.recv(length - len(data))
        if not piece:
            raise ConnectionError("the server has closed the connection")
        data += piece
    return bytes(data)


# ---- fio ----


class Shape(NamedTuple):
    """Of fio's load: requests in flight in each job."""

    depth: int
    jobs: int


def fio(server: Server, shape: Shape, *options: str) -> dict[str, object]:
    """What it tells of all its jobs together, 4 KiB requests to the disk."""
    printed = program(
        *("fio", "--name=x", "--ioengine=nbd", f"--uri={server.uri('disk')}", f"--bs={BLOCK}"),
        *(f"--iodepth={shape.depth}", f"--numjobs={shape.jobs}", "--group_reporting", "--output-format=json"),
        *options,
    )
    told = json.loads(printed[printed.index("{") :])
    return dict(told["jobs"][0])
