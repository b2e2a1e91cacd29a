# Queues that are served from a layout's files.


cdef class Mapper:
    """A target's `map` method, and who is told when it raises."""

    cdef object map
    cdef Reporter reporter
    cdef pu_extent *parts
    cdef uint32_t room

    def __init__(self, target, report):
        self.map = target.map
        self.reporter = Reporter(report)

    def __dealloc__(self):
        free(self.parts)

    cdef int fill(self, object answer, uint64_t left) except -1:
        """The parts of an answer: (file, offset, length), or a sequence of these; none after one
        that is wrong among the `left` bytes, so that there is an end to any sequence."""
        cdef uint32_t count = 0
        cdef pu_extent *part
        if type(answer) is tuple and len(<tuple>answer) == 3 and type((<tuple>answer)[0]) is int:
            answer = (answer,)
        for piece in answer:
            if count == self.room:
                self.grow()
            file, offset, length = piece
            part = &self.parts[count]
            part.file = file
            part.offset = offset
            part.length = length
            count += 1
            if part.length - 1 >= left:
                break
            left -= part.length
        return count

    cdef int grow(self) except -1:
        cdef uint32_t room = self.room * 2 if self.room else 16
        parts = <pu_extent *>realloc(self.parts, room * sizeof(pu_extent))
        if parts == NULL:
            raise MemoryError()
        self.parts = parts
        self.room = room
        return 0

    cdef int map_request(self, Queue queue, pu_mapped *mapped, uint16_t tag) except -1:
        cdef pu_desc *desc = &queue.q.desc[tag]
        cdef uint64_t length = <uint64_t>desc.nr_sectors << PU_SECTOR_SHIFT
        cdef int error, count
        cdef pu_extent whole
        try:
            answer = self.map(OPS[desc.op_flags & 31], pu_desc_offset(desc), length)
            if type(answer) is int:  # the commonest answer: a place in the only file
                whole.file = 0
                whole.offset = answer
                whole.length = length
                error = pu_mapped_plan(mapped, tag, &whole, 1)
            else:
                count = self.fill(answer, length)
                error = pu_mapped_plan(mapped, tag, self.parts, <uint32_t>count)
            if error == -EINVAL:
                raise ValueError(
                    f"map({OPS[desc.op_flags & 31]!r}, {pu_desc_offset(desc)}, {length}) gave "
                    f"{answer!r}: its parts must be {length} bytes together, each in a file that "
                    "the target named"
                )
            if error == -EROFS:
                raise ValueError(
                    f"map({OPS[desc.op_flags & 31]!r}, {pu_desc_offset(desc)}, {length}) gave "
                    f"{answer!r}: one of these files was opened for reading"
                )
        except BaseException as raised:
            error = <int>self.reporter.result_of(raised, queue.take(tag))
        if error < 0:
            pu_queue_answer(&queue.q, tag, error)
        return 0


cdef class MappedQueue(Queue):
    """A queue served from a layout's files, by its own ring."""

    cdef pu_mapped mapped
    cdef Layout layout
    cdef bint opened
    cdef bint uses_files

    def __init__(self, fd, uint16_t queue_id=0, *, Layout layout not None, **options):
        cdef int error
        cdef uint32_t count = layout.layout.nr_files
        cdef uint32_t version = pu_layout_version(&layout.layout)
        depth = options.get("depth", DEFAULT_DEPTH)
        super().__init__(
            fd,
            queue_id,
            extra_entries=pu_mapped_entries(layout.policy, <uint16_t>depth),
            files=[layout.layout.files[i].fd for i in range(count)],
            **options,
        )
        self.layout = layout
        error = pu_mapped_open(&self.mapped, &self.q, &layout.layout, layout.policy, version)
        if error < 0:
            self.close()
            raise errors.queue_error(-error, queue_id)
        self.opened = self.uses_files = True
        layout.queues += 1

    @classmethod
    def loopback(cls, *, layout, depth=DEFAULT_DEPTH, buffer_size=DEFAULT_MAX_IO_SIZE, gate=None):
        return cls(-1, layout=layout, depth=depth, buffer_size=buffer_size, gate=gate)

    def __dealloc__(self):
        if self.opened:
            pu_mapped_close(&self.mapped)

    cdef int let_go_of_files(self) except -1:
        if self.uses_files:
            self.uses_files = False
            self.layout.queues -= 1
        return 0

    def serve_mapped(self, Mapper mapper=None, leg_failed=None):
        self.alive()
        if mapper is None:
            pu_watch_end(&self.watch)
        while self.mapped_round(mapper, leg_failed, -1, not self.q.loopback):
            if self.q.loopback and pu_queue_held(&self.q) == pu_gate_kept(&self.q):
                return

    def step(self, Mapper mapper=None, leg_failed=None, *, timeout=None):
        cdef int64_t limit = nanoseconds(timeout)
        self.alive()
        for _ in range(PU_TURN_ROUNDS):
            if not self.mapped_round(mapper, leg_failed, limit, False):
                return False
            if not pu_queue_pending(&self.q):
                return True
            limit = 0
        # Whoever waits for `fileno` now must not wait for what has not been handed over.
        with nogil:
            pu_queue_submit(&self.q)
        return True

    cdef bint mapped_round(
        self, Mapper mapper, leg_failed, int64_t timeout_ns, bint until_there
    ) except -1:
        """A wait, or as many as it takes, and what Python does after it. False: the device has been
        stopped."""
        cdef int there
        with nogil:
            there = pu_mapped_turn(&self.mapped, timeout_ns)
            while until_there and there == 0 and not self.mapped.to_tell:
                there = pu_mapped_turn(&self.mapped, timeout_ns)
        if not self.goes_on(there):
            return False
        if there and mapper is None:
            raise ValueError("the layout is asked for each request: pass a Mapper")
        for i in range(there):
            mapper.map_request(self, &self.mapped, self.q.ready[i])
        if self.mapped.to_tell:
            self.layout.tell(self, &self.mapped, leg_failed)
        return True

    def resolve(self, uint16_t tag, uint32_t generation, int error):
        """How a request ends that was deferred (0, or an errno); from any thread."""
        if tag >= self.q.depth:
            raise ValueError(f"there is no tag {tag}")
        if self.is_open:
            pu_deferred_resolve(&self.mapped, tag, generation, -error)
            pu_queue_wake(&self.q)

    cdef str obstacle(self):
        return "its files' I/O did not end"
