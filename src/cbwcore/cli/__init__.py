"""The cbwcore command: 0 done, 1 the operation failed, 2 usage. Errors are one line on stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import cbwcore
from cbwcore.cli.arguments import Parser, UsageError
from cbwcore.cli.backup import add_command as add_backup
from cbwcore.cli.bench import add_command as add_bench
from cbwcore.cli.bitmap import add_command as add_bitmap
from cbwcore.cli.demo import add_command as add_demo
from cbwcore.cli.info import add_command as add_info
from cbwcore.cli.restore import add_commands as add_restore
from cbwcore.cli.serve import add_command as add_serve
from cbwcore.errors import CbwError

__all__ = ["main"]

INTERRUPTED = 130  # what a shell reports for ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    if sys.stdout is None:  # it was closed before the start; without this the next file opened would be stdout
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    args = make_parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever read stdout has gone, and there is nobody to tell
        status = 1
    except UsageError as e:
        return fail(describe(e), 2)
    except (OSError, CbwError) as e:
        status = fail(describe(e))
    drop_output()
    return status


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run``, which takes the arguments and returns the exit code."""
    parser = Parser(prog="cbwcore", description="Copy-before-write snapshots of block storage.")
    parser.add_argument("--version", action="version", version=f"cbwcore {cbwcore.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_demo(commands)
    add_info(commands)
    add_serve(commands)
    add_backup(commands)
    add_restore(commands)
    add_bitmap(commands)
    add_bench(commands)
    return parser


def describe(error: Exception) -> str:
    """An error in one printable line: the path and the errno's text where it has them."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(text.splitlines()).encode(errors="backslashreplace").decode()


def drop_output() -> None:
    """What stdout does not take now must not be tried again, and fail with a traceback, when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(text: str, status: int = 1) -> int:
    """Say what failed; the exit code."""
    print(f"cbwcore: {text}", file=sys.stderr)
    return status
