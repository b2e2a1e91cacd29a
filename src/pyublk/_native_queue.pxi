# Queue and IO: requests as Python sees them.

cdef tuple OPS = tuple(
    uapi.Op(number) if number in uapi.Op._value2member_map_ else number for number in range(32)
)

cdef enum:
    LATER = 1  # a handler's outcome: answered by itself, or to be answered later

#: Nanoseconds after which answers go out, whatever else the batch has: clients of a slow handler
#: must not wait for each other's requests.
cdef int64_t ANSWERS_DUE = 5_000_000
#: Requests between two looks at the time, at most: a look is half a hundredth of a request.
cdef uint32_t LOOK_EVERY = 8


cdef inline bint takes_data(uint32_t op) noexcept nogil:
    """Whether a request brings data: not for the server to fill."""
    return op == <uint32_t>PU_OP_WRITE or op == <uint32_t>PU_OP_ZONE_APPEND


@cython.final
cdef class Reporter:
    """Who is told what a handler raised or returned, and says which errno that is.

    When telling fails too, the request fails with EIO, and Python's hook for what cannot be raised
    anywhere is told of the first time: nothing between a handler and its answer may end a queue.
    """

    cdef object report
    cdef bint has_failed

    def __init__(self, report):
        self.report = report

    cdef int64_t result_of(self, object outcome, IO io) noexcept:
        """-errno. `outcome` None: nobody can answer any more."""
        cdef int64_t error = 0
        try:
            error = self.report(outcome, io)
        except BaseException as raised:
            if not self.has_failed:
                self.has_failed = True
                PyErr_SetObject(type(raised), raised)
                PyErr_WriteUnraisable(self.report)
        return -error if 0 < error < 4096 else -EIO


def report_dropped(outcome, io):
    """For requests that never came to a handler: `Queue.wait` gave them, and they were dropped."""
    logging.getLogger("pyublk.queue").error(
        "queue %d: a request was dropped unanswered; the client gets EIO", io.queue_id
    )
    return EIO


cdef Reporter NO_HANDLER = Reporter(report_dropped)


