"""Orderings that the engine needs, each taken away in a copy of the source: the scheduler must find what comes of it.

    mutations.py [--seed S]       what CI runs: a few, others each day; S is the day, and printed
    mutations.py --all            every one
    mutations.py NAME...          those with such parts in their names

The list is for other gates, too: `MUTATIONS` are single replacements of text in a file under src/cbwcore.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Mutation(NamedTuple):
    """``before`` stands once in ``file``, and becomes ``after``; the case then has a schedule that fails."""

    name: str
    file: str
    before: str
    after: str
    case: str


MUTATIONS = [
    Mutation(
        "need is cleared before the frozen reads are waited for (R1)",
        "_preserve.pxd",
        """        stop = bitmap_next(&s.done, c, stop, False)
        if reqlist_find(""",
        """        stop = bitmap_next(&s.done, c, stop, False)
        bitmap_put(&s.need, c, stop, False)
        if reqlist_find(""",
        "G1:w0,w0,r0",
    ),
    Mutation(
        "done is set after the claim is given up (R2)",
        "_preserve.pxd",
        """    end_copy(s, job, rc)
    last = job.owners == 0
""",
        """    reqlist_remove(&s.copies, &job.claim)
    pthread_mutex_unlock(&s.lock)
    pthread_mutex_lock(&s.lock)
    reqlist_add(&s.copies, &job.claim, job.claim.start, job.claim.end)
    end_copy(s, job, rc)
    last = job.owners == 0
""",
        "G1:w0,w0,r0",
    ),
    Mutation(
        "who has waited for another's copy does not look again whether it failed (R3)",
        "_preserve.pxd",
        "        return wait_for(s, c << s.shift, cluster_end(c, s.shift, s.size), v.deadline, p)\n",
        """        stop = <uint64_t>(-wait_for(s, c << s.shift, cluster_end(c, s.shift, s.size), v.deadline, p))
        if stop == 0:
            bitmap_put(&s.need, c, c + 1, False)
        return -<int>stop
""",
        "G1:w0,w0,fw",
    ),
    Mutation(
        "a read does not look at the state again when it ends (R7)",
        "_snapshot.pxd",
        """    if s.state != ARMED:
        rc = usable(s)
    pthread_mutex_unlock(&s.lock)
    return rc


cdef inline int64_t read_run""",
        """    pthread_mutex_unlock(&s.lock)
    return rc


cdef inline int64_t read_run""",
        "S1:w0,fw,r0",
    ),
    Mutation(
        "frozen reads are not waited for (R1)",
        "_preserve.pxd",
        "        if reqlist_find(&s.frozen, c << s.shift, stop << s.shift) != NULL:\n",
        "        if False:\n",
        "G1:w0,r0",
    ),
    Mutation(
        "a guest write does not look for snapshots again after its copies (R10)",
        "_engine.pxd",
        "    while own != NULL and needs_cbw(d, off, n):\n",
        "    if own != NULL and needs_cbw(d, off, n):\n",
        "G1:w0,a",
    ),
    Mutation(
        "a break tells nobody (R7)",
        "_preserve.pxd",
        "    store_release(&s.state, BROKEN)\n",
        "    pass\n",
        "S1:w0,fw",
    ),
    Mutation(
        "the write is let go before the state is set (R7)",
        "_preserve.pxd",
        "        snapshot_break(s, &p.why)\n",
        """        bitmap_put(&s.need, off >> s.shift, end, False)
        pthread_mutex_unlock(&s.lock)
        pthread_mutex_lock(&s.lock)
        snapshot_break(s, &p.why)
""",
        "S1:w0,w0,r0,fw",
    ),
    Mutation(
        "a late copy gives its claim up with its guest write (R8)",
        "_preserve.pxd",
        "        timed_out(s, start, end, &p.why)\n    job.owners",
        """        timed_out(s, start, end, &p.why)
        reqlist_remove(&s.copies, &job.claim)
        job.claim.next = job.claim.prev = &job.claim
    job.owners""",
        "Gt1:w0,w0,t",
    ),
    Mutation(
        "the gate does not drain (R10)",
        "_engine.pxd",
        """    store_seq_cst(&d.gate, 1)
    while total_writers(d):
        pthread_cond_wait(&d.gate_changed, &d.gate_lock)
""",
        "    store_seq_cst(&d.gate, 1)\n",
        "G0:w0,a",
    ),
    Mutation(
        "a writer reads the gate and then counts itself (R10)",
        "_engine.pxd",
        """        add_seq_cst(&own.writers, 1)
        if not load_seq_cst(&d.gate):
            break
""",
        """        if not load_seq_cst(&d.gate):
            add_seq_cst(&own.writers, 1)
            break
        add_seq_cst(&own.writers, 1)
""",
        "G0:w0,a",
    ),
    Mutation(
        "who leaves flight does not tell the shutter (R10)",
        "_engine.pxd",
        """    sub_seq_cst(&own.writers, 1)
    if load_seq_cst(&d.gate):
""",
        """    sub_seq_cst(&own.writers, 1)
    if False:
""",
        "G0:w0,a",
    ),
    Mutation(
        "a group opens each gate as it goes (R10)",
        "_engine.pxd",
        "        gate_shut(disks[i])\n    for i in range(nsnaps):\n        if owners",
        """        gate_shut(disks[i])
    for i in range(ndisks - 1):
        gate_open(disks[i])
    for i in range(nsnaps):
        if owners""",
        "G0:w0,g",
    ),
    Mutation(
        "bitmaps are switched before T0",
        "_engine.pxd",
        "    cdef int rc = 0\n    for i in range(ndisks):\n        gate_shut(disks[i])\n",
        """    cdef int rc = make_switches(switches, nswitches)
    nswitches = 0
    for i in range(ndisks):
        gate_shut(disks[i])
""",
        "G0:w0,f",
    ),
    Mutation(
        "a snapshot is pinned after flight is left",
        "_engine.pxd",
        """        pinned[i] = d.snaps[i]
        pin(pinned[i])
    leave_write(d, own)
""",
        """        pinned[i] = d.snaps[i]
    leave_write(d, own)
    for i in range(count):
        pin(pinned[i])
""",
        "G1:w0,c",
    ),
    Mutation(
        "close does not wait for those inside (R8)",
        "_engine.pxd",
        "    gate_open(d)\n    snapshot_quiesce(s)\n",
        "    gate_open(d)\n",
        "G1:r0,c",
    ),
    Mutation(
        "the disk closes under its readers",
        "_engine.pxd",
        "    while total_readers(d):\n",
        "    while False:\n",
        "G1:n,C",
    ),
    Mutation(
        "a copy that ends wakes nobody",
        "_preserve.pxd",
        "    reqlist_remove(&s.copies, &job.claim)\n    wake(s)\n",
        "    reqlist_remove(&s.copies, &job.claim)\n",
        "Gt1:w0",
    ),
    Mutation(
        "a discard does not wait for reads of the target",
        "_snapshot.pxd",
        "or reqlist_find(&s.target_reads, start, end) != NULL\n                       or",
        "or",
        "G1:w0,x,r0",
    ),
    Mutation(
        "a discard does not wait for reads of the disk (R6)",
        "_snapshot.pxd",
        "(reqlist_find(&s.frozen, start, end) != NULL or reqlist",
        "(reqlist",
        "G1:w0,x,r0",
    ),
    Mutation(
        "a discard does not wait for copies",
        "_snapshot.pxd",
        """or reqlist_find(&s.target_reads, start, end) != NULL
                       or reqlist_find(&s.copies, start, end) != NULL):""",
        "or reqlist_find(&s.target_reads, start, end) != NULL):",
        "G1:w0,x",
    ),
    Mutation(
        "block status believes what it asked before (R20)",
        "_snapshot.pxd",
        "    pos = still_t0(s, first, pos)\n",
        "",
        "G1:z0,s",
    ),
    Mutation(
        "a broken snapshot is still asked what it needs (R7)",
        "_preserve.pxd",
        "    return load_acquire(&s.state) == ARMED and bitmap_any(",
        "    return load_acquire(&s.state) <= BROKEN and bitmap_any(",
        "S1:w0,fw",
    ),
    Mutation(
        "a write at once does not look at the gate (R10)",
        "_engine.pxd",
        "    if (load_seq_cst(&d.gate) or load_relaxed(&d.closed)",
        "    if (load_relaxed(&d.closed)",
        "G0:wa0,a",
    ),
    Mutation(
        "a write at once does not look whether it must copy (R1)",
        "_engine.pxd",
        "load_relaxed(&d.closed) or needs_cbw(d, off, n)\n            or",
        "load_relaxed(&d.closed)\n            or",
        "G1:wa0",
    ),
    Mutation(
        "a read at once does not freeze (R6)",
        "_snapshot.pxd",
        "    reads = &s.target_reads if in_target[0] else &s.frozen\n",
        "    reads = &s.target_reads if in_target[0] or at_once else &s.frozen\n",
        "G1:w0,ra0",
    ),
]

CI = 4  # of them, by the day


def of_day(day: int) -> list[Mutation]:
    """Those of CI: each comes in turn, and all within a week."""
    return [MUTATIONS[(day * CI + i) % len(MUTATIONS)] for i in range(CI)]


def mutate(mutation: Mutation, tree: Path) -> None:
    """A copy of what the build reads, with one change."""
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(HERE, tree / "tests" / "schedules", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    file = tree / "src" / "cbwcore" / mutation.file
    text = file.read_text()
    if text.count(mutation.before) != 1:
        raise SystemExit(
            f"mutations.py: {mutation.name}: the text is {text.count(mutation.before)} times in {mutation.file}"
        )
    file.write_text(text.replace(mutation.before, mutation.after))


def find(mutation: Mutation, most: float = 300) -> str | None:
    """What the scheduler says of it; None where it finds nothing."""
    with tempfile.TemporaryDirectory(prefix="cbwcore-mutation-") as folder:
        tree = Path(folder)
        mutate(mutation, tree)
        environment = {**os.environ, "CBWCORE_SOURCE": str(tree), "CBWCORE_SCHEDULES_DIR": str(tree / "build")}
        run = subprocess.run(
            ["bash", HERE / "run.sh", "--case", mutation.case],
            env={"CBWCORE_PYTHON": sys.executable, **environment},
            capture_output=True,
            text=True,
            timeout=most,
            check=False,
        )
    if run.returncode not in (0, 1):
        raise SystemExit(f"mutations.py: {mutation.name}: {run.stdout}{run.stderr}")
    if run.returncode == 0:
        return None
    return next(line for line in run.stdout.splitlines() if mutation.case in line).removeprefix("run.py: ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names")
    parser.add_argument("--all", action="store_true", help="every one")
    parser.add_argument("--seed", type=int, help="those of this day (default: today, UTC)")
    options = parser.parse_args()
    if options.all:
        chosen = MUTATIONS
    elif options.names:
        chosen = [m for m in MUTATIONS if any(n in m.name for n in options.names)]
    else:
        seed = datetime.datetime.now(datetime.UTC).toordinal() if options.seed is None else options.seed
        print(f"mutations.py: seed {seed}: {CI} of {len(MUTATIONS)}", flush=True)
        chosen = of_day(seed)
    missed = 0
    for mutation in chosen:
        began = time.monotonic()
        found = find(mutation)
        missed += found is None
        print(
            f"{'MISSED' if found is None else 'found'}: {mutation.name}: {found} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    print(f"mutations.py: {len(chosen) - missed} of {len(chosen)} found")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
