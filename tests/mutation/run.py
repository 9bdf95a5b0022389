"""The mutation gate: break one rule of the core at a time, and see that the tests which are there for it fail.

    python tests/mutation/run.py             the third of mutants.toml whose turn it is today
    python tests/mutation/run.py --all       all of it
    python tests/mutation/run.py --only R12  those whose rule or name has that in it

Each mutant is a copy of the sources with one text replaced; it is built without optimisation, and its tests run against
it with -x. A test that fails, crashes or hangs has caught it. First the sources as they are must pass all those tests.
Exits with 1 if a mutant survives, or cannot be judged: its text is not in its file exactly once, it does not build, or
its tests do not exist. Needs what tests/requirements.py prints, gcc, and liburing where the core is to have it.
"""

import argparse
import compileall
import concurrent.futures
import datetime
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LISTED = Path(__file__).with_name("mutants.toml")
HANG = 30  # seconds after which a test hangs
GIVE_UP = 90  # seconds for the tests of a mutant, where not even pytest can end them
LIMIT = 5  # seconds that the tests wait for what must come (engine_support.LIMIT)
FAILED, USAGE = 1, (2, 3, 4, 5)  # exits of pytest: a test failed; it could not run, or found no test


@dataclass(frozen=True)
class Mutant:
    """One entry of mutants.toml."""

    name: str
    rule: str
    file: str
    old: str
    new: str
    tests: list[str]

    @property
    def path(self) -> str:
        """In the tree."""
        return f"src/{self.file}" if self.file == "_cbwcore.pyx" else f"src/cbwcore/{self.file}"


@dataclass(frozen=True)
class Verdict:
    caught: bool
    how: str  # what caught it, or why it could not be judged
    judged: bool = True


def read_mutants() -> list[Mutant]:
    with open(LISTED, "rb") as f:
        return [Mutant(**entry) for entry in tomllib.load(f)["mutant"]]


def apply(mutant: Mutant, tree: Path) -> str | None:
    """Break the rule in `tree`; why not, if it cannot be done."""
    path = tree / mutant.path
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"{mutant.path} has {mutant.old!r} {text.count(mutant.old)} times, not once"
    path.write_text(text.replace(mutant.old, mutant.new))
    return None