@cython.final
cdef class IO:
    """One request. Made once per tag and used again, unless somebody kept it: then that one is
    stale for ever (its generation has passed) and the tag gets a new one.

    One that its queue let go of is answered with EIO when the last who had it drops it."""

    cdef Queue queue
    cdef pu_desc *desc
    cdef object view         # for the operation that last used it
    cdef Span span           # what it shows
    cdef bint single_use     # for this request: of a client's memory, or beside a released view
    cdef bint answer_in_buffer  # user copy: a read's data is in the buffer, to be given at the end
    cdef uint32_t generation
    cdef readonly uint16_t tag
    cdef readonly bint deferred
    cdef Reporter reporter   # since the queue let go of it

    def __init__(self):
        raise TypeError("IO objects come from a Queue")

    def __del__(self):
        # On any thread, in the middle of anything: the queue's own answers, and tells.
        cdef Queue queue = self.queue
        if queue is not None and pu_queue_holds(&queue.q, self.tag, self.generation):
            queue.forgotten.append(self)
            if queue.is_open:
                pu_queue_wake(&queue.q)

    cdef inline int current(self) except -1:
        if pu_queue_holds(&self.queue.q, self.tag, self.generation):
            return 0
        return self.raise_stale()

    cdef int raise_stale(self) except -1:
        raise errors.StaleIO(
            f"this IO (tag {self.tag}) was completed already: read what you need of it before you "
            "complete it, and complete it once"
        )

    @property
    def op(self):
        self.current()
        return OPS[self.desc.op_flags & 31]

    @property
    def flags(self):
        self.current()
        return self.desc.op_flags & 0xFFFFFF00u

    @property
    def fua(self):
        self.current()
        return self.desc.op_flags & PU_FLAG_FUA != 0

    @property
    def unmap(self):
        self.current()
        return self.desc.op_flags & PU_FLAG_NOUNMAP == 0

    @property
    def offset(self):
        self.current()
        return pu_desc_offset(self.desc)

    @property
    def length(self):
        self.current()
        return <uint64_t>self.desc.nr_sectors << 9

    @property
    def queue_id(self):
        return self.queue.q.id

    @property
    def zones(self):
        self.current()
        cdef bint report = self.desc.op_flags & 0xFF == <uint32_t>PU_OP_REPORT_ZONES
        return self.desc.nr_sectors if report else 0

    @property
    def metadata(self):
        self.current()
        return self.desc.op_flags & PU_FLAG_INTEGRITY != 0

    @property
    def buffer(self):
        self.current()
        return self.get_view()

    def read_into(self, memory, uint64_t at=0, *, bint metadata=False):
        self.copy(memory, at, True, metadata)

    def write_from(self, memory, uint64_t at=0, *, bint metadata=False):
        self.copy(memory, at, False, metadata)

    cdef int copy(self, object memory, uint64_t at, bint to_server, bint metadata) except -1:
        cdef Py_buffer view
        cdef int error
        cdef uint64_t length
        self.current()
        if to_server != takes_data(self.desc.op_flags & 0xFF):
            raise ValueError(
                f"{'read_into' if to_server else 'write_from'} does not fit {self.op!r}: a write's "
                "data is read into your memory, a read's is written from it"
            )
        if metadata and not self.desc.op_flags & PU_FLAG_INTEGRITY:
            raise ValueError("this request has no metadata")
        PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE if to_server else PyBUF_SIMPLE)
        try:
            length = <uint64_t>view.len
            if not metadata and (at > self.data_length() or length > self.data_length() - at):
                raise ValueError(
                    f"bytes {at} to {at + length} are not in this request of {self.data_length()}"
                )
            with nogil:
                error = pu_queue_copy(&self.queue.q, self.tag, self.generation, view.buf, at,
                                      length, PU_USER_COPY_INTEGRITY if metadata else 0)
        finally:
            PyBuffer_Release(&view)
        if error == -ESTALE:
            self.raise_stale()
        if error < 0:
            raise OSError(-error, f"copying a request's data: {os.strerror(-error)}")
        return 0

    cdef uint64_t data_length(self):
        cdef uint32_t op = self.desc.op_flags & 0xFF
        if op == <uint32_t>PU_OP_REPORT_ZONES:
            return <uint64_t>self.desc.nr_sectors * PU_ZONE_BYTES
        if op <= <uint32_t>PU_OP_WRITE or op == <uint32_t>PU_OP_ZONE_APPEND:
            return <uint64_t>self.desc.nr_sectors << PU_SECTOR_SHIFT
        return 0

    @property
    def completed(self):
        return not pu_queue_holds(&self.queue.q, self.tag, self.generation)

    @cython.critical_section
    cdef object get_view(self):
        cdef uint32_t op = self.desc.op_flags & 0xFF
        cdef bint writable = not takes_data(op)
        cdef uint64_t length = self.data_length()
        if self.desc.op_flags & PU_FLAG_SHMEM_ZC:
            return self.get_shared_view(length, writable)
        if not self.queue.q.copies:
            self.bring_data(writable)
        cdef char *data = <char *>pu_queue_buffer(&self.queue.q, self.tag)
        cdef Span span = self.span
        if span is None or span.data != data or span.length != <Py_ssize_t>length or (
            span.writable != writable
        ):
            self.span = span = Span.make(self.queue.buffers, data, length, writable)
            self.view = memoryview(span)
        elif self.view is None or PU_RELEASED(<PyObject *>self.view):
            self.single_use = span.exports > 0
            self.view = memoryview(span)
        return self.view

    cdef object get_shared_view(self, uint64_t length, bint writable):
        """Straight into the memory that the client shares: nothing comes or goes."""
        cdef void *bytes_of
        if self.single_use:
            return self.view
        with nogil:
            bytes_of = pu_queue_shared(&self.queue.q, self.tag)
        if bytes_of == NULL:
            raise OSError(EIO, "the request lies in shared memory that is not known here")
        index = self.desc.addr >> uapi.SHMEM_INDEX_OFFSET & 0xFFFF
        memory = self.queue.table.memories.get(index)
        self.span = None
        self.view = memoryview(Span.make(memory, bytes_of, length, writable))
        self.single_use = True
        return self.view

    cdef int bring_data(self, bint writable) except -1:
        """User copy: a write's data comes on the first look, a read's goes at the end."""
        cdef int error
        if not self.queue.q.user_copy:
            raise OSError(EOPNOTSUPP, "there is no buffer to look at: the kernel moves the data")
        if writable:
            self.answer_in_buffer = True
            return 0
        with nogil:
            error = pu_queue_fill_buffer(&self.queue.q, self.tag, self.generation)
        if error == -ESTALE:
            self.raise_stale()
        if error < 0:
            raise OSError(-error, f"copying a write's data: {os.strerror(-error)}")
        return 0

    cdef inline bint is_seen(self) except -1:
        """Whether somebody may still see the request's memory, now that it is to be answered."""
        with cython.critical_section(self):
            if self.view is None:
                return False
            if PU_UNSEEN(<PyObject *>self.view) and not self.single_use:
                return False
            return self.take_view_away()

    cdef bint take_view_away(self) except -1:
        """Whoever keeps the view, or what was made of it, has memory that stays as it was. What a
        client does with memory that it shares goes on: a view of that is released."""
        view, self.view = self.view, None
        self.single_use = False
        if self.span is not None:
            view = None
            return self.span.exports > 0
        try:
            view.release()
        except BufferError:
            pass  # an array on top of it
        return False

    def complete(self, *, zone_sector=None):
        if zone_sector is not None:
            self.current()
            self.queue.q.tags[self.tag].zone_lba = zone_sector
        self.finish(0)

    def fail(self, int error):
        if not 0 < error < 4096:
            raise ValueError(f"error must be an errno value such as errno.EIO, not {error}")
        self.finish(-error)

    def defer(self):
        self.current()
        self.deferred = True

    cdef inline bint answered_otherwise(self, int64_t result, Reporter reporter) except -1:
        """Whether what a handler ended with is not the answer: that was given, or it will be by
        whoever has the IO. A handler that fails after `defer` has nobody answer for it."""
        if not pu_queue_holds(&self.queue.q, self.tag, self.generation):
            return True
        if not self.deferred or result < 0:
            return False
        self.queue.let_go(self, reporter)
        return True

    cdef int finish(self, int64_t result) except -1:
        self.current()
        if self.queue.answer(self, result) < 0:
            self.current()
        return 0

    cdef int64_t give_answer(self, int64_t result) noexcept:
        """User copy: a successful read's data leaves the buffer. The result to answer with."""
        cdef int error
        if not self.answer_in_buffer:
            return result
        self.answer_in_buffer = False
        if result < 0:
            return result
        cdef uint64_t length = self.data_length()
        with nogil:
            error = pu_queue_copy(
                &self.queue.q, self.tag, self.generation,
                pu_queue_buffer(&self.queue.q, self.tag), 0, length, 0,
            )
        return error

    def __repr__(self):
        if self.completed:
            return f"<IO tag {self.tag} (completed)>"
        op = self.op
        name = getattr(op, "name", op)
        return f"<IO tag {self.tag} {name} offset {self.offset} length {self.length}>"


