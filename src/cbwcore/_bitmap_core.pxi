# Part of _cbwcore.pyx: bitmaps, as Python objects.

cdef class BitmapCore:
    """``nbits`` bits; the buffer protocol shows them read-only, bit i at byte i // 8, lowest bit first."""
    cdef bitmap map
    cdef Py_ssize_t nbytes
    cdef DiskCore recorded_by          # the disk whose guest writes set bits here, or None
    cdef readonly object size          # bytes that the bitmap speaks of
    cdef readonly object granularity   # bytes per bit
    cdef readonly object inconsistent  # why its bits cannot be relied on, or None
    cdef int shift

    def __cinit__(self, size, int shift, *args, **kwargs):
        self.size = as_bytes(size, "size")
        self.shift = shift
        self.granularity = 1 << shift
        cdef uint64_t nbits = (self.size + self.granularity - 1) >> shift
        if bitmap_init(&self.map, nbits, False) < 0:
            raise MemoryError(f"no address space for a bitmap of {nbits} bits")
        self.nbytes = (nbits + 7) // 8

    def __dealloc__(self):
        bitmap_free(&self.map)

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.inconsistent is not None:
            raise BufferError(f"the bitmap is inconsistent: {self.inconsistent}")
        PyBuffer_FillInfo(view, self, self.map.words, self.nbytes, 1, flags)

    def __len__(self):
        return self.map.nbits

    def _put(self, uint64_t first, uint64_t end, bint value):
        with nogil:
            bitmap_put(&self.map, first, least(end, self.map.nbits), value)

    def _next(self, uint64_t start, bint value):
        cdef uint64_t bit
        with nogil:
            bit = bitmap_next(&self.map, start, self.map.nbits, value)
        return bit

    def _run(self, uint64_t start):
        """(first, end) of the first run of set bits from ``start`` on; both the number of bits where there is none."""
        cdef uint64_t first, end
        with nogil:
            first = bitmap_next(&self.map, start, self.map.nbits, True)
            end = bitmap_next(&self.map, first, self.map.nbits, False)
        return first, end

    def _run_at(self, uint64_t bit):
        """(value, end) of the run that ``bit`` is in."""
        cdef bint value
        cdef uint64_t end
        with nogil:
            value = bitmap_test(&self.map, bit)
            end = bitmap_next(&self.map, bit + 1, self.map.nbits, not value)
        return value, end

    def _count(self):
        cdef uint64_t n
        with nogil:
            n = bitmap_count(&self.map, 0, self.map.nbits)
        return n

    def _merge(self, BitmapCore other):
        """Set every bit whose range touches a set bit of ``other``."""
        cdef uint64_t size = self.size
        with nogil:
            merge_bits(&self.map, NULL, self.shift, &other.map, other.shift, size)

    def _reset(self):
        cdef int rc
        cdef DiskCore recorded_by = self.recorded_by
        if recorded_by is not None:
            recorded_by.check_usable()
        with nogil:
            if recorded_by is not None:
                gate_shut(recorded_by.d)
            rc = bitmap_reset(&self.map)
            if recorded_by is not None:
                gate_open(recorded_by.d)
        if rc < 0:
            raise MemoryError("the bitmap could not be cleared")

    @property
    def _mapped(self):
        """Bytes that the bits take in memory, or in a file: whole pages."""
        return self.map.mapped

    def _map_file(self, int fd, uint64_t offset, *, bint shared=True):
        """From here on the bits are those of the file at ``offset``, whole pages, which must have their blocks; so they outlive
        the process. Not ``shared``: what is changed here is not changed in the file. Only of a bitmap that nobody uses yet.
        Raises OSError."""
        cdef int rc = bitmap_map_file(&self.map, fd, offset, shared)
        if rc < 0:
            raise os_error(rc, None)

    def _unmap_file(self):
        """From here on the bits are in memory again, as they are now; nothing where they are not a file's. Nobody may be setting
        bits. Raises OSError."""
        cdef int rc
        with nogil:
            rc = bitmap_unmap_file(&self.map)
        if rc < 0:
            raise os_error(rc, None)

    def _spoil(self, str why):
        """The bits cannot be relied on, for good: nobody is shown them."""
        self.inconsistent = why

    @property
    def enabled(self):
        """Whether guest writes are recorded."""
        return self.recorded_by is not None

    def _record(self, DiskCore recorder):
        """Let the guest writes of ``recorder`` (None: of no disk) set bits here, once those in flight are done."""
        cdef int rc = 0
        cdef DiskCore before = self.recorded_by
        if (recorder or before) is not None:
            (<DiskCore>(recorder or before)).check_usable()
        if recorder is not None and before is None:
            with nogil:
                gate_shut(recorder.d)
                rc = add_sink(recorder.d, &self.map, self.shift)
                gate_open(recorder.d)
            if rc < 0:
                raise ConfigError(f"a disk records at most {MAX_SINKS} bitmaps")
        elif recorder is None and before is not None:
            with nogil:
                gate_shut(before.d)
                drop_sink(before.d, &self.map)
                gate_open(before.d)
        self.recorded_by = recorder


cdef void merge_bits(bitmap *into, bitmap *also, int shift, const bitmap *other, int other_shift,
                     uint64_t size) noexcept nogil:
    """Set in `into`, and in `also` if there is one, what touches a set bit of `other`, which may be changing: both get the
    same."""
    cdef uint64_t bit = 0, stop, start, end
    while True:
        bit = bitmap_next(other, bit, other.nbits, True)
        if bit == other.nbits:
            return
        stop = bitmap_next(other, bit, other.nbits, False)
        if stop == bit:
            continue                    # cleared meanwhile
        start = bit << other_shift
        end = least(stop << other_shift, size)
        bitmap_put(into, start >> shift, outer_end(start, end - start, shift), True)
        if also != NULL:
            bitmap_put(also, start >> shift, outer_end(start, end - start, shift), True)
        bit = stop
