"""`cbwcore serve`: what it says, how it ends, whom it serves where, and that it leaves nothing behind."""

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, LIMIT, pattern, until
from nbd_support import Client, Disconnected
from programs_support import need

import cbwcore
from cbwcore.cli.arguments import parse_seconds, parse_size

SIZE = 16 * CLUSTER + 1000
MAIN = "import sys; from cbwcore.cli import main; sys.exit(main())"
WRITTEN = b"by NBD" * 100


class Serving:
    """`cbwcore serve` in a process of its own."""

    def __init__(self, *arguments, code=MAIN, stdout=subprocess.PIPE, **options):
        command = [sys.executable, "-c", code, "serve", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, **options)
        self.lines = []

    def line(self):
        """The next line on stdout."""
        data = b""
        end = time.monotonic() + LIMIT
        while not data.endswith(b"\n"):
            left = end - time.monotonic()
            assert left > 0 and select.select([self.process.stdout], [], [], left)[0], f"no line after {data!r}"  # noqa: PT018
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, f"it ended: {self.process.communicate()[1]!r}"
            data += byte
        self.lines.append(data.decode().rstrip("\n"))
        return self.lines[-1]

    def ready(self):
        """Wait until clients can come."""
        while not self.line().startswith("ready"):
            pass
        return self

    def end(self, number=signal.SIGTERM):
        """Its exit code, what else it said on stdout, and stderr, after a signal, if any."""
        if number is not None:
            self.process.send_signal(number)
        try:
            out, err = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"it does not end; stderr: {err!r}")
        return self.process.returncode, (out or b"").decode(), err.decode()

    def close(self):
        self.process.kill()  # does nothing where it has ended
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def serve():
    """``serve(*arguments)``: the command; killed at the end if it still runs."""
    with contextlib.ExitStack() as undo:

        def start(*arguments, **options):
            serving = Serving(*arguments, **options)
            undo.callback(serving.close)
            return serving

        yield start


@pytest.fixture
def image(place):
    """A disk image; its content is ``pattern(SIZE)``."""
    path = place / "disk.img"
    path.write_bytes(pattern(SIZE))
    return path


@pytest.fixture
def left(place, image):
    """``left()``: what is in the directory besides the disk."""
    return lambda: sorted(set(os.listdir(place)) - {image.name})


@pytest.fixture
def path(place):
    return str(place / "socket")


@contextlib.contextmanager
def connected(where, name="disk"):
    """A client that is served."""
    with Client(where) as client:
        assert client.hello().go(name).error == 0
        yield client


def one_line(err):
    """The one line on stderr."""
    assert err.startswith("cbwcore")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err.rstrip("\n")


def is_free(image):
    """Whether nobody has the disk locked."""
    try:
        cbwcore.Disk(image).close()
    except cbwcore.ConfigError:
        return False
    return True


# ---- from ready to the end ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_serves_and_ends_with_0(serve, image, path, left, number):
    serving = serve(image, "--socket", path)
    assert [serving.line() for _ in range(3)] == [
        f"disk      nbd+unix:///disk?socket={path}",
        f"snapshot  nbd+unix:///snapshot?socket={path}",
        f"ready: 1.0 MiB, process {serving.process.pid}",
    ]
    assert left() == ["socket"]
    with connected(path) as guest, connected(path, "snapshot") as reader:
        assert guest.flags & nbd.READ_ONLY == 0
        assert reader.flags & nbd.READ_ONLY
        guest.ok(nbd.WRITE, 1000, 0, WRITTEN)
        assert guest.read(1000, len(WRITTEN)) == WRITTEN
        assert reader.read(0, SIZE) == pattern(SIZE)
        assert serving.end(number) == (0, "", "")
        assert guest.dropped() == reader.dropped() == b""
    assert left() == []
    assert image.read_bytes()[1000 : 1000 + len(WRITTEN)] == WRITTEN
    assert is_free(image)


def test_json_is_one_line(serve, image, path, place):
    serving = serve(image, "--socket", path, "--json", "--target", place / "t", "--name", "s p")
    assert json.loads(serving.line()) == {
        "disk": str(image),
        "size": SIZE,
        "target": str(place / "t"),
        "pid": serving.process.pid,
        "exports": [
            {"name": "disk", "read_only": False, "uris": [f"nbd+unix:///disk?socket={path}"]},
            {"name": "s p", "read_only": True, "uris": [f"nbd+unix:///s%20p?socket={path}"]},
        ],
    }
    assert serving.end() == (0, "", "")


