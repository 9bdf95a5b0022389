"""What the tests share that let programs nobody here wrote judge the NBD server: the server as a user runs it, the
programs with deadlines, disks whose every byte is known."""

import functools
import hashlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from programs_support import run, run_json

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB
ODD = 10 * MIB + 1000  # no multiple of a cluster, of a page, of 512 or of 16
LIMIT = 30.0  # seconds after which something that must come counts as a hang
COMMAND = [sys.executable, "-c", "import sys; from cbwcore.cli import main; sys.exit(main())", "serve"]


def uri_of(socket, name="disk", certificates=None):
    """The NBD URI of an export behind a unix socket; libnbd's for TLS with a directory of certificates."""
    tls = "" if certificates is None else f"&tls-certificates={quote(str(certificates))}"
    return f"nbd{'s' if tls else ''}+unix:///{quote(name, safe='')}?socket={quote(str(socket))}{tls}"


# ---- programs ----


def need_libnbd_python():
    """The system's Python with libnbd's package, which a virtual environment cannot have; skips where there is none."""
    python = "/usr/bin/python3"
    if not os.path.exists(python) or run(python, "-c", "import nbd", status=None).returncode:
        pytest.skip("the system's Python has no libnbd (python3-libnbd)")
    return python


class Background:
    """Programs that run meanwhile; killed at the end of the test if they have not ended."""

    def __init__(self, folder):
        self._folder = Path(folder)
        self._processes = []

    def start(self, *command):
        """Start a program; its output goes to a file."""
        log = self._folder / f"background{len(self._processes)}.log"
        with open(log, "wb") as out:
            process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        process.log = log
        self._processes.append(process)
        return process

    @staticmethod
    def finish(process, status=0, timeout=60):
        """Wait for its end; the output."""
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"hangs for {timeout} s: {process.args}\n{process.log.read_text()}")
        output = process.log.read_text()
        assert process.returncode == status, f"{process.args}\n{output}"
        return output

    def close(self):
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def listens(address):
    """Whether a server can be connected to: its socket is there a moment before."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(address)) == 0


def stop_process(pid):
    """SIGSTOP, and wait until all its threads have stopped: one that runs does so at its next way out of the kernel."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + LIMIT
    while not all("State:\tT" in (task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < end, f"process {pid} does not stop within {LIMIT} s"
        time.sleep(0.001)


# ---- the server ----


class Server:
    """A program that serves NBD and says on stdout when it is ready, in a process of its own."""

    def __init__(self, command, socket, folder):
        self.socket = str(socket)
        self._stderr = Path(folder) / f"stderr-{Path(socket).name}"
        with open(self._stderr, "wb") as stderr:
            self.process = subprocess.Popen(
                [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr
            )
        self._ended = False
        self.ready_line = ""

    def uri(self, name="disk"):
        return uri_of(self.socket, name)

    @property
    def stderr(self):
        """All that it wrote to stderr so far."""
        return self._stderr.read_text()

    def wait_ready(self):
        """Wait for the first line on stdout."""
        line = b""
        end = time.monotonic() + LIMIT
        fd = self.process.stdout.fileno()
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            assert left > 0, f"not ready within {LIMIT} s; stderr: {self.stderr}"
            if select.select([fd], [], [], left)[0]:
                byte = os.read(fd, 1)
                assert byte, f"ended with {self.process.wait()} before it was ready; stderr: {self.stderr}"
                line += byte
        self.ready_line = line.decode()

    def stop(self, *, status=0, stderr=""):
        """SIGTERM; it must end with that status, having written that to stderr (None: anything). Again does nothing."""
        if self._ended:
            return
        self._ended = True
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"did not end within {LIMIT} s of SIGTERM; stderr: {self.stderr}")
        assert self.process.returncode == status, f"exit {self.process.returncode}; stderr: {self.stderr}"
        assert stderr is None or self.stderr == stderr, f"stderr: {self.stderr}"

    def kill(self):
        """End it without any assertion."""
        self._ended = True
        self.process.kill()  # does nothing once it has ended
        self.process.wait()
        self.process.stdout.close()


# ---- disks ----


@functools.lru_cache(2)  # a test has one or two; many are 64 MiB, and each fork of this process would copy their pages
def pattern(size, seed=1):
    """Seeded bytes, none of them zero, so that no cluster passes for a hole."""
    return random.Random(seed).randbytes(size).replace(b"\0", b"\1")


@functools.lru_cache(2)
def mixed(size=ODD, seed=1):
    """Data with holes of many lengths, some of them no multiple of a page; the last bytes are data."""
    rng = random.Random(seed)
    content = bytearray(pattern(size, seed))
    position = 128 * KIB
    while position < size - 256 * KIB:
        length = rng.choice([4 * KIB, 64 * KIB, 192 * KIB, 70_001])
        content[position : position + length] = bytes(length)
        position += length + rng.choice([4 * KIB, 128 * KIB, 300 * KIB, 50_001])
    return bytes(content[:size])


def write_sparse(path, content):
    """``content`` as a file in which every whole page of zeroes is a hole."""
    page = 4 * KIB
    with open(path, "wb") as f:
        for offset in range(0, len(content), page):
            piece = content[offset : offset + page]
            if piece.count(0) != len(piece):
                f.seek(offset)
                f.write(piece)
        f.truncate(len(content))
    return str(path)


def sha256(data):
    """The digest of bytes or of a file, which a failed comparison of megabytes shows better than they would."""
    if isinstance(data, (bytes, bytearray)):
        return hashlib.sha256(data).hexdigest()
    with open(data, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def assert_same(got, expected):
    """The file or bytes are the expected bytes; where they are not, the first difference is told."""
    got = got if isinstance(got, (bytes, bytearray)) else Path(got).read_bytes()
    if got == expected:
        return
    assert len(got) == len(expected)
    at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
    wrong = sum(a != b for a, b in zip(got, expected, strict=True))
    pytest.fail(f"{wrong} bytes differ, first at {at:#x}: {got[at : at + 16]!r}, expected {expected[at : at + 16]!r}")


# ---- block status ----


def status_runs(content, page=4 * KIB):
    """(offset, length, zero) of an image that `write_sparse` made, as a file system tells it: holes of whole pages."""
    runs = []
    for offset in range(0, len(content), page):
        piece = content[offset : offset + page]
        zero = piece.count(0) == len(piece)
        if runs and runs[-1][2] == zero:
            runs[-1][1] += len(piece)
        else:
            runs.append([offset, len(piece), zero])
    return [tuple(run) for run in runs]


def joined(runs):
    """Neighbours of one status made one; that they follow each other without gap, and none is empty, is asserted."""
    result = []
    for offset, length, status in runs:
        assert length > 0
        assert offset == (result[-1][0] + result[-1][1] if result else 0)
        if result and result[-1][2] == status:
            result[-1][1] += length
        else:
            result.append([offset, length, status])
    return [tuple(run) for run in result]


def assert_status(runs, content):
    """(offset, length, zero) cover all of ``content``, and what is called zero is zero there (R20). The zero bytes."""
    runs = joined(runs)
    assert runs[-1][0] + runs[-1][1] == len(content)
    for offset, length, zero in runs:
        assert not zero or content.count(0, offset, offset + length) == length, f"{offset:#x}+{length:#x} is no zero"
    return sum(length for _, length, zero in runs if zero)


def nbd_map(uri, context=None):
    """(offset, length, flags) of a context (default base:allocation) as nbdinfo shows it."""
    option = "--map" if context is None else f"--map={context}"
    return [(e["offset"], e["length"], e["type"]) for e in run_json("nbdinfo", "--json", option, uri)]


def nbd_status(uri):
    """(offset, length, zero) of base:allocation; a hole that does not read as zeroes is not ours to have."""
    extents = nbd_map(uri)
    assert {flags for _, _, flags in extents} <= {0, 3}
    return [(offset, length, flags == 3) for offset, length, flags in extents]


# ---- an export as a file ----


def nbdfuse(resources, uri, where):
    """An export as the file ``where/nbd``, unmounted by ``resources``. RuntimeError where FUSE cannot be had."""
    os.mkdir(where)
    with open(f"{where}.log", "wb") as log:
        process = subprocess.Popen(["nbdfuse", where, uri], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    resources.undo.callback(end_nbdfuse, process, where)
    end = time.monotonic() + LIMIT
    while not os.path.exists(f"{where}/nbd"):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"nbdfuse: {Path(f'{where}.log').read_text()}")
        time.sleep(0.01)
    return f"{where}/nbd"


def end_nbdfuse(process, where):
    """Unmount and wait; a loop device that is going may hold it for a moment."""
    try:
        end = time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < end:
            subprocess.run(["fusermount3", "-u", where], capture_output=True, timeout=LIMIT)
            time.sleep(0.05)
        if process.poll() is None:
            subprocess.run(["fusermount3", "-u", "-z", where], capture_output=True, timeout=LIMIT)
        assert process.poll() == 0, f"nbdfuse ended with {process.poll()}"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
