"""``cbwcore bench``: its report, its exit codes, that it leaves nothing behind; and the load generator under it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cbwcore
from cbwcore._cbwcore import FaultPlan, Load, read_words
from cbwcore.bench import plots, sections, setting
from cbwcore.bench.report import NO_PLOTS, bounds_of
from cbwcore.bench.results import Bound, Figures, Outcome, Plot, Point, Row, compared, markdown
from cbwcore.bench.rounds import interleave, plainly
from cbwcore.bench.setting import BenchError, Item, NotHere, Section, Setting
from cbwcore.cli import main

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB
COMMAND = [sys.executable, "-c", "import sys; from cbwcore.cli import main; sys.exit(main())"]
TINY = ["--quick", "--size", "1M", "--rounds", "1"]

Main = Callable[..., tuple[int, str, str]]


# ---- the load generator ----


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (MIB // 256))
    return path


def offsets_of(step: int, count: int) -> array[int]:
    return array("Q", range(0, step * count, step))


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("threads", [1, 3, 32])
def test_load_writes_every_offset_once(image: Path, threads: int, sliced: bool) -> None:
    before = image.read_bytes()
    data = os.urandom(4 * KIB)
    latencies = array("q", [0] * 16)
    load = Load(offsets_of(CLUSTER, 16), data, threads=threads, sliced=sliced, latencies=latencies)
    with cbwcore.Disk(image) as disk, disk.snapshot() as snapshot:
        took = load.on_disk(disk)
        assert disk.stats().guest_writes == 16
        assert disk.stats().guest_write_bytes == 16 * len(data)
        assert snapshot.stats().cbw_bytes == MIB
        assert snapshot.pread(MIB, 0) == before
    after = image.read_bytes()
    for start in range(0, MIB, CLUSTER):
        assert after[start : start + CLUSTER] == data + before[start + len(data) : start + CLUSTER]
    assert took > 0
    assert all(0 < latency <= took for latency in latencies)


def test_load_reads(image: Path) -> None:
    with cbwcore.Disk(image) as disk:
        assert Load(offsets_of(CLUSTER, 16), length=4 * KIB, threads=2).on_disk(disk) > 0
        assert (disk.stats().guest_reads, disk.stats().guest_read_bytes) == (16, 64 * KIB)
        assert disk.stats().guest_writes == 0


def test_load_runs_again_and_on_nothing(image: Path) -> None:
    load, nothing = Load(offsets_of(CLUSTER, 16), b"x"), Load(b"", b"x", threads=4)
    with cbwcore.Disk(image) as disk:
        for count in (16, 32):
            load.on_disk(disk)
            assert disk.stats().guest_writes == count
        nothing.on_disk(disk)
        assert disk.stats().guest_writes == 32


def test_load_suits_o_direct(image: Path) -> None:
    try:
        disk = cbwcore.Disk(image, direct=True)
    except cbwcore.ConfigError:
        pytest.xfail("this file system has no O_DIRECT")
    with disk:
        Load(offsets_of(4 * KIB, 256), b"d" * 4 * KIB, threads=2).on_disk(disk)
    assert image.read_bytes() == b"d" * MIB


def test_load_raises_the_first_error_and_stops(image: Path) -> None:
    plan = FaultPlan()
    plan.error("pwrite", errno.ENOSPC, start=8 * CLUSTER)
    latencies = array("q", [0] * 16)
    with cbwcore.Disk(image) as disk, disk.snapshot() as snapshot:
        snapshot._inject(plan)
        with pytest.raises(cbwcore.CopyBeforeWriteError) as caught:
            Load(offsets_of(CLUSTER, 16), b"x", latencies=latencies).on_disk(disk)
        assert (caught.value.errno, caught.value.offset) == (errno.ENOSPC, 8 * CLUSTER)
        assert caught.value.operation == "target-write"
        assert disk.stats().guest_writes == 8
        assert [latency > 0 for latency in latencies] == [True] * 9 + [False] * 7
        snapshot._inject(None)
    assert image.read_bytes()[8 * CLUSTER] == 0


def test_load_tells_of_a_break(image: Path) -> None:
    broken: list[cbwcore.Snapshot] = []
    plan = FaultPlan()
    plan.error("pwrite", errno.EIO)
    with (
        cbwcore.Disk(image) as disk,
        disk.snapshot(on_cbw_error="break-snapshot", on_break=broken.append) as snapshot,
    ):
        snapshot._inject(plan)
        Load(offsets_of(CLUSTER, 16), b"x", threads=2).on_disk(disk)
        assert broken == [snapshot]
        assert disk.stats().guest_writes == 16


def test_load_is_refused_by_what_cannot_take_it(image: Path) -> None:
    load = Load(offsets_of(CLUSTER, 16), b"x")
    disk = cbwcore.Disk(image)
    disk.close()
    with pytest.raises(ValueError, match="is closed"):
        load.on_disk(disk)
    with cbwcore.Disk(image, read_only=True) as disk:
        with pytest.raises(PermissionError):
            load.on_disk(disk)
        Load(offsets_of(CLUSTER, 16), length=1).on_disk(disk)
    with cbwcore.Disk(image) as disk:
        for beyond in (Load(offsets_of(CLUSTER, 17), b"x"), Load(array("Q", [MIB - 1]), b"xy")):
            with pytest.raises(cbwcore.ConfigError, match="reaches past the end"):
                beyond.on_disk(disk)
        assert disk.stats().guest_writes == 0


def test_load_ends_when_the_disk_is_closed(image: Path, in_threads: Callable[..., list[object]]) -> None:
    load = Load(array("Q", [0]) * 50_000_000, length=1, threads=2)
    disk = cbwcore.Disk(image)

    def run() -> None:
        with pytest.raises(ValueError, match="is closed"):
            load.on_disk(disk)

    def close() -> None:
        time.sleep(0.1)
        with pytest.raises(ValueError, match="is running"):
            load.on_disk(disk)
        disk.close()

    in_threads(run, close)


@pytest.mark.parametrize(
    ("offsets", "options", "text"),
    [
        (b"1234567", {"data": b"x"}, "uint64"),
        (array("Q", [2**63]), {"data": b"x"}, "outside"),
        (array("Q", [0]), {}, "requests of 0 bytes"),
        (array("Q", [0]), {"data": b""}, "requests of 0 bytes"),
        (array("Q", [0]), {"length": 1 << 40}, "requests of"),
        (array("Q", [0]), {"data": b"x", "threads": 0}, "0 threads"),
        (array("Q", [0]), {"data": b"x", "threads": 257}, "257 threads"),
        (array("Q", [0]), {"data": b"x", "latencies": array("q", [0, 0])}, "latencies"),
        (array("Q", [0]), {"data": b"x", "latencies": b"12345678"}, "writable"),
        (7, {"data": b"x"}, "buffer"),
    ],
)
def test_load_refuses_what_it_cannot_do(offsets: object, options: dict[str, object], text: str) -> None:
    with pytest.raises(cbwcore.ConfigError, match=text):
        Load(offsets, **options)  # type: ignore[arg-type]


def test_floor_moves_the_same_bytes(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    targets = [tmp_path / "a", tmp_path / "b"]
    with image.open("r+b") as disk, targets[0].open("w+b") as a, targets[1].open("w+b") as b:
        load = Load(offsets_of(CLUSTER, 16), b"x" * 4 * KIB, threads=3)
        assert load.on_files(disk.fileno(), [a.fileno(), b.fileno()]) > 0
        assert Load(offsets_of(CLUSTER, 16), length=KIB).on_files(disk.fileno()) > 0
        with pytest.raises(OSError, match="Input/output error"):
            Load(offsets_of(CLUSTER, 17), length=KIB).on_files(disk.fileno())
        with pytest.raises(cbwcore.ConfigError, match="cluster"):
            load.on_files(disk.fileno(), [a.fileno()], cluster=5000)
        with pytest.raises(cbwcore.ConfigError, match="too many"):
            load.on_files(disk.fileno(), [a.fileno()] * 17)
    with pytest.raises(OSError, match="Bad file descriptor"):
        load.on_files(disk_closed := 999_999, [disk_closed])
    assert [path.read_bytes() for path in targets] == [before, before]
    assert image.read_bytes()[:CLUSTER] == b"x" * 4 * KIB + before[4 * KIB : CLUSTER]


def test_read_words() -> None:
    took, seen = read_words(array("Q", [1, 4, 1 << 63]))
    assert (took >= 0, seen) == (True, 1 | 4 | 1 << 63)


# ---- rounds, rows ----


def test_rounds_are_interleaved() -> None:
    ran: list[str] = []
    cases = {name: plainly(lambda name=name: ran.append(name)) for name in "abc"}  # type: ignore[misc]
    seconds = interleave(cases, 2)
    assert ran == ["a", "b", "c"] * 2
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_row_is_of_the_fastest_peer_with_the_rounds_ratios() -> None:
    times = {"cbwcore": [1.0, 2.0, 3.0], "floor": [1.0, 1.0, 2.0], "x": [9.0, 9.0, 9.0], "y": [4.0, 4.0, 6.0]}
    row = compared("case", times, peers=("x", "y", "z"), floor_max=1.1, peer_times=2)
    assert row.peer == Figures((4.0, 4.0, 6.0), "time", "y")
    assert (row.over_floor, row.over_peer) == (1.5, 0.5)
    assert row.cells()[-1] == "MISSED; met"
    assert compared("case", {"cbwcore": [1.0]}, no_peer="not installed").cells() == (
        ("case", "1 s", "–", "–", "not installed", "–", "–", "–")
    )


def test_a_miss_of_the_floor_too_is_told() -> None:
    assert Bound(3, 2, "", floor=2.5).verdict() == "MISSED, by the floor too (2.50 ×)"
    assert Bound(3, 2, "", floor=1.5).verdict() == "MISSED"
    assert Bound(3, 2, "", at_least=True).verdict() == "met"


def test_a_table_leaves_empty_columns_out() -> None:
    lines = list(markdown([Row(case="a", ours=Figures((2e-6, 1e-6, 4e-6)))]))
    assert lines[0].split() == ["|", "case", "|", "cbwcore", "|"]
    assert lines[2].startswith("| a    | 2 µs (1 µs–4 µs)")


# ---- the command ----


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Main:
    """main() in this process: its exit code, stdout and stderr."""

    def call(*argv: str | Path) -> tuple[int, str, str]:
        try:
            status = main([str(a) for a in argv])
        except SystemExit as e:
            status = int(e.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A directory for --dir, which must be empty again afterwards."""
    directory = tmp_path / "work"
    directory.mkdir()
    yield directory
    assert list(directory.iterdir()) == []


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any peer."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(setting, "SBIN", "")


