"""cbwcore restore, cbwcore verify, and the progress display."""

import io
import json
import os
import pty
import subprocess
import sys

import pytest
from images_support import UNIT, backup, changed, layout

from cbwcore.cli import progress as progress_module
from cbwcore.cli.progress import phases, progress

SIZE = 10 * UNIT + 100
COMMAND = [sys.executable, "-c", "import sys; from cbwcore.cli import main; sys.exit(main())"]


@pytest.fixture
def chain(place, rng):
    content = layout(rng, SIZE)
    backup(place / "full", content)
    new, dirty = changed(rng, content)
    backup(place / "inc", new, dirty=dirty, backing=place / "full", compress="zstd")
    return new


def test_restore(place, chain, run):
    status, out, err = run("restore", place / "inc", place / "new", "--verify")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["check", "restore", "verify"]
    assert lines[3].startswith("restored 640.1 KiB (")
    assert f"to {place}/new in " in lines[3]
    assert "read back and compared: backup " in lines[3]
    assert lines[3].endswith("2 images")
    assert (place / "new").read_bytes() == chain


def test_restore_json(place, chain, run):
    status, out, err = run("restore", place / "inc", place / "new", "--json")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told["destination"] == str(place / "new")
    assert told["size"] == SIZE
    assert told["verified"] is False
    assert len(told["chain"]) == 2


def test_verify(place, chain, run):
    status, out, err = run("verify", place / "inc")
    assert (status, err) == (0, "")
    assert [line.split(": ")[0] for line in out.splitlines()] == ["check", str(place / "inc"), str(place / "full")]
    status, out, err = run("verify", place / "inc", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["complete"] is True


def test_verify_of_a_part(place, rng, run):
    backup(place / "part", layout(rng, SIZE), sync="bitmap", dirty=[1])
    status, out, _ = run("verify", place / "part")
    assert status == 0
    assert "cannot be restored alone" in out.splitlines()[-1]


def test_force(place, chain, run):
    (place / "new").write_bytes(b"precious")
    status, out, err = run("restore", place / "inc", place / "new")
    assert (status, out) == (1, "")
    assert err == f"cbwcore: {place}/new is there already; it is replaced only where that is asked for\n"
    assert (place / "new").read_bytes() == b"precious"
    assert run("restore", place / "inc", place / "new", "--force")[0] == 0
    assert (place / "new").read_bytes() == chain


@pytest.mark.parametrize("command", ["restore", "verify"])
def test_errors_are_one_line(place, chain, run, command):
    os.unlink(place / "full")
    rest = [place / "new"] if command == "restore" else []
    status, out, err = run(command, place / "inc", *rest)
    assert (status, out) == (1, "")
    assert err.startswith(f"cbwcore: {place}/full, the parent of {place}/inc (backup ")
    assert err.count("\n") == 1
    assert not (place / "new").exists()


def test_an_io_error_names_the_file(place, chain, run):
    status, _, err = run("restore", place / "inc", place / "no" / "new")
    assert (status, err) == (1, f"cbwcore: {place}/no: No such file or directory\n")


def test_a_manifest_elsewhere(place, chain, run):
    os.rename(place / "full.cbw.json", place / "m.json")
    assert run("verify", place / "full")[0] == 1
    assert run("verify", place / "full", "--manifest", place / "m.json")[0] == 0
    assert run("restore", place / "full", place / "new", "--manifest", place / "m.json")[0] == 0


@pytest.mark.parametrize("argv", [["restore"], ["restore", "x"], ["verify"], ["verify", "x", "--verify"]])
def test_usage(run, argv):
    status, _, err = run(*argv)
    assert status == 2
    assert err.count("\n") == 1


def test_a_damaged_backup_after_progress_began(place, rng, run):
    """What was told on stdout has no summary; the error is one line."""
    backup(place / "full", layout(rng, SIZE, data=1))
    with open(place / "full", "r+b") as f:
        f.seek(UNIT)
        f.write(b"flip")
    status, out, err = run("verify", place / "full")
    assert (status, out) == (1, "")
    assert "full is damaged" in err


# ---- the display ----


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_lines(capsys):
    clock = Clock()
    with progress("backup", 100 << 20, clock=clock) as meter:
        meter.update(0)
        clock.now += 4
        meter.update(1 << 20)
        clock.now += 2
        meter.update(30 << 20)
        clock.now += 1
        meter.update(40 << 20)
        clock.now += 13
        meter.update(100 << 20)
    assert capsys.readouterr().out.splitlines() == [
        "backup: 30 %, 30 MiB of 100 MiB, 5 MiB/s, 14.0 s left",
        "backup: 100 %, 100 MiB of 100 MiB, 5 MiB/s, 0 us left",
        "backup: 100 MiB in 20.0 s, 5 MiB/s",
    ]


def test_lines_of_nothing(capsys):
    clock = Clock()
    with progress("backup", 0, clock=clock) as meter:
        clock.now += 6
        meter.update(0)
    with progress("check", 0, clock=clock):
        pass
    assert capsys.readouterr().out.splitlines() == [
        "backup: 100 %, 0 bytes of 0 bytes, 0 bytes/s",
        "backup: 0 bytes in 6.0 s, 0 bytes/s",
        "check: 0 bytes in 0 us, 0 bytes/s",
    ]


def test_quiet_and_errors(capsys):
    with progress("backup", 10, quiet=True) as meter:
        meter.update(10)
    with pytest.raises(ValueError, match="x"), progress("backup", 10) as meter:
        raise ValueError("x")

    def fails():
        with phases() as told:
            told("check", 0, 10)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fails()
    assert capsys.readouterr().out == ""


def test_phases(capsys):
    with phases() as told:
        for label in ("check", "restore"):
            for done in (0, 5, 10):
                told(label, done, 10)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["check", "restore"]


def test_a_bar_on_a_terminal(monkeypatch):
    out = io.StringIO()
    console = progress_module.Console(file=out, force_terminal=True, width=100)
    monkeypatch.setattr(progress_module, "console", lambda quiet: console)
    with progress("backup", 100 << 20) as meter:
        meter.update(50 << 20)
    assert "backup" in out.getvalue()
    assert "/100.0 MiB" in out.getvalue()


def test_restore_on_a_terminal(place, chain):
    """A bar that is gone in the end, and the summary."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "300"}
    process = subprocess.Popen(
        [*COMMAND, "restore", str(place / "inc"), str(place / "new")],
        stdout=slave,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 0
    assert b"restored 640.1 KiB" in shown
    assert b"\x1b[" in shown