@cython.final
cdef class Handlers:
    """A target's methods, bound once, and who is told when one raises."""

    cdef object handle, read, write, flush, discard, write_zeroes, write_fua
    cdef Reporter reporter

    def __init__(self, target, report):
        self.handle = getattr(target, "handle", None)
        self.read = getattr(target, "read", None)
        self.write = getattr(target, "write", None)
        self.flush = getattr(target, "flush", None)
        self.discard = getattr(target, "discard", None)
        self.write_zeroes = getattr(target, "write_zeroes", None)
        self.write_fua = getattr(target, "write_fua", None)
        self.reporter = Reporter(report)

    cdef object call(self, IO io):
        cdef pu_desc *desc = io.desc
        cdef uint32_t op = desc.op_flags & 0xFF
        if self.handle is not None:
            return self.handle(io)
        if op == <uint32_t>PU_OP_READ:
            return self.read(<uint64_t>desc.start_sector << 9, io.get_view())
        if op == <uint32_t>PU_OP_WRITE:
            write = self.write
            if desc.op_flags & PU_FLAG_FUA and self.write_fua is not None:
                write = self.write_fua
            if write is not None:
                return write(<uint64_t>desc.start_sector << 9, io.get_view())
        elif op == <uint32_t>PU_OP_FLUSH:
            if self.flush is not None:
                return self.flush()
        elif op == <uint32_t>PU_OP_DISCARD:
            if self.discard is not None:
                return self.discard(
                    <uint64_t>desc.start_sector << 9, <uint64_t>desc.nr_sectors << 9
                )
        elif op == <uint32_t>PU_OP_WRITE_ZEROES:
            if self.write_zeroes is not None:
                return self.write_zeroes(
                    <uint64_t>desc.start_sector << 9,
                    <uint64_t>desc.nr_sectors << 9,
                    not desc.op_flags & PU_FLAG_NOUNMAP,
                )
        raise OSError(EOPNOTSUPP, f"the target has no method for {OPS[op & 31]!r}")

    cdef int64_t answer(self, IO io) except? LATER:
        """0, -errno, or LATER."""
        cdef int64_t result = 0
        try:
            outcome = self.call(io)
            if outcome is not None:
                result = self.reporter.result_of(outcome, io)
        except BaseException as raised:
            if io.queue.process != pu_process():  # the handler forked: the request is the parent's
                raise
            result = self.reporter.result_of(raised, io)
        if self.handle is not None and io.answered_otherwise(result, self.reporter):
            return LATER
        return result

    def answer_from_here(self, IO io):
        """Runs the handler on the calling thread; the queue's own thread commits."""
        cdef int64_t result = self.answer(io)
        if result != LATER:
            io.queue.answer(io, result)


