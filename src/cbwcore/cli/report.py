"""What the demo found: one `Run` a row, for the table and, as it stands, for JSON."""

from __future__ import annotations

import errno

import msgspec
from rich import box
from rich.table import Table
from rich.text import Text

from cbwcore.cli.output import size_text, time_text
from cbwcore.snapshot import Snapshot
from cbwcore.stats import SnapshotStats

__all__ = [
    "Cost",
    "DemoReport",
    "GuestGot",
    "Hashes",
    "Proof",
    "Run",
    "SnapshotReads",
    "cost_of",
    "errno_name",
    "results_table",
]


class Proof(msgspec.Struct, frozen=True):
    """One claim, and whether it held."""

    claim: str
    held: bool


class GuestGot(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest got. Times in seconds."""

    requests: int
    refused: int = 0
    error: str | None = None
    """The errno of the refusals, by name."""
    longest: float
    """The longest that a request took."""
    then_ok: int = 0
    """Refused writes that were made again once the fault was cleared, and worked."""


class SnapshotReads(msgspec.Struct, frozen=True, kw_only=True):
    """What the snapshot's readers get."""

    state: str
    reads: str
    """``T0 data`` or the error's class."""
    error: str | None = None
    """The error's errno, by name."""
    cause: str | None = None
    """The first failure's errno, of a broken snapshot; the reason of ``error``."""
    cause_operation: str | None = None


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """From the engine's own figures. Bytes and seconds."""

    guest_writes: int
    copied_bytes: int
    waits: int
    """Guest writes that copy-before-write held up."""
    median_wait_below: float | None
    """Half of them waited for less; None where none waited."""
    longest_wait: float
    target_bytes: int
    arm_pause: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One row."""

    name: str
    policy: str
    fault: str | None
    guest: GuestGot
    snapshot: SnapshotReads
    cost: Cost
    proofs: list[Proof]


class Hashes(msgspec.Struct, frozen=True, kw_only=True):
    """SHA-256, in hex, of whole disks."""

    t0: str
    """The image, before the snapshot was taken and the guests started."""
    backup: str
    """What was copied from the snapshot meanwhile."""
    snapshot: str
    """The snapshot, read once more after the guests stopped."""
    disk: str
    """The disk by then."""


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """All of a demo. Bytes and seconds."""

    version: str
    seed: int
    seconds: float
    disk: str
    disk_size: int
    sha256: Hashes
    runs: list[Run]
    held: bool


def errno_name(error: OSError | None) -> str | None:
    """ENOSPC and the like."""
    return None if error is None or error.errno is None else errno.errorcode.get(error.errno, str(error.errno))


def median_wait_below(stats: SnapshotStats) -> float | None:
    """The upper bound of the histogram's bucket that holds the median, in seconds."""
    seen = 0
    for bound, count in stats.wait_histogram:
        seen += count
        if 2 * seen >= stats.waits:
            return bound
    return None


def cost_of(snapshot: Snapshot) -> Cost:
    """What a snapshot cost so far."""
    stats = snapshot.stats()
    return Cost(
        guest_writes=stats.guest_writes,
        copied_bytes=stats.cbw_bytes,
        waits=stats.waits,
        median_wait_below=median_wait_below(stats),
        longest_wait=stats.longest_wait,
        target_bytes=stats.target_bytes,
        arm_pause=stats.arm_pause,
    )


def results_table(runs: list[Run]) -> Table:
    """The one table: a run a column, a fact a row. It fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    for run in runs:
        table.add_column("\n".join(title(run)), justify="right", vertical="bottom")
    for group in (guest_rows, snapshot_rows, cost_rows):
        for row in zip(*(group(run) for run in runs), strict=True):
            table.add_row(row[0][0], *(value for _, value in row))
        table.add_section()
    table.add_row("proofs", *(verdict(run) for run in runs))
    return table


def title(run: Run) -> tuple[str, ...]:
    """Of a run's column, in lines."""
    if run.fault is None:
        return "backup", "under load"
    first, _, rest = run.policy.partition("-")
    return f"{first}-", rest, run.fault


def guest_rows(run: Run) -> list[tuple[str, str]]:
    """What the guest got."""
    guest = run.guest
    return [
        ("guest: ok", f"{guest.requests - guest.refused}"),
        ("refused", f"{guest.refused} {guest.error}" if guest.refused else "0"),
        ("longest", time_text(guest.longest)),
        ("ok when cleared", f"{guest.then_ok}" if guest.refused else "-"),
    ]


def snapshot_rows(run: Run) -> list[tuple[str, str]]:
    """What the snapshot reads."""
    snapshot = run.snapshot
    return [
        ("snapshot", snapshot.state),
        ("reads", snapshot.reads if snapshot.cause is None else f"{snapshot.error}"),
        ("first cause", snapshot.cause or "-"),
    ]


def cost_rows(run: Run) -> list[tuple[str, str]]:
    """What it cost."""
    cost = run.cost
    median = cost.median_wait_below
    return [
        ("guest writes", f"{cost.guest_writes}"),
        ("held up by CBW", f"{cost.waits}"),
        ("half of them", "-" if median is None else f"< {time_text(median)}"),
        ("longest wait", time_text(cost.longest_wait)),
        ("bytes copied", size_text(cost.copied_bytes)),
        ("target space", size_text(cost.target_bytes)),
        ("arm pause", time_text(cost.arm_pause)),
    ]


def verdict(run: Run) -> Text:
    """Whether a run's proofs held."""
    failed = sum(not proof.held for proof in run.proofs)
    if failed:
        return Text(f"{failed} FAILED", "bold red")
    return Text(f"{len(run.proofs)} held", "green")