def build(tree: Path) -> str | None:
    """Build the core of `tree` beside its Python modules, quickly; what went wrong, if anything did."""
    include = sysconfig.get_path("include")
    module = tree / "src" / "cbwcore" / f"_cbwcore{sysconfig.get_config_var('EXT_SUFFIX')}"
    has_uring = any((Path(p) / "liburing.h").exists() for p in ("/usr/include", "/usr/local/include"))
    uring = ['-DCBW_LIBURING="2"', "-luring"] if has_uring else ["", ""]
    cython = [sys.executable, "-m", "cython", "-3", "-X", "emit_code_comments=False", "-I", "src"]
    compiler = ["gcc", "-O0", "-w", "-fPIC", "-fno-strict-aliasing", "-I", include, *uring[:1]]
    commands = [
        [*cython, "--module-name", "cbwcore._cbwcore", "-o", "core.c", "src/_cbwcore.pyx"],
        [*compiler, "-c", "core.c", "-o", "core.o"],
        ["gcc", "-shared", "core.o", "-lpthread", *uring[1:], "-o", str(module)],
    ]
    for command in commands:
        done = subprocess.run([c for c in command if c], cwd=tree, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"does not build: {(done.stderr or done.stdout).strip()[-600:]}"
    return None


def judge(tree: Path, tests: list[str], seconds: float) -> Verdict:
    """Run tests against the core of `tree`, for so long at most."""
    env = os.environ | {
        "PYTHONPATH": str(tree / "src"),
        "CBWCORE_TEST_LIMIT": str(LIMIT),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", f"timeout={HANG}"]
    command += [f"tests/{test}" for test in tests]
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Verdict(True, f"hang: the tests did not end in {seconds:.0f} s")
    if "+ Timeout +" in done.stdout + done.stderr:
        return Verdict(True, f"hang: a test did not end in {HANG} s")
    if done.returncode < 0:
        return Verdict(True, f"crash: signal {-done.returncode}")
    if done.returncode == 0:
        return Verdict(False, "")
    failed = re.search(r"(?m)^(?:FAILED|ERROR) tests/(\S+)", done.stdout)
    if done.returncode != FAILED or failed is None or "ImportError while loading conftest" in done.stderr:
        return Verdict(False, f"pytest exits with {done.returncode}: {done.stdout.strip()[-600:]}", judged=False)
    hang = ", after a wait for what did not come" if re.search(rf"not within {LIMIT}|hangs?: ", done.stdout) else ""
    return Verdict(True, failed.group(1) + hang)


def try_out(mutant: Mutant, pristine: Path, work: Path) -> Verdict:
    """Break, build, judge; the copy goes in the end."""
    tree = Path(tempfile.mkdtemp(dir=work))
    try:
        copy_tree(pristine, tree)
        wrong = apply(mutant, tree) or build(tree)
        if wrong:
            return Verdict(False, wrong, judged=False)
        return judge(tree, mutant.tests, GIVE_UP * len(mutant.tests))
    finally:
        shutil.rmtree(tree)


def copy_tree(source: Path, tree: Path) -> None:
    """The sources; the tests are linked, for they do not change, and need be compiled but once."""
    shutil.copytree(source / "src", tree / "src")
    shutil.copy(source / "pyproject.toml", tree)
    (tree / "tests").symlink_to(source / "tests")


def chosen(mutants: list[Mutant], args: argparse.Namespace) -> tuple[list[Mutant], str]:
    """The mutants to try, and what to say of that."""
    if args.only:
        return [m for m in mutants if args.only in m.rule.split(", ") or args.only in m.name], f"with {args.only!r}"
    if args.all:
        return mutants, "all"
    turn = datetime.datetime.now(datetime.UTC).date().toordinal() % 3
    return mutants[turn::3], f"today's third of {len(mutants)}; --all for the others, too"


def main() -> int:
    parser = argparse.ArgumentParser(description="Break one rule of the core at a time; the tests must notice.")
    parser.add_argument("--all", action="store_true", help="all mutants, not today's third")
    parser.add_argument("--only", metavar="TEXT", help="those of a rule, or with TEXT in their name")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once (default 2)")
    args = parser.parse_args()
    mutants, which = chosen(read_mutants(), args)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cbwcore-mutants-", dir=os.environ.get("TMPDIR")) as work_name:
        work = Path(work_name)
        pristine = work / "pristine"
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "corpus")
        shutil.copytree(ROOT / "src", pristine / "src", ignore=ignore)
        shutil.copytree(ROOT / "tests", pristine / "tests", ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", pristine)
        compileall.compile_dir(pristine / "src", quiet=1)
        print(f"{len(mutants)} mutants: {which}", flush=True)
        return try_all(mutants, pristine, work, args.jobs, began)


def try_all(mutants: list[Mutant], pristine: Path, work: Path, jobs: int, began: float) -> int:
    """Print a line for each, and the score last; the exit code."""
    nothing = Mutant("nothing is broken", "", mutants[0].file, mutants[0].old, mutants[0].old, all_tests(mutants))
    caught = unjudged = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(try_out, mutant, pristine, work): mutant for mutant in [nothing, *mutants]}
        for future in concurrent.futures.as_completed(running):
            mutant, verdict = running[future], future.result()
            if mutant is nothing:
                passes = verdict.judged and not verdict.caught
                unjudged += not passes
                print(
                    "passes  " if passes else "INVALID ", mutant.name, "" if passes else f"[{verdict.how}]", flush=True
                )
                continue
            caught += verdict.caught
            unjudged += not verdict.judged
            word = "caught  " if verdict.caught else "SURVIVES" if verdict.judged else "INVALID "
            print(f"{word} {mutant.rule}: {mutant.name}" + (f"  [{verdict.how}]" if verdict.how else ""), flush=True)
    print(f"mutation gate: {caught} of {len(mutants)} caught, {time.monotonic() - began:.0f} s")
    return 0 if caught == len(mutants) and not unjudged else 1


def all_tests(mutants: list[Mutant]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))


if __name__ == "__main__":
    sys.exit(main())
