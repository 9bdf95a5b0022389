"""One input of the handshake fuzzer against negotiate(), and what must come of it.

An input is a byte that chooses the server and the client's manners, then what the client sends. It sends all, then
closes its side; so nothing may wait, and all that the server sent can be judged afterwards, by the raw client of the
tests, option by option. Or it stays, and the deadline must come; or it is gone at once.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import nbd_protocol as nbd
from nbd_support import Client, Disconnected, must

import cbwcore
from cbwcore.nbd import NbdLimits, TlsConfig
from cbwcore.nbd.exports import Export, Exports
from cbwcore.nbd.handshake import HandshakeError, Negotiated, negotiate

KNOWN = {
    nbd.EXPORT_NAME, nbd.ABORT, nbd.LIST, nbd.STARTTLS, nbd.INFO, nbd.GO, nbd.STRUCTURED_REPLY, nbd.LIST_META_CONTEXT,
    nbd.SET_META_CONTEXT,
}  # fmt: skip
OPTION = 16  # bytes of its header
MOST = 32768  # bytes that a client sends
SECONDS = 5.0  # for a handshake that has nothing to wait for
MOMENT = 0.005  # for one whose client stays
GROWTH = 128 << 10  # KiB that the process may grow by while it runs
LOOK = 512  # inputs between two looks at memory, descriptors and threads
AMPLE = NbdLimits()
TIGHT = NbdLimits(request=4096, drain=4096, options=4, option_bytes=256, string_bytes=64, queries=3)
NEW_KEY = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-x509", "-days", "2")


class Server:
    """What is exported: a writable disk with a bitmap, its snapshot, an export with long texts; TLS of both kinds."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        home = Path(self._folder.name)
        (home / "disk").write_bytes(bytes(100000))
        self.disk = cbwcore.Disk(home / "disk")
        bitmap = cbwcore.DirtyBitmap(self.disk.size, name="b")
        self.snapshot = self.disk.snapshot(home / "target", name="snapshot")
        self.none = Exports()
        self.exports = Exports()
        self.exports.add(Export("disk", self.disk, writable=True, bitmaps=[bitmap]))
        self.exports.add(Export("snapshot", self.snapshot, discard=True, description="as it was"))
        self.exports.add(Export("n" * 1023, self.disk, description="d" * 4096))
        self.tls = self._make_tls(home)
        self.count = 0
        self._memory = 0
        self._descriptors = 0

    def close(self) -> None:
        self.snapshot.close()
        self.disk.close()
        self._folder.cleanup()

    @staticmethod
    def _make_tls(home: Path) -> dict[int, TlsConfig]:
        key, certificate = home / "server-key.pem", home / "server-cert.pem"
        command = ["openssl", *NEW_KEY, "-subj", "/CN=fuzz", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        (home / "ca-cert.pem").write_bytes(certificate.read_bytes())
        return {2: TlsConfig(home, required=False), 3: TlsConfig(home)}

    def check(self, data: bytes) -> str:
        """One input; AssertionError where the server does what it must not. How it ended, in a word."""
        head, sent = data[0] if data else 0, data[1 : 1 + MOST]
        stays, vanishes = head >> 5 == 7, head >> 5 == 6
        tls = self.tls.get(head & 3)
        limits = TIGHT if head & 4 else AMPLE
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MOST)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            ours.settimeout(SECONDS)
            ours.sendall(sent)
            if vanishes:
                ours.close()
            elif not stays:
                ours.shutdown(socket.SHUT_WR)
            result = run(theirs, self.none if head & 8 else self.exports, limits, tls, MOMENT if stays else SECONDS)
            left = drain(theirs)
            theirs.close()
            end = "vanished"
            if not vanishes:
                judge = Judge(ours, sent, limits, tls, result, left)
                end = judge.judge_late() if stays and isinstance(result, TimeoutError) else judge.judge()
        if isinstance(result, Negotiated) and result.sock is not theirs:
            result.sock.close()
        self._look()
        return end

    def _look(self) -> None:
        """Now and then: nothing grows."""
        self.count += 1
        if self.count % LOOK:
            return
        memory, descriptors = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(os.listdir("/proc/self/fd"))
        if self.count == LOOK:
            self._memory, self._descriptors = memory, descriptors
        must(memory <= self._memory + GROWTH, "memory grew to", memory, "KiB from", self._memory)
        must(descriptors == self._descriptors, descriptors, "descriptors, once", self._descriptors)
        must(threading.active_count() == 1, "threads:", threading.enumerate())


def run(
    sock: socket.socket, exports: Exports, limits: NbdLimits, tls: TlsConfig | None, seconds: float
) -> Negotiated | Exception | None:
    """What negotiate() returns, or the exceptions that it may raise."""
    began = time.monotonic()
    try:
        return negotiate(sock, exports, limits, tls, began + seconds)
    except (HandshakeError, OSError) as e:
        must("\n" not in str(e), "an error of more than one line:", e)
        return e
    finally:
        must(time.monotonic() < began + seconds + SECONDS, "the handshake took", time.monotonic() - began)