def test_a_name_is_printed_in_one_line(serve, image, path):
    serving = serve(image, "--socket", path, "--name", "a\nb", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert serving.line().startswith("disk    ")
    assert serving.line() == f"'a\\nb'  nbd+unix:///a%0Ab?socket={path}"
    serving.ready()
    assert serving.end() == (0, "", "")


def test_tcp(serve, image):
    serving = serve(image, "--listen", "127.0.0.1:0", "--no-snapshot")
    name, uri = serving.line().split()
    assert name == "disk"
    host, _, port = uri.removeprefix("nbd://").removesuffix("/disk").partition(":")
    assert serving.ready().lines[1].startswith("ready")
    with connected((host, int(port))) as client:
        assert client.read(0, 100) == pattern(SIZE)[:100]
    assert serving.end() == (0, "", "")


def test_a_signal_before_it_is_ready_ends_it_too(serve, image, path, left):
    code = f"""
import os, signal
from cbwcore.cli import serve
take = serve.take_snapshots
def slow(wanted):
    os.kill(os.getpid(), signal.SIGTERM)
    return take(wanted)
serve.take_snapshots = slow
{MAIN}"""
    serving = serve(image, "--socket", path, code=code)
    status, out, err = serving.end(None)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith("ready")
    assert left() == []


def test_what_is_in_flight_at_the_signal_is_finished(serve, image, path, left):
    """The disk takes its time for a write; the client has its answer before the server ends."""
    code = f"""
import cbwcore
from cbwcore._cbwcore import FaultPlan
init = cbwcore.Disk.__init__
def slow(self, *args, **options):
    init(self, *args, **options)
    self.plan = FaultPlan()
    self.plan.delay("pwrite", 1.0)
    self._inject(self.plan)
cbwcore.Disk.__init__ = slow
{MAIN}"""
    serving = serve(image, "--socket", path, "--no-snapshot", code=code).ready()
    with connected(path) as client:
        handle = client.request(nbd.WRITE, 0, 0, WRITTEN)
        time.sleep(0.3)
        began = time.monotonic()
        serving.process.send_signal(signal.SIGTERM)
        until(lambda: left() == [], "it stops listening")
        assert client.reply(handle).error == 0
        assert time.monotonic() - began > 0.3, "it was not in flight"
        assert client.dropped() == b""
    assert serving.end(None) == (0, "", "")
    assert image.read_bytes()[: len(WRITTEN)] == WRITTEN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(serve, image, path, left, number):
    code = f"import cbwcore, time; cbwcore.Disk.flush = lambda self: time.sleep(1000)\n{MAIN}"
    serving = serve(image, "--socket", path, code=code).ready()
    serving.process.send_signal(signal.SIGTERM)
    until(lambda: left() == [], "it ends, and hangs then")
    began = time.monotonic()
    assert serving.end(number) == (-number, "", "")
    assert time.monotonic() - began < 5


def test_the_disk_is_flushed_and_all_is_closed_in_the_end(serve, image, path):
    code = f"""
import cbwcore
for owner, name in ((cbwcore.Disk, "flush"), (cbwcore.Disk, "close"), (cbwcore.nbd.NbdServer, "close")):
    def wrap(method, text):
        def told(self):
            print(text, flush=True)
            method(self)
        return told
    setattr(owner, name, wrap(getattr(owner, name), f"{{owner.__name__}}.{{name}}"))
{MAIN}"""
    serving = serve(image, "--socket", path, code=f"import cbwcore.nbd\n{code}").ready()
    status, out, err = serving.end()
    assert (status, err) == (0, "")
    assert out.splitlines()[:3] == ["NbdServer.close", "Disk.flush", "Disk.close"]


def test_a_flush_that_fails_at_the_end_is_told(serve, image, path, left):
    code = f"""
import cbwcore
def fail(self):
    raise OSError(5, "Input/output error", self.path)
cbwcore.Disk.flush = fail
{MAIN}"""
    serving = serve(image, "--socket", path, "--pid-file", f"{path}.pid", code=code).ready()
    status, out, err = serving.end()
    assert (status, out) == (1, "")
    assert one_line(err) == f"cbwcore: {image}: Input/output error"
    assert left() == []
    assert is_free(image)


def test_a_read_only_disk_is_not_flushed(serve, image, path):
    code = f"import cbwcore; cbwcore.Disk.flush = None\n{MAIN}"
    assert serve(image, "--socket", path, "--read-only", "--no-snapshot", code=code).ready().end() == (0, "", "")


def test_a_reader_that_has_gone_gets_no_traceback(serve, image, path, left):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        serving = serve(image, "--socket", path, stdout=stdout)
        assert serving.end(None)[::2] == (1, "")
    assert left() == []


def test_a_full_stdout_is_an_error(serve, image, path, left):
    with open("/dev/full", "wb") as full:
        status, _, err = serve(image, "--socket", path, "--json", stdout=full).end(None)
    assert status == 1
    assert "No space left on device" in one_line(err)
    assert left() == []


def test_a_stdout_that_is_closed_later_does_not_matter(serve, image, path):
    serving = serve(image, "--socket", path).ready()
    serving.process.stdout.close()
    with connected(path) as client:
        assert client.read(0, 6) == pattern(SIZE)[:6]
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(LIMIT) == 0


# ---- pid file, idle exit, systemd ----


def test_pid_file(serve, image, path, place, left):
    pid_file = place / "pid"
    pid_file.write_text("an old one that is longer\n")
    serving = serve(image, "--socket", path, "--pid-file", pid_file).ready()
    assert pid_file.read_text() == f"{serving.process.pid}\n"
    assert left() == ["pid", "socket"]
    assert serving.end() == (0, "", "")
    assert left() == []


def test_a_pid_file_of_another_is_left(serve, image, path, place, left):
    pid_file = place / "pid"
    serving = serve(image, "--socket", path, "--pid-file", pid_file).ready()
    pid_file.write_text("1\n")
    assert serving.end() == (0, "", "")
    assert left() == ["pid"]


def test_a_pid_file_that_cannot_be_is_an_error(serve, image, path, place, left):
    status, out, err = serve(image, "--socket", path, "--pid-file", place / "missing" / "pid").end(None)
    assert (status, out) == (1, "")
    assert one_line(err) == f"cbwcore: {place}/missing/pid: No such file or directory"
    assert left() == []


def test_a_pid_file_where_a_directory_is(serve, image, path, place, left):
    (place / "pid").mkdir()
    status, out, err = serve(image, "--socket", path, "--pid-file", place / "pid").end(None)
    assert (status, out) == (1, "")
    assert one_line(err) == f"cbwcore: {place}/pid: Is a directory"
    assert left() == ["pid"]


def test_idle_exit(serve, image, path, left):
    began = time.monotonic()
    serving = serve(image, "--socket", path, "--idle-exit", "0.5").ready()
    with connected(path) as client:
        time.sleep(1)
        assert client.read(0, 6) == pattern(SIZE)[:6], "it ended while it had a client"
        client.disconnect()
    gone = time.monotonic()
    assert serving.end(None) == (0, "", "")
    assert time.monotonic() - gone >= 0.3
    assert time.monotonic() - began < LIMIT
    assert left() == []


def test_idle_exit_without_any_client(serve, image, path, left):
    assert serve(image, "--socket", path, "--idle-exit", "0.2").ready().end(None) == (0, "", "")
    assert left() == []


ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = "1"
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], "serve", *sys.argv[3:]])
"""


@contextlib.contextmanager
def activation(path, *arguments, manager=None):
    """The command, started by a client that waits already, as systemd does it."""
    with socket.socket(socket.AF_UNIX) as listener, Client(listener_at(listener, path)) as waiting:
        env = {k: v for k, v in os.environ.items() if k != "NOTIFY_SOCKET"}
        if manager is not None:
            env["NOTIFY_SOCKET"] = manager
        process = subprocess.Popen(
            [sys.executable, "-c", ACTIVATED, str(listener.fileno()), MAIN, *map(str, arguments)],
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
        try:
            yield process, waiting, listener
        finally:
            process.kill()
            process.communicate()


def listener_at(listener, path):
    listener.bind(path)
    listener.listen()
    return path


def finish(process, number=signal.SIGTERM):
    process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out.decode(), err.decode()


def test_socket_activation(image, path, left):
    with activation(path, image) as (process, waiting, listener):
        assert waiting.hello().go("snapshot").error == 0
        assert waiting.read(0, SIZE) == pattern(SIZE)
        assert finish(process) == (0, "", ""), "stdout is not this server's to write to"
        assert waiting.dropped() == b""
        assert left() == ["socket"], "the socket is whose it was"
        with socket.socket(socket.AF_UNIX) as late:  # and it still listens, so that the next client starts it again
            late.connect(path)
            listener.settimeout(LIMIT)
            listener.accept()[0].close()


def test_socket_activation_with_json(image, path):
    with activation(path, image, "--json", "--no-snapshot") as (process, waiting, _):
        waiting.hello()
        status, out, err = finish(process)
        assert (status, err) == (0, "")
        assert json.loads(out)["exports"][0]["uris"] == [f"nbd+unix:///disk?socket={path}"]


def test_activation_for_another_process_is_none(image, path):
    env = {**os.environ, "LISTEN_PID": "1", "LISTEN_FDS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "serve", image],
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "where is it to serve?" in one_line(done.stderr)


@pytest.mark.parametrize("way", ["socket", "activated"])
def test_the_service_manager_is_told(serve, image, path, place, way):
    name = str(place / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, contextlib.ExitStack() as undo:
        manager.bind(name)
        manager.settimeout(LIMIT)
        if way == "socket":
            process = serve(image, "--socket", path, env={**os.environ, "NOTIFY_SOCKET": name}).process
        else:
            process, waiting, _ = undo.enter_context(activation(path, image, manager=name))
            waiting.hello()
        assert manager.recv(100) == b"READY=1"
        with connected(path) as client:
            assert client.size == SIZE
        process.send_signal(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, err) == (0, b"")
        assert len(out.splitlines()) == (3 if way == "socket" else 0)


def test_a_start_that_fails_is_not_ready(serve, path, place):
    name = str(place / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        manager.setblocking(False)
        serving = serve(place / "missing", "--socket", path, env={**os.environ, "NOTIFY_SOCKET": name})
        assert serving.end(None)[0] == 1
        with pytest.raises(BlockingIOError):
            manager.recv(100)


# ---- stdio ----


def test_stdio_on_a_socket(serve, image, left):
    """As libnbd's connect_command starts it."""
    ours, theirs = socket.socketpair()
    with ours:
        serving = serve(image, "-s", stdin=theirs, stdout=theirs)
        theirs.close()
        with Client(ours) as client:
            assert client.hello().go("disk").error == 0
            client.ok(nbd.WRITE, 5, 0, WRITTEN)
            assert client.read(5, len(WRITTEN)) == WRITTEN
            client.disconnect()
        assert serving.end(None) == (0, "", "")
    assert image.read_bytes()[5 : 5 + len(WRITTEN)] == WRITTEN
    assert left() == []


