# Presence maps: which blocks the upper file has, and who is asked for the others.

cdef extern from "_core/presence.h" nogil:
    ctypedef unsigned char truth "bool"  # to point to: a bint is larger

    uint64_t PU_PRESENCE_PAGE

    struct pu_presence_counters:
        uint64_t hits
        uint64_t misses
        uint64_t copy_ups

    struct pu_presence:
        const pu_presence *next
        const pu_layout *bottom
        uint32_t shift
        uint64_t nr_blocks
        bint evicts
        uint64_t *writable
        pu_regions regions

    struct pu_presence_options:
        uint32_t block_bytes
        uint64_t *present
        bint gated
        bint evicts
        bint writes_through
        bint always_deferred

    uint64_t pu_presence_words(uint64_t, uint32_t)
    int pu_presence_init(pu_presence *, pu_layout *, const pu_presence_options *)
    void pu_presence_destroy(pu_presence *)
    bint pu_presence_has_all(const pu_presence *, uint64_t, uint64_t)
    uint64_t pu_presence_run(const pu_presence *, uint64_t, uint64_t, truth *)
    uint64_t pu_presence_count(const pu_presence *, uint64_t, uint64_t)
    uint64_t pu_presence_claim(pu_presence *, uint64_t *, uint64_t, uint64_t)
    bint pu_presence_let_go(pu_presence *, uint64_t, uint64_t, bint)
    uint64_t pu_presence_evict(pu_presence *, uint64_t *, uint64_t)
    void pu_presence_set_writable(pu_presence *, uint64_t, uint64_t, bint)
    bint pu_presence_is_writable(const pu_presence *, uint64_t, uint64_t)
    bint pu_presence_take_touched(pu_presence *, uint64_t, uint64_t)
    void pu_presence_fail(pu_presence *, uint64_t, uint64_t, int)
    void pu_presence_begin_sync(pu_presence *)
    void pu_presence_end_sync(pu_presence *)
    bint pu_presence_is_synced(const pu_presence *)
    bint pu_presence_take_dirty(pu_presence *, uint64_t *)
    void pu_presence_mark_dirty(pu_presence *, uint64_t)
    void pu_presence_read_counters(const pu_presence *, pu_presence_counters *)

cdef extern from "_core/present.h" nogil:
    enum pu_wish_kind:
        PU_WISH_FETCH
        PU_WISH_WRITE

    struct pu_wish:
        pu_wish_kind kind
        uint16_t tag
        uint32_t generation
        uint64_t first
        uint64_t end

    const pu_policy *pu_present(pu_presence *)
    bint pu_present_next_wish(pu_mapped *, pu_wish *)
    bint pu_present_take_wake(pu_mapped *)


cdef extern from "sys/mman.h" nogil:
    int PROT_READ
    int PROT_WRITE
    int MAP_SHARED
    void *MAP_FAILED

    void *mmap(void *, size_t, int, int, int, uint64_t)
    int munmap(void *, size_t)


cdef class FileMemory:
    """A part of a file, in memory. The mapping keeps the file, and takes no descriptor."""

    cdef void *bytes
    cdef size_t length

    def __init__(self, int fd, size_t length, *, uint64_t offset=0):
        if self.bytes != NULL:
            raise RuntimeError("this memory is mapped already")
        found = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset)
        if found == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.bytes = found
        self.length = length

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.bytes, self.length, False, flags)

    def __dealloc__(self):
        if self.bytes != NULL:
            munmap(self.bytes, self.length)