def drain(sock: socket.socket) -> bytes:
    """What the server has not read."""
    left = b""
    sock.setblocking(False)
    try:
        while part := sock.recv(1 << 20):
            left += part
    except OSError:
        pass
    return left


class Judge:
    """Walks through what the client sent, as the specification reads, beside what the server answered."""

    def __init__(
        self, sock: socket.socket, sent: bytes, limits: NbdLimits, tls: TlsConfig | None, result: object, left: bytes
    ) -> None:
        self.client = Client(sock, timeout=SECONDS)
        self.sent = sent
        self.limits = limits
        self.tls = tls
        self.result = result
        self.left = left
        self.at = 0
        self.encrypted = False

    def judge(self) -> str:
        """How it must have ended, and has."""
        try:
            end = self._walk()
        except Disconnected as e:
            raise AssertionError(f"a reply is missing, {self.result!r}: {e}") from e
        if end == "served":
            must(isinstance(self.result, Negotiated), "not served:", self.result)
            must(self.left == self.sent[self.at :], "the server read beyond the handshake")
            must(self.result.structured == self.client.structured, "structured replies")
            must(len(self.result.contexts) in (0, len(self.client.contexts)), "contexts:", self.result.contexts)
        elif end == "dropped":
            must(isinstance(self.result, HandshakeError), "not dropped:", self.result)
        elif end == "tls":
            must(isinstance(self.result, (HandshakeError, OSError, type(None))), "after STARTTLS:", self.result)
        else:
            must(self.result is None, "the client left:", self.result)
        if end != "tls":
            must(self.client.dropped() == b"", "more than the replies")
        return end

    def judge_late(self) -> str:
        """Of a client that stayed: the deadline may have come after any of its options."""
        with contextlib.suppress(Disconnected):
            self._walk()
        return "late"

    def _take(self, size: int) -> bytes | None:
        """Bytes of the client; None where it has left."""
        part = self.sent[self.at : self.at + size]
        self.at += len(part)
        return part if len(part) == size else None

    def _walk(self) -> str:
        must(self.client.unpack("QQH") == (nbd.NBDMAGIC, nbd.IHAVEOPT, 3), "greeting")
        flags = self._take(4)
        if flags is None:
            return "left"
        if int.from_bytes(flags) & ~3:
            return "dropped"
        self.client.no_zeroes = bool(flags[3] & nbd.NO_ZEROES)
        for _ in range(self.limits.options):
            end = self._option()
            if end:
                return end
        return "left" if self._take(OPTION) is None else "dropped"

    def _option(self) -> str:
        """How it ended with this option; "" where it goes on."""
        header = self._take(OPTION)
        if header is None:
            return "left"
        magic, option, length = int.from_bytes(header[:8]), int.from_bytes(header[8:12]), int.from_bytes(header[12:])
        if magic != nbd.IHAVEOPT or length > self.limits.drain:
            return "dropped"
        if self._take(length) is None:
            return "left"
        if option == nbd.EXPORT_NAME:
            return self._export_name()
        reply = self.client.option_reply(option)
        must(reply.error == 0 or len(reply.text) <= 256, "a long error text:", reply.text)
        self._check_error(option, length, reply.error)
        if option == nbd.ABORT:
            return "left"
        if option == nbd.STARTTLS and not reply.error:
            return "tls"
        return "served" if option == nbd.GO and not reply.error else ""

    def _export_name(self) -> str:
        if not isinstance(self.result, Negotiated):
            return "dropped"
        self.client.size, self.client.flags = self.client.unpack("QH")
        must(self.client.no_zeroes or self.client.recv(124) == bytes(124), "124 zero bytes")
        return "served"

    def _check_error(self, option: int, length: int, error: int) -> None:
        """The errors that do not depend on what is in the option."""
        if option == nbd.ABORT:
            must(error == 0, "ABORT:", error)
        elif self.tls is not None and self.tls.required and option != nbd.STARTTLS:
            must(error == nbd.ERR_TLS_REQD, "in the clear:", error)
        elif option not in KNOWN:
            must(error == nbd.ERR_UNSUP, "unknown option:", error)
        elif length > self.limits.option_bytes:
            must(error == nbd.ERR_TOO_BIG, "an option of", length, ":", error)
        elif option in (nbd.LIST, nbd.STRUCTURED_REPLY):
            must(error == (nbd.ERR_INVALID if length else 0), "option", option, "of", length, ":", error)
        elif option == nbd.STARTTLS and self.tls is None:
            must(error in (nbd.ERR_POLICY, nbd.ERR_UNSUP, nbd.ERR_INVALID), "STARTTLS:", error)
        else:
            allowed = (0, nbd.ERR_INVALID, nbd.ERR_UNKNOWN, nbd.ERR_TOO_BIG)
            must(error in allowed, "option", option, ":", error)
