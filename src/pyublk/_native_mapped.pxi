# Layouts, and queues served from them.

cdef enum:
    LEGS = 16  # PU_MAX_LEGS


cdef class Layout:
    """Where a disk's bytes live; shared by its queues."""

    cdef pu_layout layout
    cdef bint made
    cdef int process
    cdef int queues     # that may come to use its files
    cdef int *numbers   # of files that were given up, to be closed when no queue is left
    cdef int nr_numbers

    def __init__(self):
        raise TypeError("use Layout.table, stripe, mirror or per_request")

    @staticmethod
    cdef Layout make(pu_layout_kind kind, uint64_t size, list files, uint32_t extents):
        made = <Layout>Layout.__new__(Layout)
        cdef int error = pu_layout_init(&made.layout, kind, size, <uint32_t>len(files), extents)
        if error < 0:
            raise MemoryError("a layout of this size does not fit into memory")
        made.made = True
        made.process = pu_process()
        for index, (fd, memory, device) in enumerate(files):
            made.set_file(<uint32_t>index, fd, memory, device)
        return made

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

    cdef int set_file(self, uint32_t index, int fd, bint memory, bint device) except -1:
        self.layout.files[index].fd = fd
        self.layout.files[index].memory = memory
        self.layout.files[index].device = device
        return 0

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
    def mirror(cls, files, uint64_t size, *, leg_timeout=None):
        if not 1 <= len(files) <= LEGS:
            raise ValueError(f"a mirror has 1 to {LEGS} legs, not {len(files)}")
        made = Layout.make(PU_LAYOUT_MIRROR, size, list(files), 0)
        made.layout.leg_timeout_ns = 0 if leg_timeout is None else nanoseconds(leg_timeout)
        return made

    @classmethod
    def per_request(cls, files, uint64_t size):
        return Layout.make(PU_LAYOUT_PER_REQUEST, size, list(files), 0)

    @property
    def size(self):
        return self.layout.size

    @property
    def in_memory(self):
        return all([self.layout.files[i].memory for i in range(self.layout.nr_files)])

    def leg_state(self, uint32_t leg):
        self.check_leg(leg)
        return pu_layout_leg(&self.layout, leg)

    def set_leg_state(self, uint32_t leg, int state):
        self.check_leg(leg)
        pu_layout_set_leg(&self.layout, leg, <pu_leg_state>state)

    def fail_leg(self, uint32_t leg, file_generation=None):
        """Leaves a leg alone from now on, and holds writes until `recorded`. False, and nothing is
        done, for one that has failed, whose `file_generation` is another now, or that is the last
        in step, which is never given up."""
        self.check_leg(leg)
        if file_generation is None:
            file_generation = pu_layout_incarnation(&self.layout, leg)
        return pu_layout_fail_leg(&self.layout, leg, file_generation)

    @property
    def recorded(self):
        """Whether all legs that have failed are on record; no write is done while not."""
        return not pu_layout_leg_bits(&self.layout).unrecorded

    def set_recorded(self):
        pu_layout_recorded(&self.layout)

    def leg_errors(self, uint32_t leg):
        self.check_leg(leg)
        return self.layout.legs[leg].errors

    def leg_orphans(self, uint32_t leg):
        """Operations that a leg's file, and the one before, still hold, though nobody waits for
        them any more."""
        self.check_leg(leg)
        return (pu_layout_orphans(&self.layout, leg, False),
                pu_layout_orphans(&self.layout, leg, True))

    cdef int check_leg(self, uint32_t leg) except -1:
        if leg >= self.layout.nr_files:
            raise ValueError(f"there is no leg {leg}")
        return 0

    def replace_file(self, uint32_t index, int fd, bint memory, bint device, file_generation=None):
        """The queues take it up with their next request."""
        self.check_leg(index)
        if file_generation is None:
            file_generation = pu_layout_incarnation(&self.layout, index)
        pu_layout_replace_file(&self.layout, index, fd, memory, device, file_generation)

    @property
    def region_bytes(self):
        return self.layout.region_bytes

    def block_writes(self, region=None):
        """No write of a mirror begins in this region (None: any may); `wake` the queues then."""
        cdef uint64_t number = PU_NO_REGION if region is None else self.checked_region(region)
        pu_layout_block_writes(&self.layout, number)

    def is_drained(self, region):
        """Whether no write to the region is under way."""
        return pu_layout_is_drained(&self.layout, self.checked_region(region))

    cdef uint64_t checked_region(self, object region) except? 0:
        if not 0 <= region < (self.layout.size + self.layout.region_bytes - 1) // (
            self.layout.region_bytes
        ):
            raise ValueError(f"there is no region {region}")
        return region


cdef int check_extent(Layout layout, object file, object length) except -1:
    if not 0 <= file < layout.layout.nr_files:
        raise ValueError(f"an extent names file {file}; there are {layout.layout.nr_files}")
    if length <= 0:
        raise ValueError(f"an extent must have a positive length, not {length}")
    return 0


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
        depth = options.get("depth", 128)
        super().__init__(
            fd,
            queue_id,
            extra_entries=pu_mapped_entries(&layout.layout, <uint16_t>depth),
            files=[layout.layout.files[i].fd for i in range(count)],
            **options,
        )
        self.layout = layout
        error = pu_mapped_open(&self.mapped, &self.q, &layout.layout, version)
        if error < 0:
            self.close()
            raise errors.queue_error(-error, queue_id)
        self.opened = self.uses_files = True
        layout.queues += 1

    @classmethod
    def loopback(cls, *, layout, depth=128, buffer_size=512 * 1024):
        return cls(-1, layout=layout, depth=depth, buffer_size=buffer_size)

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
        while self.mapped_round(mapper, leg_failed, -1):
            if self.q.loopback and not pu_queue_held(&self.q):
                return

    def turn_mapped(self, Mapper mapper=None, leg_failed=None):
        self.alive()
        if mapper is None:
            pu_watch_end(&self.watch)
        for _ in range(PU_TURN_ROUNDS):
            if not self.mapped_round(mapper, leg_failed, 0):
                return False
            if not pu_queue_pending(&self.q):
                break
        return True

    cdef bint mapped_round(self, Mapper mapper, leg_failed, int64_t timeout_ns) except -1:
        cdef int there
        cdef pu_leg_failure failure
        cdef bint again = timeout_ns < 0 and not self.q.loopback
        with nogil:
            there = pu_mapped_turn(&self.mapped, timeout_ns)
            while again and there == 0 and self.mapped.failed_legs == 0:
                there = pu_mapped_turn(&self.mapped, timeout_ns)
        if not self.goes_on(there):
            return False
        for i in range(there):
            mapper.map_request(self, &self.mapped, self.q.ready[i])
        while pu_mapped_next_failure(&self.mapped, &failure):
            leg_failed(failure.leg, failure.error, failure.file_generation)
        pu_mapped_recorded(&self.mapped)
        return True

    cdef str obstacle(self):
        return "its files' I/O did not end"
