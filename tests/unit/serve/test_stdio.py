"""`cbwcore serve --stdio`: on sockets and pipes, and started by libnbd."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import nbd_protocol as nbd
import pytest
from engine_support import LIMIT, pattern, until
from nbd_support import Client
from programs_support import need
from serve_support import MAIN, SIZE, WRITTEN, is_free, one_line


@contextlib.contextmanager
def over_a_socket(serve, image):
    """(the command as libnbd's connect_command starts it, its client)."""
    ours, theirs = socket.socketpair()
    with ours:
        serving = serve(image, "-s", stdin=theirs, stdout=theirs)
        theirs.close()
        with Client(ours) as client:
            assert client.hello().go("disk").error == 0
            yield serving, client


def test_stdio_on_a_socket(serve, image, left):
    with over_a_socket(serve, image) as (serving, client):
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
    with over_a_socket(serve, image) as (serving, client):
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
