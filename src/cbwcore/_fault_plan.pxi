# Part of _cbwcore.pyx: faults for tests, as a Python object.

cdef dict FAULT_OPS = {"pread": OP_READ, "pwrite": OP_WRITE, "zero": OP_ZERO, "discard": OP_DISCARD, "flush": OP_FLUSH,
                       "seek": OP_SEEK}
cdef dict FAULT_ACTIONS = {"error": ACT_ERROR, "short": ACT_SHORT, "delay": ACT_DELAY, "stall": ACT_STALL}
cdef object ALWAYS = 2**63


def parse_fault_rule(str text):
    """(op, action, value, limits) of a rule as `FaultPlan` prints it: ``pwrite error EIO start=65536 times=1``. ConfigError."""
    words = iter(text.split())
    op, action = next(words, ""), next(words, "")
    value = None if action == "stall" else next(words, "")
    limits = {}
    try:
        FAULT_OPS[op], FAULT_ACTIONS[action]
        if action == "error":
            value = getattr(_errno, value)
        elif value is not None:
            value = float(value) if action == "delay" else int(value)
        for word in words:
            key, _, number = word.partition("=")
            if key not in ("start", "end", "skip", "times"):
                raise ValueError(key)
            limits[key] = int(number)
    except (ValueError, KeyError, AttributeError):
        raise ConfigError(f"{text!r} is no rule of a fault plan") from None
    return op, action, value, limits


cdef class FaultPlan:
    """Faults to inject between the engine and a file, for tests; see DiskCore._inject(). It logs every call, too.

    ``text``: rules to begin with, as ``str(plan)`` has them, separated by semicolons; ``repr(plan)`` can be evaluated."""
    cdef fault_plan *plan
    cdef list rules                    # as they were given, since the last release()
    cdef readonly list history         # the texts before that, one for each release()

    def __cinit__(self, str text=""):
        self.plan = <fault_plan *>calloc(1, sizeof(fault_plan))
        if self.plan == NULL or plan_init(self.plan, &PSYNC) < 0:
            raise MemoryError("no memory for a fault plan")
        self.rules = []
        self.history = []
        for rule in filter(None, (part.strip() for part in text.split(";"))):
            op, action, value, limits = parse_fault_rule(rule)
            call = getattr(self, action)
            call(op, **limits) if value is None else call(op, value, **limits)

    def __str__(self):
        return "; ".join(self.rules)

    def __repr__(self):
        return f"FaultPlan({str(self)!r})"

    def __dealloc__(self):
        free(self.plan)

    def _add(self, str op, str action, int64_t value, shown, start, end, skip, times):
        cdef fault_plan *p = self.plan
        cdef fault_rule r
        cdef bint full
        limits = {"start": (start, 0), "end": (end, ALWAYS), "skip": (skip, 0), "times": (times, ALWAYS)}
        r.op = FAULT_OPS[op]
        r.action = FAULT_ACTIONS[action]
        r.value = value
        r.start = start
        r.end = end
        r.skip = skip
        r.times = times
        pthread_mutex_lock(&p.lock)
        full = p.nrules == MAX_RULES
        if not full:
            p.rules[p.nrules] = r
            p.nrules += 1
        pthread_mutex_unlock(&p.lock)
        if full:
            raise ConfigError(f"a plan has at most {MAX_RULES} rules")
        self.rules.append(" ".join([op, action, *shown, *(f"{k}={v}" for k, (v, usual) in limits.items() if v != usual)]))

    def error(self, op, code=EIO, *, start=0, end=ALWAYS, skip=0, times=ALWAYS):
        """Fail calls of ``op`` ("pread", "pwrite", "zero", "discard", "flush", "seek") with errno ``code``: those that touch
        bytes [start, end), after the first ``skip`` of them, ``times`` of them."""
        self._add(op, "error", code, [_errno.errorcode[code]], start, end, skip, times)

    def short(self, op, nbytes, *, start=0, end=ALWAYS, skip=0, times=ALWAYS):
        """Let calls transfer at most ``nbytes``."""
        self._add(op, "short", nbytes, [str(nbytes)], start, end, skip, times)

    def delay(self, op, seconds, *, start=0, end=ALWAYS, skip=0, times=ALWAYS):
        """Let calls sleep first."""
        self._add(op, "delay", int(seconds * 1e9), [str(float(seconds))], start, end, skip, times)

    def stall(self, op, *, start=0, end=ALWAYS, skip=0, times=ALWAYS):
        """Let calls wait for release() first."""
        self._add(op, "stall", 0, [], start, end, skip, times)

    def release(self):
        """Forget all rules and let stalled calls go on."""
        self.history.append(str(self))
        self.rules = []
        with nogil:
            plan_release(self.plan)

    def wait_stalled(self, uint64_t count=1):
        """Wait until ``count`` calls are stalled."""
        cdef fault_plan *p = self.plan
        with nogil:
            pthread_mutex_lock(&p.lock)
            while p.stalled < count:
                pthread_cond_wait(&p.changed, &p.lock)
            pthread_mutex_unlock(&p.lock)

    @property
    def stalled(self):
        """How many calls are stalled now."""
        pthread_mutex_lock(&self.plan.lock)
        stalled = self.plan.stalled
        pthread_mutex_unlock(&self.plan.lock)
        return stalled

    def calls(self, op=None):
        """The calls seen, oldest first, as (op, offset, length); the last 65536 of them."""
        cdef fault_plan *p = self.plan
        cdef fault_call *log = <fault_call *>malloc(sizeof(p.log))
        cdef uint64_t n, i
        if log == NULL:
            raise MemoryError("no memory for the log")
        pthread_mutex_lock(&p.lock)
        memcpy(log, p.log, sizeof(p.log))
        n = p.ncalls
        pthread_mutex_unlock(&p.lock)
        names = {v: k for k, v in FAULT_OPS.items()}
        seen = [(names[log[i % LOG_LENGTH].op], log[i % LOG_LENGTH].off, log[i % LOG_LENGTH].n)
                for i in range(n - least(n, LOG_LENGTH), n)]
        free(log)
        return [call for call in seen if op is None or call[0] == op]

    def forget_calls(self):
        """Empty the log."""
        pthread_mutex_lock(&self.plan.lock)
        self.plan.ncalls = 0
        pthread_mutex_unlock(&self.plan.lock)
