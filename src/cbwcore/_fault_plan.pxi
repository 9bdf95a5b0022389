# Part of _cbwcore.pyx: faults for tests, as a Python object.

cdef dict FAULT_OPS = {"pread": OP_READ, "pwrite": OP_WRITE, "zero": OP_ZERO, "discard": OP_DISCARD, "flush": OP_FLUSH,
                       "seek": OP_SEEK}


cdef class FaultPlan:
    """Faults to inject between the engine and a file, for tests; see DiskCore._inject(). It logs every call, too."""
    cdef fault_plan *plan

    def __cinit__(self):
        self.plan = <fault_plan *>calloc(1, sizeof(fault_plan))
        if self.plan == NULL or plan_init(self.plan, &PSYNC) < 0:
            raise MemoryError("no memory for a fault plan")

    def __dealloc__(self):
        free(self.plan)

    def _add(self, str op, int action, int64_t value, start, end, skip, times):
        cdef fault_plan *p = self.plan
        cdef fault_rule r
        cdef bint full
        r.op = FAULT_OPS[op]
        r.action = action
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

    def error(self, op, code=EIO, *, start=0, end=2**63, skip=0, times=2**63):
        """Fail calls of ``op`` ("pread", "pwrite", "zero", "discard", "flush", "seek") with errno ``code``: those that touch
        bytes [start, end), after the first ``skip`` of them, ``times`` of them."""
        self._add(op, ACT_ERROR, code, start, end, skip, times)

    def short(self, op, nbytes, *, start=0, end=2**63, skip=0, times=2**63):
        """Let calls transfer at most ``nbytes``."""
        self._add(op, ACT_SHORT, nbytes, start, end, skip, times)

    def delay(self, op, seconds, *, start=0, end=2**63, skip=0, times=2**63):
        """Let calls sleep first."""
        self._add(op, ACT_DELAY, int(seconds * 1e9), start, end, skip, times)

    def stall(self, op, *, start=0, end=2**63, skip=0, times=2**63):
        """Let calls wait for release() first."""
        self._add(op, ACT_STALL, 0, start, end, skip, times)

    def release(self):
        """Forget all rules and let stalled calls go on."""
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
