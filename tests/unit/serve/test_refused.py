"""`cbwcore serve`: what it refuses, in one line, leaving nothing behind; numbers on its command line."""

import argparse
import signal
import threading

import pytest
from engine_support import CLUSTER
from serve_support import SIZE, connected, is_free, one_line

import cbwcore
from cbwcore.cli.arguments import parse_seconds, parse_size

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
