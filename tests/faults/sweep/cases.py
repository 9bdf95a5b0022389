"""What is made to fail in one run of the sweep; as a line of text, it can be replayed."""

from __future__ import annotations

from typing import NamedTuple

POLICIES = {"G": "break-guest-write", "S": "break-snapshot"}
PROCESS = "process"  # calls of the whole process through libc: shim.c
TABLES = ("disk", "target")  # calls of the engine through the I/O table: FaultPlan

# In the order of shim.c, with what Linux may answer to each.
KINDS = {
    "read": ("EIO", "EINTR", "EAGAIN", "ENOMEM", "EBADF", "short"),
    "write": ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EAGAIN", "ENOMEM", "EBADF", "short"),
    "open": ("EIO", "ENOSPC", "EDQUOT", "EINTR", "ENOMEM", "EMFILE"),
    "close": ("EIO", "EINTR", "ENOSPC", "EDQUOT"),
    "sync": ("EIO", "ENOSPC", "EDQUOT", "EINTR"),
    "fallocate": ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EOPNOTSUPP", "ENOMEM"),
    "truncate": ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EFBIG"),
    "rename": ("EIO", "ENOSPC", "EDQUOT", "ENOMEM"),
    "unlink": ("EIO", "ENOMEM"),
    "seek": ("EIO", "ENOMEM", "EBADF"),
    "stat": ("EIO", "ENOMEM", "EBADF"),
    "lock": ("EAGAIN", "ENOLCK", "EINTR"),
    "mmap": ("ENOMEM", "EAGAIN"),
    "malloc": ("ENOMEM",),
    "thread": ("EAGAIN",),
}
TABLE_OPS = {
    "pread": ("EIO", "EINTR", "EAGAIN", "ENOMEM", "EBADF", "short"),
    "pwrite": ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EAGAIN", "ENOMEM", "EBADF", "short"),
    "zero": ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EOPNOTSUPP", "ENOMEM"),
    "discard": ("EIO", "ENOSPC", "EINTR", "EOPNOTSUPP"),
    "flush": ("EIO", "ENOSPC", "EDQUOT", "EINTR"),
    "seek": ("EIO", "EINTR", "ENOMEM"),
}
UNSEEN = ("EINTR", "EAGAIN", "short")  # after which a read or a write of data simply goes on (R12)


class Config(NamedTuple):
    """How the disk of a run is opened, and its snapshots' policy."""

    engine: str
    direct: bool
    policy: str

    def __str__(self) -> str:
        return f"{self.engine}/{'direct' if self.direct else 'buffered'}/{self.policy}"


CONFIGS = [
    Config(engine, direct, policy)
    for engine, direct in (("psync", False), ("psync", True), ("io_uring", False), ("io_uring", True))
    for policy in POLICIES
]


class Case(NamedTuple):
    """Calls of ``kind`` at ``place`` from the ``nth`` on (from 0), one or all of them, suffer ``action``: an errno's
    name, "short", "kill", or "" for nothing at all, which only counts them."""

    config: Config
    place: str
    kind: str
    nth: int
    action: str
    once: bool = True

    def __str__(self) -> str:
        return " ".join(
            [str(self.config), self.place, self.kind, str(self.nth), self.action or "-", "once" if self.once else "on"]
        )

    @property
    def is_unseen(self) -> bool:
        """Whether nobody may hear of it (R12): the call is made again, or the rest of it."""
        if self.place in TABLES:
            return self.action in UNSEEN
        return self.kind in ("read", "write") and self.action in ("EINTR", "short")

    @property
    def must_hit(self) -> bool:
        """Whether the call is there in each run. How many threads and buffers are needed is for the clock to say."""
        return bool(self.action) and self.kind not in ("malloc", "thread")

    @classmethod
    def parse(cls, text: str) -> Case:
        config, place, kind, nth, action, times = text.split()
        engine, mode, policy = config.split("/")
        return cls(
            Config(engine, mode == "direct", policy),
            place,
            kind,
            int(nth),
            action.replace("-", ""),
            times == "once",
        )


def counting(config: Config) -> Case:
    """A run without a fault."""
    return Case(config, PROCESS, "read", 0, "")


def all_cases(config: Config, seen: dict[str, int]) -> list[Case]:
    """Every call of a run without a fault (``seen``: "place kind" -> how many) times every action, once and from then
    on."""
    cases = []
    for key, count in seen.items():
        place, kind = key.split()
        actions = (KINDS if place == PROCESS else TABLE_OPS)[kind]
        for nth in range(count):
            for action in actions:
                cases.append(Case(config, place, kind, nth, action))
                if action not in UNSEEN:
                    cases.append(Case(config, place, kind, nth, action, once=False))
            if place == PROCESS and kind not in ("malloc", "mmap", "stat", "seek", "lock"):  # those change nothing
                cases.append(Case(config, place, kind, nth, "kill"))
    return cases