@pytest.mark.parametrize("goodbye", [True, False], ids=["disconnect", "gone"])
def test_stdio_on_pipes(serve, image, goodbye):
    serving = serve(image, "--stdio", stdin=subprocess.PIPE)
    with piped(serving.process) as sock, Client(sock) as client:
        assert client.hello().go("snapshot").error == 0
        assert client.read(0, SIZE) == pattern(SIZE)
        if goodbye:
            client.disconnect()
    assert serving.process.wait(LIMIT) == 0
    assert serving.process.stderr.read() == b""


@contextlib.contextmanager
def piped(process):
    """A socket whose bytes go to a process's stdin, and come from its stdout."""
    ours, theirs = socket.socketpair()

    def send():
        with process.stdin:
            while data := theirs.recv(65536):
                process.stdin.write(data)
                process.stdin.flush()

    def receive():
        while data := os.read(process.stdout.fileno(), 65536):
            theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=send, daemon=True), threading.Thread(target=receive, daemon=True)]
    with ours, theirs:
        for thread in threads:
            thread.start()
        yield ours
        ours.close()
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()


def test_a_signal_ends_stdio(serve, image, left):
    ours, theirs = socket.socketpair()
    with ours:
        serving = serve(image, "-s", stdin=theirs, stdout=theirs)
        theirs.close()
        with Client(ours) as client:
            assert client.hello().go("disk").error == 0
            assert serving.end() == (0, "", "")
            assert client.dropped() == b""
    assert left() == []