cdef class PresenceLayout(Layout):
    """Blocks are in the first file where their bit is set, else below: in the other files, as
    `below` has it, or nowhere, then they are asked for."""

    cdef pu_presence presence
    cdef Layout below
    cdef Py_buffer bits
    cdef bint has_bits
    cdef object fetch
    cdef object ask_to_write
    cdef object wake_queues

    def __init__(self, files, uint64_t size, bits, *, uint32_t block_bytes, Layout below=None,
                 bint gated=False, bint evicts=False, bint writes_through=False,
                 bint always_deferred=False):
        cdef pu_presence_options options
        if block_bytes < 4096 or block_bytes & (block_bytes - 1):
            raise ValueError(f"blocks of {block_bytes} bytes: a power of two, at least 4096")
        if self.has_bits:
            raise RuntimeError("this layout is made already")
        PyObject_GetBuffer(bits, &self.bits, PyBUF_WRITABLE)
        self.has_bits = True
        if self.bits.len < 8 * <Py_ssize_t>pu_presence_words(size, block_bytes):
            raise ValueError(f"{self.bits.len} bytes are too few bits for {size} bytes of disk")
        if <uintptr_t>self.bits.buf % 8:
            raise ValueError("the bits must lie at a multiple of 8 bytes")
        self.fill(PU_LAYOUT_TABLE, size, list(files), 1)
        self.layout.extents[0].length = size
        memset(&options, 0, sizeof(options))
        options.block_bytes = block_bytes
        options.present = <uint64_t *>self.bits.buf
        options.gated = gated
        options.evicts = evicts
        options.writes_through = writes_through
        options.always_deferred = always_deferred
        if pu_presence_init(&self.presence, &self.layout, &options) < 0:
            raise MemoryError("a map of this size does not fit into memory")
        self.lie_over(below)
        self.policy = pu_present(&self.presence)

    cdef int lie_over(self, Layout below) except -1:
        self.below = below
        if below is None:
            return 0
        if isinstance(below, PresenceLayout):
            self.presence.next = &(<PresenceLayout>below).presence
            self.presence.bottom = self.presence.next.bottom
        else:
            self.presence.bottom = &below.layout
        if not is_served_by_files(below):
            raise ValueError("what is below has no bytes in files that a map can lie over")
        return 0

    @staticmethod
    def can_lie_over(Layout below):
        """Whether its files have its bytes, in a way that can be told without asking."""
        return is_served_by_files(below)

    def __dealloc__(self):
        if self.process == pu_process():
            pu_presence_destroy(&self.presence)
        if self.has_bits:
            PyBuffer_Release(&self.bits)

    @staticmethod
    def map_bytes(uint64_t size, uint32_t block_bytes):
        """Bytes of the bits for a disk: whole pages."""
        return 8 * pu_presence_words(size, block_bytes)

    def ask(self, *, fetch, write, wake):
        """Whom queues tell: `fetch(layout, offset, length)` of blocks that are held for him until
        `let_go`; `write(queue, tag, generation, offset, length)` of a write that waits to be
        allowed; `wake()` to wake all queues."""
        self.fetch = fetch
        self.ask_to_write = write
        self.wake_queues = wake

    cdef int tell(self, Queue queue, pu_mapped *mapped, object leg_failed) except -1:
        cdef pu_wish wish
        cdef uint64_t offset, end
        mapped.to_tell = False
        while pu_present_next_wish(mapped, &wish):
            offset = wish.first << self.presence.shift
            end = min(wish.end << self.presence.shift, self.layout.size)
            if wish.kind == PU_WISH_FETCH:
                self.fetch(self, offset, end - offset)
            else:
                self.ask_to_write(queue, wish.tag, wish.generation, offset, end - offset)
        self.tell_deferred(queue, mapped)
        if pu_present_take_wake(mapped):
            self.wake_queues()
        return 0

    # ---- looking ----

    @property
    def block_bytes(self):
        return 1 << self.presence.shift

    cdef int range_of(
        self, uint64_t offset, uint64_t length, uint64_t *first, uint64_t *end
    ) except -1:
        """The blocks that a range of bytes touches."""
        if offset > self.layout.size or length > self.layout.size - offset:
            raise ValueError(
                f"{length} bytes at {offset} are not inside the disk, which has {self.layout.size}"
            )
        first[0] = offset >> self.presence.shift
        end[0] = (offset + length + (1 << self.presence.shift) - 1) >> self.presence.shift
        return 0

    cdef tuple in_bytes(self, uint64_t first, uint64_t count):
        cdef uint64_t offset = first << self.presence.shift
        return offset, min((first + count) << self.presence.shift, self.layout.size) - offset

    def is_present(self, uint64_t offset, uint64_t length):
        """Whether all blocks that the range touches are."""
        cdef uint64_t first, end
        self.range_of(offset, length, &first, &end)
        return pu_presence_has_all(&self.presence, first, end)

    def run(self, uint64_t offset, uint64_t end):
        """The length (bytes) of the run of blocks that are alike from `offset` on, a block's start,
        at most up to `end`; and whether they are present."""
        cdef uint64_t first, last
        cdef truth present
        self.range_of(offset, end - offset, &first, &last)
        if first == last:
            raise ValueError(f"there are no blocks from {offset} up to {end}")
        count = pu_presence_run(&self.presence, first, last, &present)
        return min((first + count) << self.presence.shift, end) - offset, bool(present)

    def count_present(self):
        """How many blocks are."""
        cdef uint64_t count
        with nogil:
            count = pu_presence_count(&self.presence, 0, self.presence.nr_blocks)
        return count

    def counters(self):
        """Requests that found all blocks present, those that did not, and parts copied up."""
        cdef pu_presence_counters sum
        pu_presence_read_counters(&self.presence, &sum)
        return sum.hits, sum.misses, sum.copy_ups

    # ---- filling ----

    def claim(self, uint64_t offset, uint64_t length, uint64_t most):
        """Holds absent blocks of the range that nobody holds, in runs of at most `most` bytes; the
        runs (offset, length), each to be ended by `let_go`."""
        cdef uint64_t first, end, count, blocks = max(most >> self.presence.shift, 1)
        cdef list runs = []
        self.range_of(offset, length, &first, &end)
        while True:
            count = pu_presence_claim(&self.presence, &first, end, blocks)
            if not count:
                return runs
            runs.append(self.in_bytes(first, count))
            first += count

    def let_go(self, uint64_t offset, uint64_t length, bint present):
        """Of blocks that were held: they are in the upper file whole now, or are absent still."""
        cdef uint64_t first, end
        self.range_of(offset, length, &first, &end)
        pu_presence_let_go(&self.presence, first, end, present)

    def fail(self, uint64_t offset, uint64_t length, int error):
        """Requests that wait for one of the blocks fail with this errno. Before `let_go`."""
        cdef uint64_t first, end
        self.range_of(offset, length, &first, &end)
        pu_presence_fail(&self.presence, first, end, -error)

    # ---- the map's file ----

    @property
    def synced(self):
        """Whether the file says what the bits say."""
        return pu_presence_is_synced(&self.presence)

    def begin_sync(self):
        pu_presence_begin_sync(&self.presence)

    def end_sync(self):
        pu_presence_end_sync(&self.presence)

    def take_dirty(self):
        """The pages that changed: (their place among the bits in bytes, a copy), which count as
        written from now on, or are to be marked dirty again."""
        cdef uint64_t page = 0
        cdef list pages = []
        while pu_presence_take_dirty(&self.presence, &page):
            at = page * PU_PRESENCE_PAGE
            pages.append((at, (<const char *>self.bits.buf)[at : at + PU_PRESENCE_PAGE]))
            page += 1
        return pages

    def mark_dirty(self, uint64_t place):
        """The page of the bits at this byte is out of date in the file."""
        if place >= <uint64_t>self.bits.len:
            raise ValueError(f"there are no bits at {place}")
        pu_presence_mark_dirty(&self.presence, place // PU_PRESENCE_PAGE)

    # ---- eviction, and what it needs ----

    cdef int check_evicts(self) except -1:
        if not self.presence.evicts:
            raise ValueError("this map was not made for eviction")
        return 0

    @property
    def region_bytes(self):
        self.check_evicts()
        return self.presence.regions.bytes

    def block_region(self, region=None):
        """No request begins in this region (None: any may); `wake` the queues then."""
        self.check_evicts()
        pu_regions_block(&self.presence.regions, PU_NO_REGION if region is None else region)

    def is_drained(self, uint64_t region):
        """Whether no request to the region is under way."""
        self.check_evicts()
        return pu_regions_are_drained(&self.presence.regions, region)

    def uses(self, uint64_t region):
        """How many requests have begun in a region; wraps around at 2**32."""
        self.check_evicts()
        return pu_regions_begun(&self.presence.regions, region)

    def evict(self, uint64_t offset, uint64_t length):
        """Makes the present blocks of the range absent, and holds them; runs as of `claim`. Its
        region is blocked and drained."""
        cdef uint64_t first, end, count
        cdef list runs = []
        self.check_evicts()
        self.range_of(offset, length, &first, &end)
        while True:
            count = pu_presence_evict(&self.presence, &first, end)
            if not count:
                return runs
            runs.append(self.in_bytes(first, count))
            first += count

    def take_touched(self, uint64_t offset, uint64_t length):
        """Whether a request touched one of the blocks since this was asked last."""
        cdef uint64_t first, end
        self.check_evicts()
        self.range_of(offset, length, &first, &end)
        return pu_presence_take_touched(&self.presence, first, end)

    def set_writable(self, uint64_t offset, uint64_t length, bint writable):
        cdef uint64_t first, end
        if self.presence.writable == NULL:
            raise ValueError("this map was not made with writes that are gated")
        self.range_of(offset, length, &first, &end)
        pu_presence_set_writable(&self.presence, first, end, writable)

    def is_writable(self, uint64_t offset, uint64_t length):
        cdef uint64_t first, end
        self.range_of(offset, length, &first, &end)
        return pu_presence_is_writable(&self.presence, first, end)


cdef bint is_served_by_files(Layout below):
    if isinstance(below, PresenceLayout):
        return (<PresenceLayout>below).presence.bottom != NULL
    return below.policy == &pu_direct and below.layout.kind != PU_LAYOUT_PER_REQUEST
