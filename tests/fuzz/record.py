"""Make seeds of both fuzzers from what real clients send: record.py [DIRECTORY, default corpus/ beside this].

nbdinfo, nbdcopy, qemu-img, qemu-io and fio talk to an NbdServer in this process through a relay that writes down
their bytes. Each connection is split where its handshake ends: handshake/CLIENT-N is an input of handshake.py,
transmission/CLIENT-N one of session.pxd, in which requests of a kind that came often before are left out. Other files
of the corpus are left alone.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nbd_protocol as nbd
from fuzz import sessions

import cbwcore
from cbwcore.nbd import NbdServer

ALIKE = 3  # requests of one kind that a seed keeps
MOST = 40  # requests that a seed keeps
CLIENTS = {
    "nbdinfo": ["nbdinfo", "--json", "{disk}"],
    "nbdinfo-list": ["nbdinfo", "--list", "{server}"],
    "nbdinfo-map": ["nbdinfo", "--map", "{snapshot}"],
    "nbdinfo-bitmap": ["nbdinfo", "--map=qemu:dirty-bitmap:b", "{disk}"],
    "nbdcopy": ["nbdcopy", "{snapshot}", "null:"],
    "nbdcopy-out": ["nbdcopy", "--requests=4", "--request-size=65536", "--connections=1", "{snapshot}", "{image}"],
    "nbdcopy-in": ["nbdcopy", "--flush", "--destination-is-zero", "{other}", "{disk}"],
    "qemu-img-info": ["qemu-img", "info", "{disk}"],
    "qemu-img-map": ["qemu-img", "map", "--output=json", "{snapshot}"],
    "qemu-img-out": ["qemu-img", "convert", "-n", "-O", "raw", "{snapshot}", "{image}"],
    "qemu-img-in": ["qemu-img", "convert", "-n", "-O", "raw", "{other}", "{disk}"],
    "qemu-io": [
        "qemu-io", "-f", "raw", "-d", "unmap",
        "-c", "write -f -P 7 3000 9000", "-c", "write -z -u 65536 32768", "-c", "write -z 100 50000",
        "-c", "discard 16384 65536", "-c", "flush", "-c", "read 1000 300000", "-c", "aio_write 0 200k",
        "-c", "aio_read 0 200k", "-c", "aio_flush", "{disk}",
    ],
    "fio": [
        "fio", "--name=x", "--ioengine=nbd", "--uri={disk}", "--rw=randrw", "--bs=4k", "--iodepth=8", "--size=600k",
        "--io_size=200k", "--fsync=8", "--output=/dev/null",
    ],
    "fio-trim": [
        "fio", "--name=x", "--ioengine=nbd", "--uri={disk}", "--rw=randtrim", "--bs=16k", "--iodepth=2", "--size=600k",
        "--io_size=100k", "--output=/dev/null",
    ],
}  # fmt: skip


class Relay:
    """Listens at a socket and passes every byte on; ``sent`` is what each connection's client sent."""

    def __init__(self, path: Path, server: Path) -> None:
        self.sent: list[bytearray] = []
        self._server = str(server)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            self.sent.append(bytearray())
            threading.Thread(target=self._pass, args=(client, server, self.sent[-1]), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, bytearray()), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                seen += part
                target.sendall(part)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def options_of(sent: bytes) -> Iterator[tuple[int, bytes, int]]:
    """(option, payload, where it ends) of the handshake that a connection begins with."""
    at = 4
    while sent[at : at + 8] == nbd.IHAVEOPT.to_bytes(8):
        option, length = int.from_bytes(sent[at + 8 : at + 12]), int.from_bytes(sent[at + 12 : at + 16])
        yield option, sent[at + 16 : at + 16 + length], at + 16 + length
        at += 16 + length


def head_of(options: list[tuple[int, bytes, int]]) -> bytes:
    """How the export was negotiated, as the head of an input says it."""
    payloads = {option: payload for option, payload, _ in options}
    wanted = payloads.get(nbd.SET_META_CONTEXT, b"")
    contexts = tuple(name for name in (sessions.BASE, sessions.BITMAP) if name.encode() in wanted)
    kind = sessions.SNAPSHOT if b"snapshot" in payloads[nbd.GO] else sessions.DISK
    known = contexts if contexts in sessions.CONTEXTS else (sessions.BASE, sessions.BITMAP)
    return sessions.head(kind, nbd.STRUCTURED_REPLY in payloads, known, discard=True)


def thinned(data: bytes) -> bytes:
    """Without most of the requests that are like others."""
    seen: Counter[bytes] = Counter()
    kept = []
    for part in sessions.split(data):
        like = part[4:8] + part[24:28]  # flags, command, length
        seen[like] += 1
        if seen[like] <= ALIKE and len(kept) < MOST:
            kept.append(part)
    return data[: sessions.HEAD] + b"".join(kept)


def seeds(name: str, sent: list[bytearray]) -> Iterator[tuple[str, bytes]]:
    """The files to write for one client."""
    for number, each in enumerate(map(bytes, sent)):
        options = list(options_of(each))
        if not options:
            continue
        end = options[-1][2]
        yield f"handshake/{name}-{number}", b"\0" + each[:end]
        if options[-1][0] == nbd.GO and each[end:]:
            yield f"transmission/{name}-{number}", thinned(sessions.pack(head_of(options), each[end:]))


def make_disk(path: Path) -> None:
    """T0 of the fuzzer, with its holes."""
    content = sessions.t0()
    with open(path, "wb") as f:
        f.truncate(sessions.SIZE)
        for at in range(0, sessions.SIZE, sessions.CLUSTER):
            if not sessions.is_hole(at // sessions.CLUSTER):
                f.seek(at)
                f.write(content[at : at + sessions.CLUSTER])


def record(name: str, command: list[str], home: Path) -> Iterator[tuple[str, bytes]]:
    """Run one client; its seeds."""
    make_disk(home / "disk")
    make_disk(home / "image")
    with cbwcore.Disk(home / "disk") as disk, disk.snapshot(home / "target", name="snapshot") as snapshot:
        disk.pwrite(b"new" * 30000, 70000)
        bitmap = cbwcore.DirtyBitmap(disk.size, name="b")
        bitmap.set_range(0, 9000)
        with NbdServer(socket=home / "server") as server:
            server.add_export("disk", disk, writable=True, bitmaps=[bitmap])
            server.add_export("snapshot", snapshot, discard=True)
            server.add_export("other", snapshot)
            relay = Relay(home / "relay", home / "server")
            words = {export: f"nbd+unix:///{export}?socket={home}/relay" for export in server.exports}
            words |= {"server": f"nbd+unix://?socket={home}/relay", "image": str(home / "image")}
            # qemu-img may fail: it rounds sizes up to 512, and is told that there is no space there
            subprocess.run(
                [word.format(**words) for word in command], stdout=subprocess.DEVNULL, timeout=60, check=False
            )
    (home / "target").unlink()
    (home / "relay").unlink()
    yield from seeds(name, relay.sent)


def main(corpus: Path) -> None:
    """Replace the seeds of the recorded clients."""
    for folder in ("handshake", "transmission"):
        (corpus / folder).mkdir(parents=True, exist_ok=True)
    for name, command in CLIENTS.items():
        if shutil.which(command[0]) is None:
            sys.exit(f"record.py: there is no {command[0]}")
        with tempfile.TemporaryDirectory() as home:
            files = dict(record(name, command, Path(home)))
        if not files:
            sys.exit(f"record.py: {name} did not connect")
        for file, data in files.items():
            (corpus / file).write_bytes(data)
            print(f"{file}: {len(data)} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("corpus"))
