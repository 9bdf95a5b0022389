"""`cbwcore serve` from ready to the end: what it says, signals, its pid file, idle exit, systemd."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import nbd_protocol as nbd
import pytest
from engine_support import LIMIT, pattern, until
from nbd_support import Client
from serve_support import MAIN, SIZE, WRITTEN, connected, is_free, one_line

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