def test_a_signal_ends_stdio_on_pipes_that_stay_open(serve, image):
    serving = serve(image, "-s", stdin=subprocess.PIPE)
    assert os.read(serving.process.stdout.fileno(), 18)[:8] == b"NBDMAGIC"
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(LIMIT) == 0
    assert serving.process.stdout.read() == b""


@pytest.mark.parametrize("stdin", ["/dev/null", "closed"])
def test_stdio_on_neither_is_a_usage_error(image, left, stdin):
    redirect = "<&-" if stdin == "closed" else "</dev/null"
    command = ["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", MAIN, "serve", "-s", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "neither a socket nor two pipes" in one_line(done.stderr)
    assert left() == []


def test_libnbd_starts_it_and_finds_a_server(image, left):
    """`[ ... ]` is socket activation; what nbdinfo and nbdcopy have on their stdout is theirs alone."""
    need("nbdinfo")
    need("nbdcopy")
    brackets = ["[", sys.executable, "-c", MAIN, "serve", str(image), "]"]
    done = subprocess.run(["nbdinfo", "--size", "--", *brackets], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"%d\n" % SIZE, b"")
    until(lambda: is_free(image), "it ended")
    done = subprocess.run(["nbdcopy", "--", *brackets, "-"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == pattern(SIZE)
    assert left() == []


def test_libnbds_connect_command(image):
    python = "/usr/bin/python3"
    if subprocess.run([python, "-c", "import nbd"], capture_output=True, check=False).returncode:
        pytest.skip("there is no python3-libnbd")
    code = """
import nbd, sys
h = nbd.NBD()
h.set_export_name("disk")
h.connect_command(sys.argv[1:])
h.pwrite(b"by libnbd", 12345)
assert h.pread(9, 12345) == b"by libnbd"
h.shutdown()
"""
    command = [python, "-c", code, sys.executable, "-c", MAIN, "serve", "--stdio", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    until(lambda: is_free(image), "it ended")
    assert image.read_bytes()[12345:12354] == b"by libnbd"


# ---- what is served ----


def test_no_snapshot(serve, image, path, left):
    serving = serve(image, "--socket", path, "--no-snapshot").ready()
    assert len(serving.lines) == 2
    with Client(path) as client:
        assert client.hello().option(nbd.LIST).names == ["disk"]
        assert client.go("snapshot").error == nbd.ERR_UNKNOWN
    assert serving.end() == (0, "", "")


def test_read_only(serve, image, path):
    serving = serve(image, "--socket", path, "--read-only").ready()
    with connected(path) as client:
        assert client.flags & nbd.READ_ONLY
        assert client.call(nbd.WRITE, 0, 0, WRITTEN).error == nbd.EPERM
    with cbwcore.Disk(image, read_only=True) as other:
        assert other.size == SIZE
    assert serving.end() == (0, "", "")
    assert image.read_bytes() == pattern(SIZE)


def test_name_and_target(serve, image, path, place, left):
    target = place / "fleece"
    serving = serve(image, "--socket", path, "--name", "T0", "--target", target, "--cluster-size", "4k").ready()
    with connected(path) as guest, connected(path, "T0") as reader:
        guest.ok(nbd.WRITE, 8192, 0, WRITTEN)
        assert reader.read(8000, 1000) == pattern(SIZE)[8000:9000]
    assert serving.end() == (0, "", "")
    assert left() == ["fleece"]
    assert target.stat().st_size == SIZE
    fleece = target.read_bytes()
    assert fleece[8192:12288] == pattern(SIZE)[8192:12288]
    assert not any(fleece[:8192])
    assert not any(fleece[12288:])


def dirty(client, size=SIZE):
    """The extents of the one bitmap that the client has chosen, (length, flags)."""
    (extents,) = client.ok(nbd.BLOCK_STATUS, 0, size).status.values()
    return extents


@contextlib.contextmanager
def choosing(where, export, bitmap):
    """A client that has chosen a bitmap's context."""
    with Client(where) as client:
        client.hello().option(nbd.STRUCTURED_REPLY)
        reply = client.meta(nbd.SET_META_CONTEXT, export, f"qemu:dirty-bitmap:{bitmap}")
        assert set(reply.names) == {f"qemu:dirty-bitmap:{bitmap}"}
        assert client.go(export).error == 0
        yield client


def test_bitmaps_of_the_disk_as_they_are_and_of_the_snapshot_as_at_t0(serve, image, path):
    """And they are there again the next time, with all that was written in between; others of the disk record, too."""
    with cbwcore.Disk(image) as disk:
        disk.bitmaps.add("unasked", persistent=True)
    before = []
    for unit in (1, 3):
        serving = serve(image, "--socket", path, "--bitmap", "a", "--bitmap", "b").ready()
        with connected(path) as guest:
            guest.ok(nbd.WRITE, unit * CLUSTER, 0, WRITTEN)
        for export, units in (("disk", [*before, unit]), ("snapshot", before)):
            with Client(path) as client:
                client.hello().option(nbd.STRUCTURED_REPLY)
                reply = client.meta(nbd.LIST_META_CONTEXT, export)
                assert set(reply.names) == {"base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"}
            with choosing(path, export, "b") as client:
                offset, found = 0, []
                for length, flags in dirty(client):
                    found += [offset // CLUSTER] * flags
                    offset += length
                assert (offset, found) == (SIZE, units)
        before.append(unit)
        assert serving.end() == (0, "", "")
    with cbwcore.Disk(image) as disk:
        assert list(disk.bitmaps) == ["unasked", "a", "b"]
        for bitmap in disk.bitmaps.values():
            assert bitmap.persistent
            assert list(bitmap.ranges()) == [(CLUSTER, CLUSTER), (3 * CLUSTER, CLUSTER)]


def test_bitmaps_survive_a_kill(serve, image, path):
    serving = serve(image, "--socket", path, "--bitmap", "a").ready()
    with connected(path) as guest:
        guest.ok(nbd.WRITE, 2 * CLUSTER, 0, WRITTEN)
        serving.end(signal.SIGKILL)
    with cbwcore.Disk(image) as disk:
        assert list(disk.bitmaps["a"].ranges()) == [(2 * CLUSTER, CLUSTER)]


def test_a_file_of_bitmaps_elsewhere(serve, image, path, place, left):
    own = place / "own"
    assert serve(image, "--socket", path, "--bitmap", "a", "--bitmaps", own).ready().end() == (0, "", "")
    assert left() == ["own"]
    with cbwcore.Disk(image, bitmaps=own) as disk:
        assert list(disk.bitmaps) == ["a"]


def test_bitmaps_of_a_disk_that_is_read_only(serve, image, path, left):
    """Those that there are; others in memory, for nothing is written."""
    with cbwcore.Disk(image) as disk:
        disk.bitmaps.add("a", persistent=True)
        disk.pwrite(WRITTEN, CLUSTER)
    before = (image.parent / f"{image.name}.cbw-bitmaps").read_bytes()
    serving = serve(image, "--socket", path, "--read-only", "--bitmap", "a", "--bitmap", "new").ready()
    for export in ("disk", "snapshot"):
        for bitmap, flags in (("a", [0, 1, 0]), ("new", [0])):
            with choosing(path, export, bitmap) as client:
                assert [each[1] for each in dirty(client)] == flags
    assert serving.end() == (0, "", "")
    assert (image.parent / f"{image.name}.cbw-bitmaps").read_bytes() == before


def test_a_block_device_without_a_file_has_them_in_memory(serve, image, path, resources, left):
    try:
        os.truncate(image, 16 * CLUSTER)
        device = resources.loop(str(image))
    except RuntimeError as e:
        pytest.skip(str(e))
    serving = serve(device, "--socket", path, "--no-snapshot", "--bitmap", "a").ready()
    with choosing(path, "disk", "a") as client:
        assert dirty(client, 16 * CLUSTER) == [(16 * CLUSTER, 0)]
    assert serving.end() == (0, "", "")
    assert left() == []


@pytest.mark.parametrize("damage", ["inconsistent", "damaged"])
def test_a_bitmap_that_would_say_too_little_is_not_shown_and_the_guest_is_served(serve, image, path, damage):
    with cbwcore.Disk(image) as disk:
        disk.bitmaps.add("a", persistent=True)
        disk.bitmaps.add("b", persistent=True)
    if damage == "inconsistent":
        image.write_bytes(pattern(SIZE))
    else:
        (image.parent / f"{image.name}.cbw-bitmaps").write_bytes(b"")
    serving = serve(image, "--socket", path, "--bitmap", "a").ready()
    with Client(path) as client:
        client.hello().option(nbd.STRUCTURED_REPLY)
        assert client.meta(nbd.LIST_META_CONTEXT, "disk").names == ["base:allocation"]
    with connected(path) as guest:
        guest.ok(nbd.WRITE, 0, 0, WRITTEN)
    status, out, err = serving.end()
    assert (status, out) == (0, "")
    assert "bitmap 'a' is not shown: " in err
    assert damage in err


@pytest.mark.parametrize("discard", [False, True])
def test_discard_is_asked_for(serve, image, path, discard):
    serving = serve(image, "--socket", path, *(["--discard"] if discard else [])).ready()
    with connected(path, "snapshot") as reader:
        assert bool(reader.flags & nbd.SEND_TRIM) is discard
        assert reader.call(nbd.TRIM, 0, CLUSTER).error == (0 if discard else nbd.EPERM)
        assert reader.call(nbd.READ, 0, CLUSTER).error == (nbd.EIO if discard else 0)
    assert serving.end() == (0, "", "")


def test_direct(serve, image, path):
    try:
        cbwcore.Disk(image, direct=True).close()
    except cbwcore.ConfigError:
        status, _, err = serve(image, "--socket", path, "--direct").end(None)
        assert status == 1
        assert "has no O_DIRECT" in one_line(err)
        return
    serving = serve(image, "--socket", path, "--direct", "--io", "psync").ready()
    with connected(path) as client:
        client.ok(nbd.WRITE, 3, 0, WRITTEN)
        assert client.read(0, 10) == pattern(SIZE)[:3] + WRITTEN[:7]
    assert serving.end() == (0, "", "")


def test_a_break_is_told_in_one_line_with_its_cause(serve, image, path):
    serving = serve(
        image, "--socket", path, "--on-cbw-error", "break-snapshot", "--target-limit", "64K", "--cbw-timeout", "30"
    ).ready()
    with connected(path) as guest, connected(path, "snapshot") as reader:
        guest.ok(nbd.WRITE, 0, 0, WRITTEN)
        assert reader.read(0, SIZE) == pattern(SIZE)
        guest.ok(nbd.WRITE, CLUSTER, 0, WRITTEN)
        assert reader.call(nbd.READ, 0, 1).error == nbd.EIO
        line = serving.process.stderr.readline().decode()
        assert one_line(line) == (
            f"cbwcore: {image}: snapshot 'snapshot' is broken: [Errno 28] copy-before-write failed in target-write "
            f"at offset {CLUSTER}, length {CLUSTER}: No space left on device"
        )
    assert serving.end() == (0, "", "")


def test_the_other_policy_refuses_the_write(serve, image, path):
    serving = serve(image, "--socket", path, "--target-limit", "0").ready()
    with connected(path) as guest, connected(path, "snapshot") as reader:
        assert guest.call(nbd.WRITE, 0, 0, WRITTEN).error == nbd.EIO
        assert reader.read(0, SIZE) == pattern(SIZE)
    assert serving.end() == (0, "", "")


def test_limits_and_users(serve, image, path):
    serving = serve(image, "--socket", path, "--max-connections", "1", "--allow-uid", str(os.geteuid())).ready()
    with connected(path), Client(path) as second:
        assert second.dropped() == b""
    status, _, err = serving.end()
    assert status == 0
    assert "refused: there are 1 connections, the limit" in one_line(err)
    serving = serve(image, "--socket", path, "--allow-uid", str(os.geteuid() + 1)).ready()
    with Client(path) as stranger:
        assert stranger.dropped() == b""
    assert f"refused: user {os.geteuid()} may not connect" in one_line(serving.end()[2])


def test_a_client_that_breaks_the_protocol_is_told_of_in_one_line(serve, image, path):
    serving = serve(image, "--socket", path).ready()
    with Client(path) as client:
        client.hello()
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(Disconnected):
            client.dropped()
    with connected(path) as client:
        client.send(b"x" * 28)
        assert client.dropped() == b""
    status, _, err = serving.end()
    assert status == 0
    first, second = err.splitlines()
    assert "dropped in the handshake: bad magic" in first
    assert "export 'disk': bad magic" in second


def test_tls(serve, image, certificates):
    need("nbdcopy")
    serving = serve(image, "--listen", "localhost:0", "--tls-dir", certificates)
    uri = serving.line().split()[1]
    assert uri.startswith("nbds://localhost:")
    serving.ready()
    command = ["nbdcopy", f"{uri}?tls-certificates={certificates}", "-"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == pattern(SIZE)
    assert serving.end() == (0, "", "")


def test_tls_may_be_left_to_the_client_on_a_unix_socket(serve, image, path, certificates):
    serving = serve(image, "--socket", path, "--tls-dir", certificates, "--tls", "allow").ready()
    with connected(path) as client:
        assert client.read(0, 6) == pattern(SIZE)[:6]
    assert serving.end() == (0, "", "")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "where is it to serve?"),
        (["--socket", "s", "--listen", "localhost:0"], "not allowed with"),
        (["--socket", "s", "--stdio"], "not allowed with"),
        (["--listen", "localhost"], "'localhost' is not HOST:PORT"),
        (["--listen", "localhost:99999"], "not HOST:PORT"),
        (["--listen", "0.0.0.0:0"], "can be reached from other machines"),
        (["--listen", "[::]:0"], "can be reached from other machines"),
        (["--listen", "localhost:0", "--allow-uid", "0"], "--allow-uid is for unix sockets"),
        (["--socket", "s", "--allow-uid", "me"], "invalid int value"),
        (["--socket", "s", "--allow-uid", "-1"], "-1"),
        (["--socket", "s", "--tls", "allow"], "--tls needs --tls-dir"),
        (["--socket", "s", "--tls", "maybe", "--tls-dir", "d"], "invalid choice"),
        (["--socket", "s", "--max-connections", "0"], "connections 0"),
        (["--socket", "s", "--max-connections", "x"], "invalid int value"),
        (["--socket", "s", "--idle-exit", "0"], "'0' is no number of seconds above 0"),
        (["--socket", "s", "--idle-exit", "nan"], "'nan' is no number of seconds"),
        (["--socket", "s", "--idle-exit", "soon"], "'soon' is no number of seconds"),
        (["--stdio", "--idle-exit", "5"], "there is --stdio"),
        (["--stdio", "--json"], "there is --stdio"),
        (["--socket", "s", "--cluster-size", "5000"], "cluster_size 5000 is no power of two"),
        (["--socket", "s", "--cluster-size", "1X"], "'1X' is no number of bytes"),
        (["--socket", "s", "--target-limit", "-1"], "'-1' is no number of bytes"),
        (["--socket", "s", "--cbw-timeout", "-1"], "cbw_timeout -1.0 is not"),
        (["--socket", "s", "--cbw-timeout", "nan"], "cbw_timeout nan is not"),
        (["--socket", "s", "--on-cbw-error", "panic"], "invalid choice"),
        (["--socket", "s", "--io", "magic"], "invalid choice"),
        (["--socket", "s", "--name", "disk"], "is the name of the disk's export"),
        (["--socket", "s", "--name", ""], "name '' is not 1 to"),
        (["--socket", "s", "--bitmap", "b", "--bitmap", "b"], "two bitmaps cannot have one name"),
        (["--socket", "s", "--bitmap", ""], "name '' is not 1 to"),
        (["--socket", "s", "--no-snapshot", "--target", "t"], "--target is for the snapshot"),
        (["--socket", "s", "--no-snapshot", "--target-limit", "0"], "--target-limit is for the snapshot"),
        (["--socket", "s", "--no-snapshot", "--name", "n"], "--name is for the snapshot"),
        (["--socket", "s", "--no-snapshot", "--discard"], "--discard is for the snapshot"),
        (["--socket", "s", "--no-snapshot", "--cbw-timeout", "0"], "--cbw-timeout is for the snapshot"),
        (["--socket", "s", "--frobnicate"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(run, image, place, left, monkeypatch, arguments, text):
    monkeypatch.chdir(place)
    status, out, err = run("serve", image, *arguments)
    assert (status, out) == (2, "")
    assert text in one_line(err)
    assert left() == []
    assert is_free(image)


def test_without_a_disk(run):
    status, out, err = run("serve", "--socket", "s")
    assert (status, out) == (2, "")
    assert "required: DISK" in one_line(err)


def test_help(run):
    status, out, err = run("serve", "--help")
    assert (status, err) == (0, "")
    for option in ("--socket", "--listen", "--stdio", "--tls-dir", "--bitmap", "--target", "--idle-exit"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["missing.img", "--socket", "s"], "missing.img: No such file or directory"),
        ([".", "--socket", "s"], ".: Is a directory"),
        (["disk.img", "--socket", "disk.img"], "/disk.img is in use: there is something that is no socket"),
        (["disk.img", "--socket", "missing/s"], "missing/s cannot be made: No such file or directory"),
        (["disk.img", "--socket", "x" * 200], "at most 107 are possible"),
        (["disk.img", "--socket", "s", "--tls-dir", "missing"], "TLS needs missing/ca-cert.pem, which is no file"),
        (["disk.img", "--socket", "s", "--target", "missing/t"], "missing/t"),
        (["disk.img", "--socket", "s", "--target", "disk.img"], "is the disk itself"),
        (["disk.img", "--listen", "no.such.host.invalid:0"], "address 'no.such.host.invalid:0'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done(run, image, place, left, monkeypatch, arguments, text):
    monkeypatch.chdir(place)
    before = image.read_bytes()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    status, out, err = run("serve", *arguments)
    assert (status, out) == (1, "")
    assert text in one_line(err)
    assert left() == []
    assert image.read_bytes() == before
    assert is_free(image)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [t.name for t in threading.enumerate() if t.name.startswith("nbd")] == []


def test_a_disk_in_use(run, image, path, left):
    with cbwcore.Disk(image):
        status, out, err = run("serve", image, "--socket", path)
    assert (status, out) == (1, "")
    assert one_line(err) == f"cbwcore: {image} is in use: another process or Disk has it locked"
    assert left() == []


def test_two_servers_at_one_place(serve, image, path, place, left):
    first = serve(image, "--socket", path).ready()
    other = place / "other.img"
    other.write_bytes(bytes(CLUSTER))
    status, out, err = serve(other, "--socket", path).end(None)
    assert (status, out) == (1, "")
    assert one_line(err) == f"cbwcore: socket {path} is in use: another process listens on it"
    with connected(path) as client:
        assert client.size == SIZE
    assert first.end()[:2] == (0, "")


def test_a_server_that_was_killed_is_followed_by_another(serve, image, path, left):
    serving = serve(image, "--socket", path).ready()
    serving.end(signal.SIGKILL)
    assert left() == ["socket"]
    serving = serve(image, "--socket", path).ready()
    with connected(path) as client:
        assert client.size == SIZE
    assert serving.end() == (0, "", "")
    assert left() == []


# ---- numbers ----


@pytest.mark.parametrize(("text", "nbytes"), [("0", 0), ("512", 512), ("64k", 65536), ("3G", 3 << 30), ("1T", 1 << 40)])
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "K", "1.5M", "-1", "1KB", "\u0661", "9" * 30, "8388608T"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="bytes"):
        parse_size(text)


def test_seconds():
    assert parse_seconds("1.5") == 1.5
    assert parse_seconds("1e6") == 1e6
    for text in ("0", "-1", "inf", "nan", "", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="seconds above 0"):
            parse_seconds(text)
