"""A raw NBD client that judges every byte it gets (NBD doc/proto.md), and sends every byte that it is asked to.

`ProtocolError`: the server broke the protocol. `Disconnected`: it closed the connection. What does not come within
``timeout`` seconds raises TimeoutError, so nothing hangs. Numbers and payloads are in `nbd_protocol`.
"""

import contextlib
import os
import socket
import ssl
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Self

import nbd_protocol as nbd


class ProtocolError(AssertionError):
    """The server broke the protocol."""


class Disconnected(Exception):  # noqa: N818
    """The server closed the connection."""


def must(condition: object, *what: object) -> None:
    """A rule of the protocol, and what was seen where it was broken."""
    if not condition:
        raise ProtocolError(" ".join(map(str, what)))


def string(data: bytes) -> str:
    """A string of the protocol."""
    must(len(data) <= nbd.MAX_STRING and b"\0" not in data, "no valid string:", len(data), data[:100])
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"no UTF-8: {data[:100]!r}") from None


@dataclass
class OptionReply:
    """All replies to one option. ``error``: 0 for ACK. ``info``: by type. ``contexts``: by id. ``names``: of either."""

    items: list[tuple[int, bytes]]
    error: int
    text: str
    info: dict[int, Any] = field(default_factory=dict)
    contexts: dict[int, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    descriptions: list[str] = field(default_factory=list)


@dataclass
class Reply:
    """A request and its reply. ``chunks``: their types. ``status``: extents by id. ``covered``: by chunks."""

    cmd: int
    flags: int
    offset: int
    length: int
    error: int = 0
    text: str = ""
    data: Any = b""
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunks: list[int] = field(default_factory=list)
    covered: list[tuple[int, int]] = field(default_factory=list)


def fail(reply: Reply, error: int) -> None:
    """Keep the first error of a reply."""
    fast = reply.cmd == nbd.WRITE_ZEROES and reply.flags & nbd.FAST_ZERO
    must(error in nbd.ERRORS and (error != nbd.ENOTSUP or fast), "errno", error, "to", reply.cmd)
    reply.error = reply.error or error


class Client(contextlib.AbstractContextManager[Any]):
    """One connection. ``address``: a unix socket's path, (host, port), or a connected socket."""

    def __init__(self, address: str | tuple[str, int] | socket.socket, *, timeout: float = 10.0) -> None:
        self.timeout = timeout
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.sock = address if isinstance(address, socket.socket) else socket.socket(family)
        try:
            if not isinstance(address, socket.socket):
                self.sock.connect(address)
        except OSError:
            self.sock.close()
            raise
        self.size, self.flags = -1, 0  # of the export
        self.structured = False
        self.contexts: dict[int, str] = {}
        self.pending: dict[int, Reply] = {}  # by handle: requests that are not answered
        self.replies: dict[int, Reply] = {}  # whole ones that nobody has taken, in the order they came
        self.handle = 0  # of the latest request

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def send(self, *parts: bytes) -> None:
        self.sock.settimeout(self.timeout)
        try:
            for part in parts:
                self.sock.sendall(part)
        except ConnectionError:
            raise Disconnected("while it was sent to") from None

    def recv(self, n: int) -> bytes:
        """Exactly ``n`` bytes."""
        got = bytearray(n)
        have, end = 0, time.monotonic() + self.timeout
        while have < n:
            self.sock.settimeout(max(end - time.monotonic(), 1e-3))
            try:
                count = self.sock.recv_into(memoryview(got)[have:])
            except TimeoutError:
                raise TimeoutError(f"{n - have} of {n} bytes did not come in {self.timeout} s") from None
            except (ConnectionError, ssl.SSLError):
                count = 0
            if count == 0:
                raise Disconnected(f"after {bytes(got[: min(have, 99)])!r}")
            have += count
        return bytes(got)

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(">" + form, self.recv(struct.calcsize(">" + form)))

    def dropped(self) -> bytes:
        """Wait until the server closes the connection; what it sent before that. TimeoutError where it does not."""
        got = bytearray()
        with contextlib.suppress(Disconnected):
            while True:
                got += self.recv(1)
        return bytes(got)

    def hello(self, flags: int = nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES) -> Self:
        """Receive the greeting, answer with these flags."""
        magic, version, self.handshake_flags = self.unpack("QQH")
        must((magic, version) == (nbd.NBDMAGIC, nbd.IHAVEOPT), "greeting", hex(magic), hex(version))
        self.no_zeroes = bool(flags & nbd.NO_ZEROES)
        self.send(struct.pack(">I", flags))
        return self

    def send_option(self, opt: int, payload: bytes = b"", length: int | None = None) -> None:
        """An option, with any length in its header."""
        self.send(nbd.option_header(opt, len(payload) if length is None else length) + payload)

    def option_reply(self, opt: int) -> OptionReply:
        """All replies to an option that was sent, checked; after GO this is the transmission phase."""
        reply = OptionReply([], 0, "")
        while True:
            magic, option, kind, length = self.unpack("QIII")
            must(magic == nbd.REPLY_MAGIC and option == opt, "reply", hex(magic), "to option", option)
            must(length <= 2 * nbd.MAX_STRING + 8, "a reply of", length, "bytes")
            data = self.recv(length)
            if kind == nbd.ACK or kind & 2**31:
                must(kind != nbd.ACK or not data, "ACK with data")
                reply.error, reply.text = 0 if kind == nbd.ACK else kind, string(data)
                break
            must(kind == nbd.ITEMS.get(opt), "reply", kind, "to option", opt)
            reply.items.append((kind, data))
            if kind == nbd.REP_INFO:
                self._info(reply.info, int.from_bytes(data[:2]), data[2:])
            elif kind == nbd.META_CONTEXT:
                must(len(data) > 4, "a context of", len(data))
                reply.names.append(string(data[4:]))
                reply.contexts[int.from_bytes(data[:4])] = reply.names[-1]
            elif kind == nbd.SERVER:
                end = 4 + int.from_bytes(data[:4])
                must(end <= len(data), "length of a name", data)
                reply.names.append(string(data[4:end]))
                reply.descriptions.append(string(data[end:]))
        self._negotiated(opt, reply)
        return reply

    def _info(self, info: dict[int, Any], what: int, data: bytes) -> None:
        must(what not in info, "information", what, "came twice")
        form = {nbd.INFO_EXPORT: ">QH", nbd.INFO_BLOCK_SIZE: ">III"}.get(what)
        must(form is None or len(data) == struct.calcsize(form), "information", what, "of", len(data))
        info[what] = string(data) if form is None else struct.unpack(form, data)
        if what == nbd.INFO_EXPORT:
            must(info[what][1] & nbd.HAS_FLAGS, "transmission flags", info[what][1])
            must(self.structured or not info[what][1] & nbd.SEND_DF, "SEND_DF without structured replies")
        elif what == nbd.INFO_BLOCK_SIZE:
            low, preferred, high = info[what]
            must(all(n and n & (n - 1) == 0 for n in (low, preferred)) and low <= 65536, "block sizes", info[what])
            must(max(low, 512) <= preferred <= high, "block sizes", info[what])

    def _negotiated(self, opt: int, reply: OptionReply) -> None:
        if opt in (nbd.INFO, nbd.GO):
            must(reply.error or nbd.INFO_EXPORT in reply.info, "no INFO_EXPORT")
            must(reply.error != nbd.ERR_UNKNOWN or not reply.info, "information on an unknown export")
        if opt == nbd.GO and not reply.error:
            self.size, self.flags = reply.info[nbd.INFO_EXPORT]
        if opt == nbd.STRUCTURED_REPLY:
            self.structured = self.structured or not reply.error
        must(all(":" in name[1:] for name in reply.contexts.values()), "contexts", reply.names)
        must(len(set(reply.names)) == len(reply.names), "a name twice", reply.names)
        if opt == nbd.SET_META_CONTEXT:
            must(len(reply.contexts) == len(reply.names), "context ids", list(reply.contexts))
            self.contexts = {} if reply.error else reply.contexts

    def option(self, opt: int, payload: bytes = b"") -> OptionReply:
        """Send an option and receive all its replies."""
        self.send_option(opt, payload)
        return self.option_reply(opt)

    def export_name(self, name: bytes | str) -> Self:
        self.send_option(nbd.EXPORT_NAME, name.encode() if isinstance(name, str) else name)
        self.size, self.flags = self.unpack("QH")
        must(self.no_zeroes or self.recv(124) == bytes(124), "124 zero bytes")
        return self

    def info(self, name: bytes | str, *requests: int, opt: int = nbd.INFO) -> OptionReply:
        return self.option(opt, nbd.info_payload(name, *requests))

    def go(self, name: bytes | str, *requests: int) -> OptionReply:
        return self.info(name, *requests, opt=nbd.GO)

    def meta(self, opt: int, name: bytes | str, *queries: bytes | str) -> OptionReply:
        """LIST_META_CONTEXT or SET_META_CONTEXT; what the latter selects is in ``contexts``."""
        return self.option(opt, nbd.meta_payload(name, *queries))

    def starttls(self, context: ssl.SSLContext, hostname: str | None = None) -> Self:
        """STARTTLS, which must be granted; what was negotiated before is void."""
        must(not self.option(nbd.STARTTLS).error, "STARTTLS")
        self.sock = context.wrap_socket(self.sock, server_hostname=hostname)
        self.structured, self.contexts = False, {}
        return self

    # ---- transmission ----

    def expect(self, cmd: int, offset: int = 0, length: int = 0, *, flags: int = 0, handle: int | None = None) -> bytes:
        """Expect a reply to this request; its header, which the caller sends."""
        self.handle = self.handle + 1 if handle is None else handle
        must(self.handle not in self.pending, "handle in use", self.handle)
        self.pending[self.handle] = Reply(cmd, flags, offset, length)
        return nbd.header(cmd, offset, length, flags=flags, handle=self.handle)

    def request(self, cmd: int, offset: int = 0, length: int = 0, payload: bytes = b"", *, flags: int = 0) -> int:
        """Send a request; its handle. ``length`` 0 is the payload's."""
        head, handle = self.expect(cmd, offset, length or len(payload), flags=flags), self.handle
        self.send(*([head + payload] if len(payload) < 65536 else [head, payload]))
        return handle

    def reply(self, handle: int | None = None) -> Reply:
        """The reply to a request, or, without its handle, the next that is whole; others are kept."""
        while not self.replies or (handle is not None and handle not in self.replies):
            self._receive()
        return self.replies.pop(next(iter(self.replies)) if handle is None else handle)

    def call(self, *request: Any, flags: int = 0) -> Reply:
        """A request and its reply."""
        return self.reply(self.request(*request, flags=flags))

    def ok(self, *request: Any, flags: int = 0) -> Reply:
        """A request that must succeed."""
        reply = self.call(*request, flags=flags)
        assert reply.error == 0, f"{reply.cmd} at {reply.offset}, {reply.length}: {reply.error} {reply.text}"
        return reply

    def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        return bytes(self.ok(nbd.READ, offset, length, flags=flags).data)

    def disconnect(self) -> None:
        """DISC: the server closes without another byte."""
        self.send(nbd.header(nbd.DISC))
        must(not self.dropped(), "something came after DISC")

    def _receive(self) -> None:
        """One message of the server."""
        magic, last = *self.unpack("I"), 1
        if magic == nbd.SIMPLE_MAGIC:
            error, handle = self.unpack("IQ")
            self._simple(self._expected(handle), error)
        else:
            must(magic == nbd.CHUNK_MAGIC and self.structured, "magic of a reply", hex(magic))
            last, kind, handle, length = self.unpack("HHQI")
            must(last in (0, 1) and length <= nbd.MAX_CHUNK, "a chunk with flags", last, "of", length, "bytes")
            self._chunk(self._expected(handle), kind, self.recv(length), last)
        if last:
            self.replies[handle] = self.pending.pop(handle)

    def _expected(self, handle: int) -> Reply:
        must(handle in self.pending, "a reply to handle", handle, "which is none of", list(self.pending)[:20])
        return self.pending[handle]

    def _simple(self, reply: Reply, error: int) -> None:
        must(not self.structured or reply.cmd not in (nbd.READ, nbd.BLOCK_STATUS), "simple reply to", reply.cmd)
        must(not reply.chunks and (error or reply.cmd != nbd.BLOCK_STATUS), "simple reply to", reply)
        if error:
            fail(reply, error)
        elif reply.cmd == nbd.READ:
            reply.data = self.recv(reply.length)

    def _chunk(self, reply: Reply, kind: int, data: bytes, last: int) -> None:
        reply.chunks.append(kind)
        if kind == nbd.NONE:
            must(not data and last, "NONE with", data, last)
        elif kind == nbd.OFFSET_DATA:
            must(len(data) >= 9, "data of", len(data))
            self._content(reply, int.from_bytes(data[:8]), data[8:])
        elif kind == nbd.OFFSET_HOLE:
            must(len(data) == 12 and data[8:] != bytes(4), "hole", data)
            count = min(int.from_bytes(data[8:]), reply.length + 1)
            self._content(reply, int.from_bytes(data[:8]), bytes(count))
        elif kind == nbd.STATUS:
            self._status(reply, data)
        else:
            self._error(reply, kind, data)
        missing = reply.length - sum(b - a for a, b in reply.covered) if reply.cmd == nbd.READ else 0
        wanted = set(self.contexts) if reply.cmd == nbd.BLOCK_STATUS else set()
        must(reply.error or not last or (missing == 0 and set(reply.status) == wanted), "incomplete:", reply)

    @staticmethod
    def _content(reply: Reply, offset: int, data: bytes) -> None:
        start, end = offset - reply.offset, offset - reply.offset + len(data)
        must(reply.cmd == nbd.READ, "content for command", reply.cmd)
        must(start >= 0 and end <= reply.length, "content outside the request:", offset, len(data), reply.offset)
        must(all(end <= a or b <= start for a, b in reply.covered), "content overlaps:", offset, len(data))
        must(not reply.flags & nbd.DF or not reply.covered, "fragments in spite of DF")
        reply.covered.append((start, end))
        reply.data = reply.data or bytearray(reply.length)
        reply.data[start:end] = data

    def _status(self, reply: Reply, data: bytes) -> None:
        must(reply.cmd == nbd.BLOCK_STATUS, "a status for command", reply.cmd)
        must(len(data) >= 12 and len(data) % 8 == 4, "a status of", len(data))
        context, *words = struct.unpack(f">{len(data) // 4}I", data)
        extents, lengths = list(zip(words[::2], words[1::2], strict=True)), words[::2]
        must(context in self.contexts and context not in reply.status, "status of context", context)
        must(all(lengths) and len(extents) <= nbd.MAX_EXTENTS, "an empty extent, or too many:", extents[:9])
        must(sum(lengths[:-1]) < reply.length, "extents past the request:", extents[-9:])
        must(reply.offset + sum(lengths) <= self.size, "extents past the export:", extents[-9:])
        one = len(extents) == 1 and lengths[0] <= reply.length
        must(one or not reply.flags & nbd.REQ_ONE, "more than was asked for with REQ_ONE:", extents[:9])
        reply.status[context] = extents

    def _error(self, reply: Reply, kind: int, data: bytes) -> None:
        tail = 8 if kind == nbd.ERROR_OFFSET else 0
        must(kind in (nbd.ERROR, nbd.ERROR_OFFSET) and len(data) >= 6 + tail, "a chunk of type", kind, "of", len(data))
        error, length = struct.unpack(">IH", data[:6])
        must(error and length <= len(data) - 6 - tail, "error chunk", data)
        must(kind != nbd.ERROR or reply.chunks.count(nbd.ERROR) == 1, "a second error chunk")
        fail(reply, error)
        reply.text = string(data[6 : 6 + length])
        at = int.from_bytes(data[-8:]) - reply.offset
        must(not tail or 0 <= at < reply.length, "error offset", at)


def sockets_open():
    """The sockets among this process's descriptors."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if name.startswith("socket:"))


def nbd_threads():
    """The names of the threads of this process's servers."""
    return [t.name for t in threading.enumerate() if t.name.startswith("nbd ")]
