# Where a disk's bytes live.

cdef class Layout:
    """Where a disk's bytes live; shared by its queues."""

    cdef pu_layout layout
    cdef const pu_policy *policy  # by which queues serve it
    cdef bint made
    cdef int process
    cdef int queues     # that may come to use its files
    cdef int *numbers   # of files that were given up, to be closed when no queue is left
    cdef int nr_numbers
    cdef object deferred  # who is told of requests that others finish

    def __init__(self):
        raise TypeError("use Layout.table, stripe or per_request")

    @staticmethod
    cdef Layout make(pu_layout_kind kind, uint64_t size, list files, uint32_t extents):
        made = <Layout>Layout.__new__(Layout)
        made.fill(kind, size, files, extents)
        return made

    cdef int fill(
        self, pu_layout_kind kind, uint64_t size, list files, uint32_t extents
    ) except -1:
        if self.made:
            raise RuntimeError("this layout is made already")
        cdef int error = pu_layout_init(&self.layout, kind, size, <uint32_t>len(files), extents)
        if error < 0:
            raise MemoryError("a layout of this size does not fit into memory")
        self.policy = &pu_direct
        self.made = True
        self.process = pu_process()
        for index, (fd, memory, device) in enumerate(files):
            pu_layout_set_file(&self.layout, <uint32_t>index, fd, memory, device)
        return 0

    cdef int tell(self, Queue queue, pu_mapped *mapped, object leg_failed) except -1:
        """Tells the target what the policy of a queue has to tell."""
        mapped.to_tell = False
        self.tell_deferred(queue, mapped)
        return 0

    def protect(self, uint32_t index):
        if index >= self.layout.nr_files:
            raise ValueError(f"there is no file {index}; there are {self.layout.nr_files}")
        self.layout.files[index].read_only = True

    cdef int tell_deferred(self, Queue queue, pu_mapped *mapped) except -1:
        cdef uint16_t tag
        cdef pu_desc *desc
        while pu_deferred_next(mapped, &tag):
            desc = &queue.q.desc[tag]
            self.deferred(
                queue, tag, pu_tag_generation(&queue.q.tags[tag]), OPS[desc.op_flags & 31],
                pu_desc_offset(desc), <uint64_t>desc.nr_sectors << PU_SECTOR_SHIFT,
            )
        return 0

    @property
    def defers_flushes(self):
        return self.layout.defers_flushes

    def defer(self, told, *, bint flushes):
        if flushes and self.policy != &pu_direct:
            raise ValueError("flushes of this layout are answered when its files are synced")
        self.deferred = told
        self.layout.defers_flushes = flushes

    def map_memory(self):
        pu_layout_map_memory(&self.layout)

    def unmap_memory(self):
        if self.process == pu_process():
            pu_layout_unmap_memory(&self.layout)

    def __dealloc__(self):
        for i in range(self.nr_numbers):
            close_number(self.numbers[i])
        free(self.numbers)
        if self.made and self.process == pu_process():
            pu_layout_destroy(&self.layout)

    @property
    def in_use(self):
        return self.queues > 0

    def give_up(self, int fd):
        numbers = <int *>realloc(self.numbers, (self.nr_numbers + 1) * sizeof(int))
        if numbers == NULL:
            raise MemoryError()
        self.numbers = numbers
        inert = os.eventfd(0)
        try:
            os.dup2(inert, fd, False)
        finally:
            os.close(inert)
        self.numbers[self.nr_numbers] = fd
        self.nr_numbers += 1

    @classmethod
    def table(cls, files, extents):
        cdef list rows = list(extents)
        cdef uint64_t at = 0
        if not rows:
            raise ValueError("a table needs at least one extent")
        made = Layout.make(PU_LAYOUT_TABLE, sum([row[2] for row in rows]), list(files),
                           <uint32_t>len(rows))
        for index, (file, offset, length) in enumerate(rows):
            check_extent(made, file, length)
            made.layout.extents[index].start = at
            made.layout.extents[index].length = length
            made.layout.extents[index].offset = offset
            made.layout.extents[index].file = file
            at += length
        return made

    @classmethod
    def stripe(cls, files, uint64_t size, uint64_t chunk):
        made = Layout.make(PU_LAYOUT_STRIPE, size, list(files), 0)
        made.layout.chunk = chunk
        return made

    @classmethod
    def per_request(cls, files, uint64_t size):
        return Layout.make(PU_LAYOUT_PER_REQUEST, size, list(files), 0)

    @property
    def size(self):
        return pu_layout_size(&self.layout)

    def resize(self, uint64_t size):
        if pu_layout_resize(&self.layout, size) < 0:
            raise ValueError(f"this layout cannot have {size} bytes")

    @property
    def in_memory(self):
        return all([self.layout.files[i].memory for i in range(self.layout.nr_files)])


cdef int check_extent(Layout layout, object file, object length) except -1:
    if not 0 <= file < layout.layout.nr_files:
        raise ValueError(f"an extent names file {file}; there are {layout.layout.nr_files}")
    if length <= 0:
        raise ValueError(f"an extent must have a positive length, not {length}")
    return 0
