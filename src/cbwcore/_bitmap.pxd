# Atomic bitmaps over clusters, and fast search for runs in them.
#
# A bit's value is (word ^ flip): a map of all ones and a map of all zeroes both start as untouched
# pages, so arming a snapshot of any size costs no page (R17). Changes are atomic per word with
# acquire-release order; there is no lock. Bits past nbits are never set in a map with flip 0, so its
# bytes can be shown to NumPy and bitarray as they are.

from libc.errno cimport ENOMEM
from libc.stdint cimport uint64_t
from cbwcore._sys cimport (
    MADV_DONTNEED, and_acq_rel, count_bits, load_acquire, load_relaxed, lowest_bit, madvise, map_file_over, map_lazily,
    move_pages_over, munmap, or_acq_rel, skip_blank_words, store_release,
)
from cbwcore._geometry cimport least, round_up

cdef enum:
    PAGE = 4096


cdef struct bitmap:
    uint64_t *words
    uint64_t nbits
    uint64_t flip       # 0, or all ones in a map whose untouched bits read as 1
    uint64_t mapped     # bytes of address space
    bint in_file        # the words are a file's, and outlive the process


cdef inline int bitmap_init(bitmap *b, uint64_t nbits, bint value) noexcept nogil:
    """All bits `value`. 0, or -ENOMEM."""
    b.nbits = nbits
    b.in_file = False
    b.flip = ~<uint64_t>0 if value else 0
    b.mapped = round_up((nbits + 7) // 8 + 1, PAGE)
    b.words = <uint64_t *>map_lazily(b.mapped)
    return 0 if b.words != NULL else -ENOMEM


cdef inline void bitmap_free(bitmap *b) noexcept nogil:
    if b.words != NULL:
        munmap(b.words, b.mapped)
    b.words = NULL


cdef inline int bitmap_map_file(bitmap *b, int fd, uint64_t off, bint shared) noexcept nogil:
    """From here on the words are those of the file at `off`, a multiple of PAGE, over `mapped` bytes; at the same address,
    and what they were is forgotten. Of a map without flip that nobody uses yet. 0 or -errno."""
    cdef int rc = map_file_over(b.words, b.mapped, fd, off, shared)
    b.in_file = rc == 0
    return rc


cdef inline int bitmap_unmap_file(bitmap *b) noexcept nogil:
    """From here on the words are memory again, with what the file's had, at the same address: readers notice nothing. Nobody
    may be setting bits. 0 or -errno."""
    cdef uint64_t k = 0, end = b.mapped // 8
    cdef uint64_t *words
    cdef int rc
    if not b.in_file:
        return 0
    words = <uint64_t *>map_lazily(b.mapped)
    if words == NULL:
        return -ENOMEM
    while True:
        k = skip_blank_words(b.words, k, end, 0)
        if k == end:
            break
        words[k] = load_relaxed(b.words + k)
        k += 1
    rc = move_pages_over(b.words, words, b.mapped)
    if rc < 0:
        munmap(words, b.mapped)
        return rc
    b.in_file = False
    return 0


cdef inline int bitmap_reset(bitmap *b) noexcept nogil:
    """Every bit back to its first value, and the pages back to the system; of a file's, the pages that have bits are written.
    Nobody else may be setting bits."""
    cdef uint64_t k = 0, end = b.mapped // 8
    while b.in_file:
        k = skip_blank_words(b.words, k, end, 0)
        if k == end:
            return 0
        store_release(b.words + k, 0)
        k += 1
    return madvise(b.words, b.mapped, MADV_DONTNEED)


cdef inline uint64_t word_mask(uint64_t k, uint64_t first, uint64_t end) noexcept nogil:
    """The bits of word `k` that lie in [first, end); the word must hold at least one."""
    cdef uint64_t mask = ~<uint64_t>0
    if k == first >> 6:
        mask &= ~<uint64_t>0 << (first & 63)
    if k == (end - 1) >> 6:
        mask &= ~<uint64_t>0 >> (63 - ((end - 1) & 63))
    return mask


cdef inline bint bitmap_test(const bitmap *b, uint64_t i) noexcept nogil:
    return ((load_acquire(b.words + (i >> 6)) ^ b.flip) >> (i & 63)) & 1


cdef inline bint bitmap_any(const bitmap *b, uint64_t first, uint64_t end) noexcept nogil:
    """Whether a bit of [first, end) is set; `end` > `first`. The fast path of every guest write."""
    cdef uint64_t k
    for k in range(first >> 6, ((end - 1) >> 6) + 1):
        if (load_acquire(b.words + k) ^ b.flip) & word_mask(k, first, end):
            return True
    return False


cdef inline void bitmap_put(bitmap *b, uint64_t first, uint64_t end, bint value) noexcept nogil:
    """Make [first, end) `value`. A word that already is so is not written, and its page not touched."""
    cdef uint64_t k, mask, off
    if first >= end:
        return
    for k in range(first >> 6, ((end - 1) >> 6) + 1):
        mask = word_mask(k, first, end)
        off = (load_relaxed(b.words + k) ^ b.flip ^ (0 if value else ~<uint64_t>0)) & mask
        if off == mask:
            continue
        if value == (b.flip == 0):
            or_acq_rel(b.words + k, mask)
        else:
            and_acq_rel(b.words + k, ~mask)


cdef inline uint64_t bitmap_next(const bitmap *b, uint64_t start, uint64_t end, bint value) noexcept nogil:
    """The first bit of [start, end) that is `value`, else `end`."""
    cdef uint64_t blank = b.flip if value else ~b.flip
    cdef uint64_t k, last, word
    if start >= end:
        return end
    k = start >> 6
    last = (end - 1) >> 6
    word = (load_acquire(b.words + k) ^ blank) & (~<uint64_t>0 << (start & 63))
    while word == 0:
        k = skip_blank_words(b.words, k + 1, last + 1, blank)
        if k > last:
            return end
        word = load_acquire(b.words + k) ^ blank
    return least(k * 64 + <uint64_t>lowest_bit(word), end)


cdef inline uint64_t bitmap_count(const bitmap *b, uint64_t first, uint64_t end) noexcept nogil:
    """How many bits of [first, end) are set."""
    cdef uint64_t k, total = 0
    if first >= end:
        return 0
    k = first >> 6
    while k <= (end - 1) >> 6:
        total += <uint64_t>count_bits((load_relaxed(b.words + k) ^ b.flip) & word_mask(k, first, end))
        k = skip_blank_words(b.words, k + 1, ((end - 1) >> 6) + 1, b.flip) if not b.flip else k + 1
    return total
