"""The command line: what it prints, its exit codes, and that it leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cbwcore._cbwcore import io_uring_state
from cbwcore.cli import demo as demo_module
from cbwcore.cli import image as image_module
from cbwcore.cli import load as load_module
from cbwcore.cli import output as output_module
from cbwcore.cli import policies as policies_module
from cbwcore.disk import Disk
from cbwcore.engines import choose_engine

MIB = 1 << 20
QUICK = ["--size", "2M", "--seconds", "0.2", "--seed", "7"]
COMMAND = [sys.executable, "-c", "import sys; from cbwcore.cli import main; sys.exit(main())"]
IS_ROOT = os.geteuid() == 0

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A directory for --dir, which must be empty again afterwards."""
    directory = tmp_path / "work"
    directory.mkdir()
    yield directory
    assert list(directory.iterdir()) == []


@pytest.fixture
def no_slow_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the cases out that have to wait."""
    monkeypatch.setattr(demo_module, "FAULTS", (policies_module.TargetFull,))


@pytest.fixture
def no_mkfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without e2fsprogs."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(image_module, "SBIN", "")


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A loop device with sectors of 512 bytes, and the file behind it."""
    if not IS_ROOT:
        pytest.skip("loop devices need root")
    if shutil.which("losetup") is None:
        pytest.skip("there is no losetup")
    backing = tmp_path / "backing.img"
    backing.write_bytes(random.Random(5).randbytes(2 * MIB))
    made = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"losetup: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device, backing
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def one_line(err: str) -> str:
    """The error; there is nothing else on stderr."""
    assert err.startswith("cbwcore: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err.rstrip("\n")


def spawn(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run([*COMMAND, *argv], capture_output=True, text=True, check=False, timeout=60)


# ---- demo ----


def test_demo_shows_every_run_in_one_table_that_fits_80_columns(
    run: Main, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run("demo", *QUICK, "--dir", work)
    assert status == 0
    assert err == ""
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "Every proof held."
    rows = {line[:15].strip(): line[15:].split() for line in lines}
    assert rows["refused"] == ["0", "8", "ENOSPC", "8", "ETIMEDOUT", "0", "0"]
    assert rows["snapshot"] == ["armed"] * 3 + ["broken"] * 2
    assert rows["first cause"] == ["-", "-", "-", "ENOSPC", "ETIMEDOUT"]
    assert rows["proofs"] == ["4", "held", "8", "held", "8", "held", "5", "held", "5", "held"]
    assert "seed 7" in out


def test_demo_json_is_one_document_with_the_same_facts(work: Path) -> None:
    done = spawn("demo", *QUICK, "--dir", work, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["held"] is True
    assert report["seed"] == 7
    assert report["disk_size"] == 2 * MIB
    hashes = report["sha256"]
    assert hashes["t0"] == hashes["backup"] == hashes["snapshot"] != hashes["disk"]
    load, *cases = report["runs"]
    assert all(proof["held"] for r in report["runs"] for proof in r["proofs"])
    assert load["guest"]["requests"] > 0
    assert load["cost"]["copied_bytes"] > 0
    assert [(c["policy"], c["fault"], c["guest"]["error"], c["snapshot"]["cause"]) for c in cases] == [
        ("break-guest-write", "target full", "ENOSPC", None),
        ("break-guest-write", "target slow", "ETIMEDOUT", None),
        ("break-snapshot", "target full", None, "ENOSPC"),
        ("break-snapshot", "target slow", None, "ETIMEDOUT"),
    ]
    for case in cases[:2]:
        assert case["snapshot"]["reads"] == "T0 data"
        assert case["guest"]["then_ok"] == case["guest"]["refused"] > 0
    for case in cases[2:]:
        assert (case["snapshot"]["reads"], case["snapshot"]["error"]) == ("SnapshotBrokenError", "EACCES")
        assert case["guest"]["refused"] == 0


@pytest.mark.usefixtures("no_slow_target")
def test_demo_repeats_a_pattern_disk_and_the_cases_by_seed(run: Main, work: Path, no_mkfs: None) -> None:
    reports = [json.loads(run("demo", *QUICK, "--dir", work, "--json")[1]) for _ in range(2)]
    assert reports[0]["disk"] == "a seeded pattern"
    assert reports[0]["sha256"]["t0"] == reports[1]["sha256"]["t0"]


@pytest.mark.usefixtures("no_slow_target", "no_mkfs")
def test_demo_without_mkfs_makes_a_pattern(run: Main, work: Path) -> None:
    status, out, err = run("demo", *QUICK, "--dir", work)
    assert (status, err) == (0, "")
    assert "a seeded pattern" in out


@pytest.mark.usefixtures("no_slow_target")
def test_demo_falls_back_to_a_pattern_where_mkfs_fails(
    run: Main, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkfs = tmp_path / "mkfs.ext4"
    mkfs.write_text("#!/bin/sh\necho unknown option >&2\nexit 1\n")
    mkfs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    status, out, err = run("demo", *QUICK, "--dir", work)
    assert (status, err) == (0, "")
    assert "a seeded pattern" in out


@pytest.mark.usefixtures("no_slow_target")
def test_demo_uses_a_sparse_copy_of_the_users_disk_and_only_reads_it(run: Main, work: Path, tmp_path: Path) -> None:
    disk = tmp_path / "mine.img"
    with open(disk, "wb") as f:
        f.write(random.Random(3).randbytes(MIB))
        f.truncate(3 * MIB + 777)
    before = disk.read_bytes(), os.stat(disk).st_mtime_ns, os.stat(disk).st_blocks
    status, out, _ = run("demo", "--disk", disk, "--seconds", "0.2", "--dir", work, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["sha256"]["t0"] == hashlib.sha256(before[0]).hexdigest()
    assert report["disk"] == f"a copy of {disk}"
    assert (disk.read_bytes(), os.stat(disk).st_mtime_ns, os.stat(disk).st_blocks) == before


@pytest.mark.usefixtures("no_slow_target")
def test_demo_copies_a_block_device(run: Main, work: Path, loop_device: tuple[str, Path]) -> None:
    device, backing = loop_device
    before = backing.read_bytes()
    status, out, _ = run("demo", "--disk", device, "--seconds", "0.2", "--dir", work, "--json")
    assert status == 0
    assert json.loads(out)["sha256"]["t0"] == hashlib.sha256(before).hexdigest()
    assert backing.read_bytes() == before


def test_copy_keeps_holes(tmp_path: Path) -> None:
    source, copy = tmp_path / "source.img", tmp_path / "copy.img"
    with open(source, "wb") as f:
        f.truncate(64 * MIB)
        f.seek(32 * MIB)
        f.write(b"x" * 65536)
    done: list[int] = []
    with Disk(source, read_only=True) as disk:
        image_module.copy_out(disk, copy, done.append)
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks * 512 <= MIB
    assert done[-1] == 64 * MIB
    assert done == sorted(done)


# ---- a proof that fails ----


@pytest.mark.usefixtures("no_slow_target")
def test_demo_exits_1_and_names_the_proof_when_the_backup_is_wrong(
    run: Main, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_with_a_flipped_bit(*args: object) -> None:
        image_module.copy_out(*args)  # type: ignore[arg-type]
        with open(args[1], "r+b") as f:  # type: ignore[call-overload]
            first = f.read(1)[0]
            f.seek(0)
            f.write(bytes([first ^ 1]))

    monkeypatch.setattr(load_module, "copy_out", copy_with_a_flipped_bit)
    status, out, err = run("demo", *QUICK, "--dir", work)
    assert status == 1
    assert "1 FAILED" in out
    assert "Every proof held" not in out
    assert "backup under load: the backup equals the disk at T0" in one_line(err)
    status, out, err = run("demo", *QUICK, "--dir", work, "--json")
    assert status == 1
    assert json.loads(out)["held"] is False
    one_line(err)


@pytest.mark.usefixtures("no_slow_target")
def test_demo_notices_a_target_that_never_runs_full(run: Main, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies_module.TargetFull, "options", {})
    status, _, err = run("demo", *QUICK, "--dir", work)
    assert status == 1
    assert "then guest writes were refused with ENOSPC" in one_line(err)
    assert "the snapshot is broken, by ENOSPC" in err


@pytest.mark.usefixtures("no_slow_target")
def test_demo_notices_guests_that_do_nothing(run: Main, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbwcore.cli.guests.Guest.run", lambda self, stop: None)
    status, _, err = run("demo", *QUICK, "--dir", work)
    assert status == 1
    assert one_line(err).endswith("this did not hold: backup under load: the disk has moved on")


@pytest.mark.usefixtures("no_slow_target")
def test_demo_reports_the_error_that_a_guest_got(run: Main, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, offset: int, length: int) -> None:
        raise OSError(5, "Input/output error", "/the/disk")

    monkeypatch.setattr("cbwcore.cli.guests.Guest.write", fail)
    status, _, err = run("demo", *QUICK, "--dir", work)
    assert (status, one_line(err)) == (1, "cbwcore: /the/disk: Input/output error")


# ---- demo: errors ----


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "is neither a regular file nor a block device"),
        (lambda path: path.write_bytes(b"x" * 4096), "has 4096 bytes, the demo needs 1048576"),
    ],
    ids=["missing", "directory", "too small"],
)
def test_demo_refuses_a_disk(run: Main, work: Path, tmp_path: Path, make: Callable[[Path], object], text: str) -> None:
    path = tmp_path / "disk.img"
    make(path)
    status, out, err = run("demo", "--disk", path, "--dir", work)
    assert (status, out) == (1, "")
    assert one_line(err).startswith(f"cbwcore: {path}")
    assert text in err


def test_demo_refuses_a_disk_that_is_in_use(run: Main, work: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    with Disk(path):
        status, _, err = run("demo", "--disk", path, "--dir", work)
    assert status == 1
    assert "in use" in one_line(err)


def test_demo_without_its_directory(run: Main, tmp_path: Path) -> None:
    status, _, err = run("demo", *QUICK, "--dir", tmp_path / "missing")
    assert status == 1
    assert one_line(err).startswith(f"cbwcore: {tmp_path / 'missing'}")
    assert err.endswith(": No such file or directory\n")


@pytest.fixture
def locked_directory(tmp_path: Path) -> Iterator[Path]:
    """A directory that this process may not use, while the test runs."""
    directory = tmp_path / "locked"
    directory.mkdir()
    directory.chmod(0)
    if IS_ROOT:
        os.seteuid(65534)
    try:
        yield directory
    finally:
        if IS_ROOT:
            os.seteuid(0)
        directory.chmod(0o700)
        assert list(directory.iterdir()) == []


def test_demo_in_a_directory_without_permission(run: Main, locked_directory: Path) -> None:
    status, _, err = run("demo", *QUICK, "--dir", locked_directory)
    assert status == 1
    assert one_line(err).startswith(f"cbwcore: {locked_directory}")
    assert err.endswith(": Permission denied\n")


def test_info_without_permission(run: Main, locked_directory: Path) -> None:
    status, _, err = run("info", locked_directory / "disk.img")
    assert (status, one_line(err)) == (1, f"cbwcore: {locked_directory}/disk.img: Permission denied")


@pytest.mark.parametrize("mebibytes", [1, 3, 6])
def test_demo_without_space(work: Path, tmp_path: Path, mebibytes: int) -> None:
    """Too little for the image, for the target or for the backup."""
    if not IS_ROOT:
        pytest.skip("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    options = f"size={mebibytes}m"
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", small], capture_output=True, check=False
    ).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        done = spawn("demo", "--size", "8M", "--seconds", "1", "--dir", small)
        left = list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)
    assert done.returncode == 1
    assert "No space left on device" in one_line(done.stderr)
    assert left == []


def test_demo_with_a_file_size_limit(work: Path) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB})); {COMMAND[-1]}"
    command = [*COMMAND[:-1], limit, "demo", "--size", "8M", "--dir", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert one_line(done.stderr).endswith("/disk.img: File too large")


@pytest.mark.parametrize(
    ("number", "status", "text"),
    [(signal.SIGINT, 130, "cbwcore: interrupted\n"), (signal.SIGTERM, 143, "")],
    ids=["ctrl-C", "SIGTERM"],
)
def test_demo_interrupted_leaves_nothing_behind(work: Path, number: int, status: int, text: str) -> None:
    command = [*COMMAND, "demo", "--size", "16M", "--seconds", "60", "--dir", str(work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list(work.glob("*/backup.img")))
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (status, text)


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("arguments", [["demo", *QUICK], ["demo", *QUICK, "--json"], ["info", __file__]])
def test_a_reader_that_has_gone_gets_no_traceback(work: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    directory = ["--dir", str(work)] if arguments[0] == "demo" else []
    with os.fdopen(writer, "wb") as stdout:
        command = [*COMMAND, *arguments, *directory]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_full_stdout_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        command = [*COMMAND, "info", "--json", __file__]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "No space left on device" in one_line(done.stderr)


def test_a_closed_stdout_is_none_of_our_business() -> None:
    command = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "info", __file__]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# ---- usage ----


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["info"],
        ["demo", "--size", "many"],
        ["demo", "--size", "-1"],
        ["demo", "--size", "1M", "--disk", "x"],
        ["demo", "--size", "4095"],
        ["demo", "--size", "99999999T"],
        ["demo", "--seconds", "0"],
        ["demo", "--seconds", "nan"],
        ["demo", "--seconds", "1e300"],
        ["demo", "--seed", "x"],
    ],
)
def test_usage_errors_exit_2(run: Main, argv: list[str]) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("cbwcore")


@pytest.mark.parametrize(
    "argv", [["--help"], ["demo", "--help"], ["info", "--help"], ["bench", "--help"], ["--version"]]
)
def test_help_and_version(run: Main, argv: list[str]) -> None:
    status, out, err = run(*argv)
    assert (status, err) == (0, "")
    assert "cbwcore" in out


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1048576", MIB), ("1M", MIB), ("1024k", MIB), ("3G", 3 << 30), ("1t", 1 << 40)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert demo_module.size(text) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (256 << 20, "256 MiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_size_text(nbytes: int, text: str) -> None:
    assert output_module.size_text(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 us"), (4.2e-6, "4.2 us"), (64e-6, "64 us"), (0.0123, "12 ms"), (0.9999, "1.0 s"), (62, "62.0 s")],
)
def test_time_text(seconds: float, text: str) -> None:
    assert output_module.time_text(seconds) == text


# ---- info ----


def facts(run: Main, path: str | Path) -> dict[str, object]:
    status, out, err = run("info", path, "--json")
    assert (status, err) == (0, "")
    return dict(json.loads(out))


def test_info_on_a_file(run: Main, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(3 * 65536 + 5))
    before = path.read_bytes(), os.stat(path).st_mtime_ns
    told = facts(run, path)
    assert (told["path"], told["kind"], told["size"]) == (str(path), "regular file", 3 * 65536 + 5)
    assert told["sectors"] is None
    assert told["file_system"] == subprocess.run(
        ["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True
    ).stdout.strip().replace("ext2/ext3", "ext4").replace("overlayfs", "overlay")
    assert told["auto"] == {"engine": "psync", "reason": "buffered files are as fast by plain system calls"}
    assert told["io_uring"]["build"]["possible"] is io_uring_state()[0]  # type: ignore[index]
    assert told["auto_direct"]["engine"] == choose_engine("auto", direct=True)[0]  # type: ignore[index]
    assert isinstance(told["io_uring"]["kernel"]["possible"], bool)  # type: ignore[index]
    assert (path.read_bytes(), os.stat(path).st_mtime_ns) == before
    assert list(tmp_path.iterdir()) == [path]
    status, out, _ = run("info", path)
    assert status == 0
    assert "192.0 KiB (196613 bytes)" in out


def test_info_direct_agrees_with_the_disk(run: Main, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(65536))
    told = facts(run, path)["direct"]
    assert isinstance(told, dict)
    if not told["possible"]:
        with pytest.raises(ValueError, match="O_DIRECT"):
            Disk(path, direct=True)
        return
    with Disk(path, direct=True) as disk:
        assert (told["memory_alignment"], told["offset_alignment"]) == (disk._file.mem_align, disk._file.align)


def test_info_on_a_sparse_file_tells_of_its_holes(run: Main, tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    with open(path, "wb") as f:
        f.truncate(1 << 30)
    told = facts(run, path)
    assert (told["size"], told["allocated"]) == (1 << 30, 0)
    assert "0 bytes, holes 1 GiB" in run("info", path)[1]


def test_info_on_an_empty_file(run: Main, tmp_path: Path) -> None:
    path = tmp_path / "empty.img"
    path.touch()
    assert facts(run, path)["size"] == 0


def test_info_on_a_disk_in_use_neither_fails_nor_locks(run: Main, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(65536))
    with Disk(path) as disk:
        assert facts(run, path)["size"] == 65536
        disk.pwrite(b"x", 0)
        with pytest.raises(ValueError, match="in use"):
            Disk(path)


def test_info_on_a_block_device(run: Main, loop_device: tuple[str, Path]) -> None:
    device, backing = loop_device
    before = backing.read_bytes()
    told = facts(run, device)
    assert (told["kind"], told["size"], told["allocated"]) == ("block device", 2 * MIB, None)
    assert told["sectors"] == {"logical": 512, "physical": 512}
    assert told["reflink"]["possible"] is False  # type: ignore[index]
    assert told["direct"]["possible"] is True  # type: ignore[index]
    assert "512 bytes logical, 512 physical" in run("info", device)[1]
    assert backing.read_bytes() == before


def test_info_on_what_is_no_disk(run: Main, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, text in (
        (tmp_path, f"{tmp_path} is neither a regular file nor a block device"),
        (fifo, f"{fifo} is neither a regular file nor a block device"),
        (tmp_path / "missing", f"{tmp_path}/missing: No such file or directory"),
    ):
        status, out, err = run("info", path)
        assert (status, out, one_line(err)) == (1, "", f"cbwcore: {text}")


def test_info_reflink_is_unknown_where_no_test_file_can_be_made(
    run: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.img"
    path.touch()

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    told = facts(run, path)["reflink"]
    assert told == {"possible": None, "reason": "no test file beside it: Read-only file system"}
    assert "unknown (no test file" in run("info", path)[1]


def test_info_reflink_on_a_file_system_that_has_it(run: Main, tmp_path: Path) -> None:
    if not IS_ROOT or shutil.which("mkfs.xfs") is None:
        pytest.skip("mounting xfs needs root and mkfs.xfs")
    image, mounted = tmp_path / "xfs.img", tmp_path / "mounted"
    mounted.mkdir()
    with open(image, "wb") as f:
        f.truncate(512 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, check=False).returncode:
        pytest.skip("xfs cannot be mounted here")
    try:
        (mounted / "disk.img").write_bytes(bytes(65536))
        told = facts(run, mounted / "disk.img")
    finally:
        subprocess.run(["umount", mounted], check=True)
    assert told["file_system"] == "xfs"
    assert told["reflink"] == {"possible": True, "reason": "a file beside it was cloned"}


def test_info_takes_names_as_they_are(run: Main, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"[bold]\xff\nname")
    path.touch()
    status, out, err = run("info", path)
    assert (status, err) == (0, "")
    assert "[bold" in "".join(out.split())  # the line is folded where the width ends
    assert facts(run, path)["path"] == str(path)
    status, _, err = run("info", f"{path}.missing")
    assert status == 1
    one_line(err)