@pytest.fixture
def one_section(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``one_section(run, ...)``: the only section is ``x``, with these items."""

    def one_section(*runs: Callable[[Setting], object]) -> None:
        items = tuple(Item(f"item-{i}", run) for i, run in enumerate(runs))  # type: ignore[arg-type]
        plot = Plot(name="plot", title="a plot", x="x", y="y")
        section = Section("x", "A section", ("client: none; depth 1",), items, (plot,))
        monkeypatch.setattr(sections, "SECTIONS", {"x": section})
        monkeypatch.setattr("cbwcore.cli.bench.SECTIONS", {"x": section})

    return one_section


def one_line(err: str) -> str:
    """The error; there is nothing else on stderr."""
    assert err.startswith("cbwcore")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err.rstrip("\n")


def test_bench_writes_a_report(run: Main, work: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    status, out, err = run("bench", *TINY, "--dir", work, "--output", output, "--only", "fill", "copied-write")
    assert (status, err) == (0, "")
    text = (output / "report.md").read_text()
    assert "| 50 % copied: first write " in text
    assert "`disk.pwrite`, copied clusters, one offset (floor: `os.pwrite`)" in text
    assert text.index("## 4 KiB write where no copy is due") < text.index("## Cost against how much is copied")
    for what in ("client: ", "depth 1", "device: ", "cache mode: ", f"| cbwcore | {cbwcore.__version__} |", "| CPU | "):
        assert what in text
    assert "bounds met" in out
    assert ((output / "fill.png").exists(), NO_PLOTS in text) == (plots.available(), not plots.available())
    assert ("![Cost against how much is copied](fill.png)" in text) == plots.available()


def test_bench_writes_its_report_where_it_is_told_to(
    run: Main, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run("bench", *TINY, "--dir", work, "--report", "docs/figures.md", "--only", "fill")
    assert (status, err) == (0, "")
    text = Path("docs/figures.md").read_text()
    assert "`cbwcore bench --quick --report docs/figures.md --dir" in text
    if plots.available():
        assert "](figures/fill.png)" in text
        assert Path("docs/figures/fill.png").read_bytes().startswith(b"\x89PNG")


def test_bench_without_matplotlib(run: Main, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, out, err = run("bench", *TINY, "--dir", work, "--output", tmp_path / "out", "--only", "fill")
    assert (status, err) == (0, "")
    assert out.count(NO_PLOTS) == 1
    assert (tmp_path / "out" / "report.md").read_text().count(NO_PLOTS) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]


@pytest.mark.usefixtures("no_programs")
def test_bench_without_peers(run: Main, work: Path, tmp_path: Path) -> None:
    names = ("first-write", "nbd", "holes", "matrix", "pull-latency")
    status, out, err = run("bench", *TINY, "--dir", work, "--output", tmp_path, "--only", *names, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert {report["machine"]["versions"][name] for name in ("qemu-img", "nbdkit", "fio")} == {"not installed"}
    found = {outcome["name"]: outcome for outcome in report["outcomes"]}
    assert [row["note"] for row in found["first-write"]["rows"]] == ["not installed"] * 6
    assert {row["case"].split(",")[0] for row in found["matrix"]["rows"]} == {"tmpfs"}
    for name in ("nbd", "holes", "pull-latency"):
        assert any("left out" in note for note in found[name]["notes"])
    assert "not installed" in (tmp_path / "report.md").read_text()


def test_bench_json_is_one_document(work: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "bench", *TINY, "--dir", work, "--output", tmp_path, "--only", "snapshots", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["size"], report["rounds"], report["quick"]) == (MIB, 1, True)
    assert [row["case"][:11] for row in report["outcomes"][0]["rows"][::2]] == [
        "1 snapshot:",
        "2 snapshots",
        "4 snapshots",
        "8 snapshots",
    ]


def test_bench_goes_on_after_a_failure_and_exits_1(
    run: Main, work: Path, tmp_path: Path, one_section: Callable[..., None]
) -> None:
    def fail(_: Setting) -> Iterator[Row]:
        yield Row(case="before", ours=Figures((1.0,)))
        raise BenchError("qemu-img: it\nis broken")

    def skip(_: Setting) -> Iterator[Row]:
        raise NotHere("not installed: qemu-img")

    def good(_: Setting) -> Iterator[Row | str]:
        yield "a note"
        bound = Bound(2, 1, "≤ 1 × floor")
        yield Row(case="after", ours=Figures((1.0,)), bounds=(bound,), points=(Point("plot", "s", 1, 1),))

    one_section(fail, skip, good)
    status, out, err = run("bench", *TINY, "--dir", work, "--output", tmp_path)
    assert status == 1
    assert one_line(err) == "cbwcore: bench: x: item-0 FAILED: qemu-img: it is broken"
    assert "0 of 1 bounds met" in out
    text = (tmp_path / "report.md").read_text()
    for what in ("| before ", "| after ", "* a note", "* item-1 left out: not installed: qemu-img", "* item-0 FAILED"):
        assert what in text
    assert "0 of 1 met." in text


def test_bounds_are_listed_with_their_values() -> None:
    row = Row(case="case", bounds=(Bound(0.02, 0.01, "≤ 10 ms", kind="time"),))
    outcome = Outcome(name="x", title="X", conditions=(), rows=(row,))
    assert bounds_of((outcome,)) == [("X", "case", "≤ 10 ms", "20 ms", "MISSED")]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--only", "nothing"], "'nothing' is not one of first-write, "),
        (["--only"], "expected at least one argument"),
        (["--report", "x.txt"], "does not end in .md"),
        (["--report", "x.md", "--output", "x"], "not allowed"),
        (["--quick", "--full"], "not allowed"),
        (["--size", "1000"], "1000 bytes is not from 1048576"),
        (["--size", "1048577"], "no whole number of MiB"),
        (["--size", "many"], "no number of bytes"),
        (["--rounds", "0"], "not from 1 to 1000"),
        (["--rounds", "x"], "invalid"),
    ],
)
def test_bench_usage_errors_exit_2(run: Main, work: Path, argv: list[str], text: str) -> None:
    status, out, err = run("bench", "--dir", work, *argv)
    assert (status, out) == (2, "")
    assert text in one_line(err)


def test_bench_without_its_directory(run: Main, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    status, _, err = run("bench", *TINY, "--dir", missing, "--output", tmp_path / "out")
    assert status == 1
    assert one_line(err).startswith(f"cbwcore: {missing}")
    assert not (tmp_path / "out").exists()


def test_bench_without_room(run: Main, work: Path, tmp_path: Path) -> None:
    status, _, err = run("bench", "--size", "1000T", "--dir", work, "--output", tmp_path / "out")
    assert status == 1
    assert "the benchmarks need" in one_line(err)
    assert not (tmp_path / "out").exists()


def test_bench_where_its_report_cannot_be(run: Main, work: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, _, err = run("bench", *TINY, "--dir", work, "--output", tmp_path / "file", "--only", "fill")
    assert (status, one_line(err)) == (1, f"cbwcore: {tmp_path / 'file'}: File exists")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_bench_interrupted_leaves_nothing_behind(work: Path, tmp_path: Path, number: int, status: int) -> None:
    command = [*COMMAND, "bench", "--size", "16M", "--rounds", "1000", "--dir", work, "--only", "first-write"]
    with subprocess.Popen(
        [*command, "--output", tmp_path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 30
            while not list(work.glob("*/target")):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == status
    assert "Traceback" not in err
    assert not (tmp_path / "report.md").exists()
