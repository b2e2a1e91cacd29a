# Queues, and the loop that calls a target's methods.

#: Nanoseconds after which answers go out, whatever else the batch has: clients of a slow handler
#: must not wait for each other's requests.
cdef int64_t ANSWERS_DUE = 5_000_000
#: Requests between two looks at the time, at most: a look is half a hundredth of a request.
cdef uint32_t LOOK_EVERY = 8


cdef void take_gil() noexcept with gil:
    """Called by a thread of the core's own, to see whether it can be had."""


atexit.register(pu_watch_stop)


cdef class Queue:
    """One queue of an open char device; the thread that makes it serves it."""

    cdef pu_queue q
    cdef pu_watch watch
    cdef list ios        # of each tag; None: not used yet, or somebody else has it
    cdef list forgotten  # unanswered, and nobody has them any more
    cdef bint is_open
    cdef bint fetched
    cdef bint turn_wanted  # by an answer on an event loop, which has been told
    cdef uint64_t owner
    cdef int process
    cdef uint32_t look_every  # requests between two looks at the time; fewer when they are slow
    cdef Buffers buffers
    cdef CharDevice device
    cdef SharedTable table
    cdef TraceBuffer trace_buffer
    cdef Gate gate
    cdef object __weakref__

    def __init__(self, fd, uint16_t queue_id=0, *, unsigned int depth=DEFAULT_DEPTH,
                 size_t buffer_size=DEFAULT_MAX_IO_SIZE, uint64_t flags=0, unsigned int first_tag=0,
                 unsigned int tag_step=1, Buffers buffers=None, uint32_t extra_entries=0,
                 files=(), trim_after=None, uint32_t faults=0, SharedTable table=None,
                 Gate gate=None):
        if self.ios is not None:
            raise RuntimeError("this queue is open already")
        if not 1 <= depth <= uapi.MAX_QUEUE_DEPTH:
            raise ValueError(f"depth must be 1 to {uapi.MAX_QUEUE_DEPTH}, not {depth}")
        if buffer_size < 512:
            raise ValueError(f"buffer_size must be at least 512 bytes, not {buffer_size}")
        if first_tag >= depth or not 1 <= tag_step <= depth:
            raise ValueError(f"first_tag and tag_step must be below the depth, {depth}")
        cdef int error
        cdef pu_queue_options options
        memset(&options, 0, sizeof(options))
        options.id = queue_id
        options.depth = <uint16_t>depth
        options.first_tag = <uint16_t>first_tag
        options.tag_step = <uint16_t>tag_step
        options.flags = flags
        options.buffer_bytes = buffer_size
        if buffers is None:
            self.buffers = Buffers(depth, buffer_size)
            if trim_after is not None:
                options.trim_after_ns = nanoseconds(trim_after)
        elif buffers.depth != depth or buffers.size != buffer_size:
            raise ValueError("the shared buffers are not of this queue's depth and size")
        else:  # and others use them while this queue has nothing to do
            self.buffers = buffers
        options.buffers = self.buffers.buffers
        options.extra_entries = extra_entries
        options.faults = faults
        if table is not None:
            options.client_memory = table.table
            self.table = table
        if gate is not None:
            options.rules = &gate.rules
            self.gate = gate
        numbers = array("i", files)
        cdef const int[::1] numbers_view = numbers if numbers else array("i", [-1])
        options.files = &numbers_view[0]
        options.nr_files = <uint32_t>len(numbers)
        cdef int number
        if isinstance(fd, CharDevice):
            self.device = fd
            number = self.device.fd
        else:  # a caller may close it at any time
            number = fd if fd < 0 else dup_private(fd)
            options.own_device = True
        with nogil:
            error = pu_queue_open(&self.q, number, &options)
        if error < 0:
            raise errors.queue_error(-error, queue_id)
        self.owner = pu_this_thread()
        self.process = pu_process()
        self.look_every = 1
        self.is_open = True
        self.forgotten = []
        self.ios = [None] * depth

    @classmethod
    def loopback(cls, *, depth=DEFAULT_DEPTH, buffer_size=DEFAULT_MAX_IO_SIZE, extra_entries=0,
                 table=None, gate=None):
        return cls(-1, depth=depth, buffer_size=buffer_size, extra_entries=extra_entries,
                   table=table, gate=gate)

    def __dealloc__(self):
        pu_watch_end(&self.watch)
        if self.q.tags != NULL:
            pu_queue_free(&self.q)

    # Before the collector lets go of anything that the kernel still reads or fills.
    def __del__(self):
        self.is_open = False
        self.end()

    cdef IO new_io(self, uint16_t tag):
        io = <IO>IO.__new__(IO)
        io.queue = self
        io.tag = tag
        io.desc = &self.q.desc[tag]
        return io

    cdef int alive(self) except -1:
        if not self.is_open:
            raise errors.DeviceClosed("the queue is closed")
        if self.process != pu_process():
            raise errors.forked_error(self.process)
        return 0

    @cython.critical_section
    def close(self):
        if not self.is_open:
            return
        self.is_open = False
        pu_watch_end(&self.watch)
        if pu_this_thread() == self.owner:
            self.end()
        else:  # its own may wait in the ring: the rest is for when nobody has the queue
            pu_queue_sever(&self.q)

    cdef int let_go_of_files(self) except -1:
        """Of a target, which no call of this queue uses any more."""
        return 0

    cdef int end(self) except -1:
        cdef bint over
        if self.q.tags == NULL:
            return 0
        pu_watch_end(&self.watch)
        with nogil:
            over = pu_queue_close(&self.q)
        if not self.q.copying:
            self.device = None
        self.let_go_of_files()
        self.ios = []  # breaks the cycle; IOs that somebody kept stay readable as stale
        self.forgotten = []
        if not over:
            Py_INCREF(self)  # and with it all memory that the kernel still reads or fills, for ever
        return 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    @property
    def id(self):
        return self.q.id

    @property
    def depth(self):
        return self.q.depth

    @property
    def held(self):
        return pu_queue_held(&self.q)

    def fileno(self):
        self.alive()
        cdef int fd = pu_queue_event_fd(&self.q)
        if fd < 0:
            raise OSError(-fd, f"queue {self.q.id} cannot have an eventfd: {os.strerror(-fd)}")
        return fd

    @property
    def ending(self):
        return self.fetched and self.q.ending

    @property
    def ring_flags(self):
        return self.q.ring.setup_flags

    def fetch(self):
        self.alive()
        if self.fetched:
            raise ValueError(
                f"queue {self.q.id} is fetched already: its commits fetch the next requests"
            )
        self.fetched = True
        if not self.q.loopback:
            pu_watch_begin(&self.watch, &self.q, take_gil)
        cdef int error
        with nogil:
            error = pu_queue_fetch(&self.q)
        if error < 0:
            raise errors.queue_error(-error, self.q.id)

    cdef int wait_batch(self, int64_t timeout_ns) except -2:
        """How many requests came; -1: the kernel has taken every tag back."""
        cdef int there
        if self.forgotten:
            self.answer_forgotten()
            timeout_ns = 0  # these answers go out now
        with nogil:
            there = pu_queue_wait(&self.q, timeout_ns)
        if there == 0:
            PyErr_CheckSignals()
        elif there < 0:
            self.goes_on(there)
            return -1
        return there

    cdef inline IO take(self, uint16_t tag):
        io = <IO>self.ios[tag]
        if io is None or PU_REFERENCES(<PyObject *>io) != 2:  # kept: not just the list and `io`
            io = self.new_io(tag)
            self.ios[tag] = io
        if io.single_use:
            io.take_view_away()
        io.generation = pu_tag_generation(&self.q.tags[tag])
        io.deferred = False
        io.answer_in_buffer = False
        return io

    cdef int let_go(self, IO io, Reporter reporter) except -1:
        """The IO is only somebody else's from now on, so that it shows when that one drops it."""
        io.reporter = reporter
        ios = self.ios
        if io.tag < len(ios):
            ios[io.tag] = None
        return 0

    cdef int take_back(self, IO io) except -1:
        """It is answered, and may be used again."""
        ios = self.ios
        if io.tag < len(ios) and ios[io.tag] is None:
            ios[io.tag] = io
        return 0

    cdef int answer_forgotten(self) except -1:
        cdef IO io
        while self.forgotten:
            io = self.forgotten.pop()
            if io.completed:  # failed from outside meanwhile
                continue
            self.answer_here(io, io.reporter.result_of(None, io))
        return 0

    def wait(self, timeout=None):
        self.alive()
        cdef list found = []
        if self.wait_batch(nanoseconds(timeout)) < 0:
            return None
        for i in range(self.q.nr_ready):
            io = self.take(self.q.ready[i])
            self.let_go(io, NO_HANDLER)
            found.append(io)
        return found

    def __iter__(self):
        while (batch := self.wait()) is not None:
            batch.reverse()
            while batch:  # what was yielded is only the caller's
                yield batch.pop()

    cdef int answer(self, IO io, int64_t result) except? -1:
        """0, or -EALREADY: it was failed from outside meanwhile."""
        cdef bint here = pu_this_thread() == self.owner
        cdef int error
        result = io.give_answer(result)
        if io.is_seen():
            error = self.answer_kept(io, result, here)
        elif here:
            error = pu_queue_answer(&self.q, io.tag, result)
        else:
            error = pu_queue_post(&self.q, io.tag, io.generation, result)
        self.take_back(io)
        return error

    cdef inline int answer_here(self, IO io, int64_t result) except -1:
        """For the thread that serves."""
        cdef int error
        if io.answer_in_buffer:
            result = io.give_answer(result)
        if io.is_seen():
            error = self.answer_kept(io, result, True)
        else:
            error = pu_queue_answer(&self.q, io.tag, result)
        return 0 if error >= 0 else self.refused(error)

    cdef int refused(self, int error) except -1:
        if error == -EALREADY:  # failed from outside meanwhile
            return 0
        raise errors.queue_error(-error, self.q.id)

    cdef int answer_kept(self, IO io, int64_t result, bint here) except? -1:
        cdef uint8_t *kept
        cdef int error
        span, io.span = io.span, None
        error = pu_queue_answer_kept(&self.q, io.tag, io.generation, result, here, &kept)
        if kept != NULL:
            span.owner = KeptBuffer.make(self.buffers, kept)
        if error == -ENOMEM:
            raise MemoryError(
                f"queue {self.q.id} has no memory for its next requests: the target keeps the "
                "buffers of too many"
            )
        return error

    def serve_native(self, uintptr_t handler, uintptr_t context=0, *, bint blind=False):
        self.alive()
        pu_watch_end(&self.watch)
        cdef int error
        with nogil:
            error = pu_queue_serve(&self.q, <pu_handler>handler, <void *>context, blind)
        if error < 0:
            self.goes_on(error)

    def turn_native(self, uintptr_t handler, uintptr_t context=0, *, bint blind=False):
        self.alive()
        pu_watch_end(&self.watch)
        cdef int error
        with nogil:
            error = pu_queue_turn(&self.q, <pu_handler>handler, <void *>context, blind)
        return self.goes_on(error)

    cdef bint goes_on(self, int there) except -1:
        """After a wait: False when the kernel has taken every tag back."""
        if there >= 0:
            return True
        if there == -ENODEV:
            return False
        if there == -ESHUTDOWN:
            self.alive()
            raise errors.DeviceLost(f"queue {self.q.id} was cut off while {self.obstacle()}")
        raise errors.queue_error(-there, self.q.id)

    cdef str obstacle(self):
        return "a handler did not return"

    def serve(self, Handlers handlers not None, lock=None):
        self.alive()
        while self.serve_round(handlers, lock, -1):
            if self.q.loopback:
                return

    def turn(self, Handlers handlers not None, lock=None):
        self.alive()
        for _ in range(PU_TURN_ROUNDS):
            if not self.serve_round(handlers, lock, 0):
                return False
            if not pu_queue_pending(&self.q):
                break
        return True

    cdef bint serve_round(self, Handlers handlers, object lock, int64_t timeout_ns) except -1:
        if self.wait_batch(timeout_ns) < 0:
            return False
        if self.q.nr_ready:
            if lock is None:
                self.answer_batch(handlers)
            else:
                with lock:
                    self.answer_batch(handlers)
        return True

    cdef int answer_batch(self, Handlers handlers) except -1:
        cdef int64_t result
        cdef uint16_t tag
        cdef IO io
        cdef int64_t began = pu_tick_ns()
        cdef uint32_t look = self.look_every
        for i in range(self.q.nr_ready):
            tag = self.q.ready[i]
            if pu_tag_state(&self.q.tags[tag]) != PU_TAG_OWNED:  # failed from outside meanwhile
                continue
            io = self.take(tag)
            result = handlers.answer(io)
            if result == LATER:
                continue
            self.answer_here(io, result)
            if i + 1 < look:
                continue
            if pu_tick_ns() - began > ANSWERS_DUE:
                self.look_every = 1
                pu_queue_carry_over(&self.q, i + 1)
                return 0
            self.look_every = min(self.look_every * 2, LOOK_EVERY)
            look = i + 1 + self.look_every
        return 0

    def counters(self):
        cdef pu_counters now
        pu_queue_counters(&self.q, &now)
        return (
            tuple([now.requests[op] for op in range(32)]),
            tuple([now.bytes[op] for op in range(32)]),
            now.errors,
            now.enters,
            now.largest_batch,
            now.fallbacks,
        )

    def latency(self):
        cdef pu_histogram now
        memset(&now, 0, sizeof(now))
        pu_taps_read(&self.q, &now)
        return tuple([
            (
                now.total_ns[operation],
                tuple([
                    (pu_histogram_bound(bucket), now.counts[operation][bucket])
                    for bucket in range(PU_BUCKETS)
                    if now.counts[operation][bucket]
                ]),
            )
            for operation in (
                PU_READS, PU_WRITES, PU_FLUSHES, PU_DISCARDS, PU_WRITES_OF_ZEROES, PU_OTHERS
            )
        ])

    @cython.critical_section
    def trace(self, TraceBuffer buffer):
        cdef pu_trace *trace = NULL if buffer is None else &buffer.trace
        cdef bint left
        with nogil:
            left = pu_taps_trace(&self.q, trace)
        if not left and self.trace_buffer is not None:
            Py_INCREF(self.trace_buffer)  # the owner may still write to it
        self.trace_buffer = buffer

    @property
    def kept(self):
        return pu_gate_kept(&self.q)

    @property
    def is_due(self):
        return pu_gate_due(&self.q) == 0

    def wake(self):
        if self.is_open:
            pu_queue_wake(&self.q)

    def fail_held(self, int error=EIO):
        if self.is_open:
            pu_queue_fail_held(&self.q, error)

    def sever(self):
        cdef int error = self.cut_off()
        if error < 0:
            raise OSError(-error, os.strerror(-error))

    @cython.critical_section
    cdef int cut_off(self) noexcept:
        return pu_queue_sever(&self.q) if self.is_open else 0

    # Loopback only: the kernel's side of the conversation.

    def inject(self, uint16_t tag, uint32_t op_flags, uint64_t offset, uint64_t length,
               uint64_t address=0):
        self.alive()
        cdef int error = pu_loopback_inject(
            &self.q, tag, op_flags, offset >> 9, <uint32_t>(length >> 9)
        )
        if error < 0:
            raise ValueError(f"tag {tag} cannot take a request now")
        self.q.desc[tag].addr = address
        pu_queue_wake(&self.q)

    def answered(self, uint16_t tag):
        """None while the request is unanswered, then its result."""
        self.alive()
        answered = pu_tag_state(&self.q.tags[tag]) == PU_TAG_FETCHING
        return pu_loopback_result(&self.q, tag) if answered else None

    def zone_sector(self, uint16_t tag):
        """Where the last zone append of the tag was written, as it was answered."""
        self.alive()
        return self.q.tags[tag].zone_lba

    def memory(self, uint16_t tag, size_t length):
        """The tag's buffer as the kernel would see it."""
        self.alive()
        return memoryview(
            Span.make(self.buffers, pu_queue_next_buffer(&self.q, tag), length, True)
        )
