"""``cbwcore backup``: what it prints, its exit codes, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import cbwcore

MIB = 1 << 20
COMMAND = [sys.executable, "-c", "import sys; from cbwcore.cli import main; sys.exit(main())", "backup"]


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(3 * MIB) + bytes(5 * MIB))
    return path


def test_the_documents_example(run, disk, tmp_path):
    """Full, then incremental, then restored; and any tool of the field opens it."""
    full, inc, back = (tmp_path / name for name in ("full.qcow2", "mon.qcow2", "new.img"))
    status, out, err = run("backup", disk, full, "--bitmap", "daily")
    assert (status, err) == (0, "")
    assert "full backup" in out
    assert "3 MiB of data" in out
    assert "bitmap daily has what is written from then on" in out
    with cbwcore.Disk(disk) as guest:
        guest.pwrite(b"monday", 4 * MIB)
    status, out, err = run("backup", disk, inc, "--bitmap", "daily", "--sync", "incremental", "--backing", full)
    assert (status, err) == (0, "")
    assert "incremental backup" in out
    assert "64 KiB of data" in out
    assert run("restore", inc, back)[0] == 0
    assert back.read_bytes() == disk.read_bytes()


def test_json(run, disk, tmp_path):
    status, out, err = run("backup", disk, tmp_path / "image", "--json", "--verify")
    assert (status, err) == (0, "")
    facts = json.loads(out)
    assert facts["sync"] == "full"
    assert facts["manifest"]["data_bytes"] == 3 * MIB
    assert facts["manifest"] == json.loads((tmp_path / "image.cbw.json").read_text())
    assert (tmp_path / "image").read_bytes() == disk.read_bytes()


def test_a_fallback_is_told(run, disk, tmp_path):
    asked = ["--bitmap", "daily", "--sync", "incremental", "--backing", tmp_path / "none.qcow2"]
    status, out, err = run("backup", disk, tmp_path / "a.qcow2", *asked)
    assert (status, out) == (1, "")
    assert err == f"cbwcore: incremental backup of {disk} is refused: it has no bitmap 'daily'\n"
    status, out, err = run("backup", disk, tmp_path / "a.qcow2", *asked, "--fallback", "full")
    assert (status, err) == (0, "")
    assert "done as a full backup: it has no bitmap 'daily'" in out


def test_without_a_bitmap_the_disk_is_only_read(run, disk, tmp_path):
    with cbwcore.Disk(disk, read_only=True):
        assert run("backup", disk, tmp_path / "image")[0] == 0
        status, _, err = run("backup", disk, tmp_path / "other", "--bitmap", "daily")
    assert status == 1
    assert "in use" in err
    assert not (tmp_path / "disk.img.cbw-bitmaps").exists()


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (["--sync", "incremental"], 2, "sync incremental needs a bitmap"),
        (["--sync", "none"], 2, "invalid choice: 'none'"),
        (["--compress", "zstd"], 2, "compress zstd needs format qcow2, not raw"),
        (["--speed", "fast"], 2, "'fast' is no number of bytes"),
        (["--workers", "0"], 2, "workers 0 is outside 1..64"),
        (["--on-source-error", "stop"], 2, "invalid choice: 'stop'"),
        (["--manifest", "elsewhere"], 1, "its manifest lies beside it"),
        (["--fleece", "/nowhere/fleece"], 1, "/nowhere/fleece"),
    ],
)
def test_refused(run, disk, tmp_path, options, status, text):
    names = set(os.listdir(tmp_path))
    found, out, err = run("backup", disk, tmp_path / "image", *options)
    assert (found, out) == (status, "")
    assert text in err
    assert err.count("\n") == 1
    assert set(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("target", ["disk.img", "there", "nowhere/image"])
def test_targets_that_will_not_do(run, disk, tmp_path, target):
    (tmp_path / "there").write_bytes(b"something")
    before = disk.read_bytes()
    status, out, err = run("backup", disk, tmp_path / target)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert str(tmp_path / target) in err or str(tmp_path / "nowhere") in err
    assert disk.read_bytes() == before
    assert (tmp_path / "there").read_bytes() == b"something"


def test_no_disk(run, tmp_path):
    status, out, err = run("backup", tmp_path / "none", tmp_path / "image")
    assert (status, out, err) == (1, "", f"cbwcore: {tmp_path / 'none'}: No such file or directory\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(disk, tmp_path, number):
    command = [*COMMAND, disk, tmp_path / "image", "--speed", "1", "--chunk-size", "64K", "--bitmap", "daily"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 30
        while not (tmp_path / "image.partial").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "cbwcore: interrupted\n"
    assert "Traceback" not in out
    assert [name for name in os.listdir(tmp_path) if name.startswith("image")] == []
    with cbwcore.Disk(disk) as again:
        assert again.bitmaps["daily"].inconsistent is None