def become_io_flusher():
    pu_io_flusher()


cdef class SharedTable:
    """The memory that a device shares with its clients, by the kernel's index.

    `changing` is to be set around REG_BUF and UNREG_BUF; one change at a time.
    """

    cdef pu_shared *table
    cdef dict memories

    def __cinit__(self):
        self.table = <pu_shared *>calloc(1, sizeof(pu_shared))
        if self.table == NULL:
            raise MemoryError("cannot allocate the table of shared memory")
        self.memories = {}

    def __dealloc__(self):
        free(self.table)

    def changing(self, bint now):
        pu_shared_change(self.table, now)

    def put(self, uint16_t index, memory):
        """`memory` is kept as long as it is in the table or in use by a request."""
        cdef const unsigned char[::1] bytes_of = memory
        self.memories[index] = memoryview(memory)  # which keeps a mapping from being closed
        pu_shared_put(self.table, index, <uint8_t *>&bytes_of[0], len(bytes_of))

    def drop(self, uint16_t index):
        pu_shared_put(self.table, index, NULL, 0)
        self.memories.pop(index, None)

    def clear(self):
        for index in list(self.memories):
            self.drop(index)


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
    cdef uint64_t owner
    cdef int process
    cdef uint32_t look_every  # requests between two looks at the time; fewer when they are slow
    cdef Buffers buffers
    cdef CharDevice device
    cdef SharedTable table
    cdef object __weakref__

    def __init__(self, fd, uint16_t queue_id=0, *, unsigned int depth=128,
                 size_t buffer_size=512 * 1024, uint64_t flags=0, unsigned int first_tag=0,
                 unsigned int tag_step=1, Buffers buffers=None, uint32_t extra_entries=0,
                 files=(), trim_after=None, uint32_t faults=0, SharedTable table=None):
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
    def loopback(cls, *, depth=128, buffer_size=512 * 1024, extra_entries=0, table=None):
        return cls(-1, depth=depth, buffer_size=buffer_size, extra_entries=extra_entries,
                   table=table)

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
        if there >= 0:
            if there == 0:
                PyErr_CheckSignals()
            return there
        if there == -ENODEV:
            return -1
        if there == -ESHUTDOWN:
            self.alive()
            raise errors.DeviceLost(f"queue {self.q.id} was cut off while a handler did not return")
        raise errors.queue_error(-there, self.q.id)

    cdef IO take(self, uint16_t tag):
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

    cdef int answer_here(self, IO io, int64_t result) except -1:
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
        if error == -ESHUTDOWN:
            self.alive()
            raise errors.DeviceLost(f"queue {self.q.id} was cut off while a handler did not return")
        if error < 0:
            raise errors.queue_error(-error, self.q.id)

    def serve(self, Handlers handlers not None, lock=None):
        self.alive()
        while self.wait_batch(-1) >= 0:
            if self.q.nr_ready:
                if lock is None:
                    self.answer_batch(handlers)
                else:
                    with lock:
                        self.answer_batch(handlers)
            if self.q.loopback:
                return

    cdef int answer_batch(self, Handlers handlers) except -1:
        cdef int64_t result
        cdef int error
        cdef uint16_t tag
        cdef IO io
        cdef int64_t began = pu_queue_tick()
        cdef uint32_t look = self.look_every
        for i in range(self.q.nr_ready):
            tag = self.q.ready[i]
            if pu_tag_state(&self.q.tags[tag]) != PU_TAG_OWNED:  # failed from outside meanwhile
                continue
            io = self.take(tag)
            result = handlers.answer(io)
            if result == LATER:
                continue
            if io.view is None and not io.answer_in_buffer:  # the call is what others cost more
                error = pu_queue_answer(&self.q, tag, result)
                if error < 0:
                    self.refused(error)
            else:
                self.answer_here(io, result)
            if i + 1 < look:
                continue
            if pu_queue_tick() - began > ANSWERS_DUE:
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
        cdef int error = pu_queue_inject(
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
        return self.q.tags[tag].result if answered else None

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
