# Queue and IO: requests as Python sees them.

cdef tuple OPS = tuple(
    uapi.Op(number) if number in uapi.Op._value2member_map_ else number for number in range(32)
)

cdef enum:
    LATER = 1  # a handler's outcome: answered by itself, or to be answered later


cdef class IO:
    """One request. Made once per tag and used again, unless somebody kept it: then that one is
    stale for ever (its generation has passed) and the tag gets a new one."""

    cdef Queue queue
    cdef pu_desc *desc
    cdef object view         # for the operation that last used it; length bytes
    cdef uint64_t view_length
    cdef bint view_writable
    cdef uint32_t generation
    cdef readonly uint16_t tag
    cdef readonly bint deferred

    def __init__(self):
        raise TypeError("IO objects come from a Queue")

    cdef int current(self) except -1:
        if not pu_queue_holds(&self.queue.q, self.tag, self.generation):
            raise errors.StaleIO(
                f"this IO (tag {self.tag}) was completed already: read what you need of it before "
                "you complete it, and complete it once"
            )
        return 0

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
    def buffer(self):
        self.current()
        return self.get_view()

    @property
    def completed(self):
        return not pu_queue_holds(&self.queue.q, self.tag, self.generation)

    cdef object get_view(self):
        cdef uint32_t op = self.desc.op_flags & 0xFF
        cdef bint writable = op != <uint32_t>PU_OP_WRITE
        cdef uint64_t length = 0
        if op <= <uint32_t>PU_OP_WRITE:
            length = <uint64_t>self.desc.nr_sectors << 9
        if self.view is None or self.view_length != length or self.view_writable != writable:
            self.drop_view()
            span = Span.make(self.queue, pu_queue_buffer(&self.queue.q, self.tag), length, writable)
            self.view = memoryview(span)
            self.view_length = length
            self.view_writable = writable
        return self.view

    cdef int drop_view(self) except -1:
        """A view that the handler kept must not show the tag's next request."""
        if self.view is not None and PU_REFERENCES(<PyObject *>self.view) != 1:
            try:
                self.view.release()
            except BufferError:
                pass  # an array on top of it: it keeps the memory, whatever that will hold
            self.view = None
        return 0

    def complete(self):
        self.finish(0)

    def fail(self, int error):
        if not 0 < error < 4096:
            raise ValueError(f"error must be an errno value such as errno.EIO, not {error}")
        self.finish(-error)

    def defer(self):
        self.current()
        self.deferred = True

    cdef int finish(self, int64_t result) except -1:
        self.current()
        self.drop_view()
        if self.queue.finish(self.tag, result) < 0:
            self.current()
        return 0

    def __repr__(self):
        if self.completed:
            return f"<IO tag {self.tag} (completed)>"
        op = self.op
        name = getattr(op, "name", op)
        return f"<IO tag {self.tag} {name} offset {self.offset} length {self.length}>"


cdef class Handlers:
    """A target's methods, bound once, and who is told when one raises."""

    cdef object handle, read, write, flush, discard, write_zeroes, write_fua
    cdef object report

    def __init__(self, target, report):
        self.handle = getattr(target, "handle", None)
        self.read = getattr(target, "read", None)
        self.write = getattr(target, "write", None)
        self.flush = getattr(target, "flush", None)
        self.discard = getattr(target, "discard", None)
        self.write_zeroes = getattr(target, "write_zeroes", None)
        self.write_fua = getattr(target, "write_fua", None)
        self.report = report

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
                result = -<int64_t>self.report(outcome, io)
        except BaseException as raised:
            result = -<int64_t>self.report(raised, io)
        if self.handle is not None and (
            io.deferred or not pu_queue_holds(&io.queue.q, io.tag, io.generation)
        ):
            return LATER
        io.drop_view()
        return result

    def start(self, IO io):
        """Calls the method and returns what it gives: the coroutine of an async target."""
        return self.call(io)

    def answer_from_here(self, IO io):
        """Runs the handler on the calling thread; the queue's own thread commits."""
        cdef int64_t result = self.answer(io)
        if result != LATER:
            pu_queue_post(&io.queue.q, io.tag, result)


cdef class Queue:
    """One queue of an open char device; the thread that makes it serves it."""

    cdef pu_queue q
    cdef list ios
    cdef bint is_open
    cdef bint fetched
    cdef unsigned long owner
    cdef object __weakref__

    def __init__(self, int fd, uint16_t queue_id=0, *, unsigned int depth=128,
                 size_t buffer_size=512 * 1024):
        if self.ios is not None:
            raise RuntimeError("this queue is open already")
        if not 1 <= depth <= uapi.MAX_QUEUE_DEPTH:
            raise ValueError(f"depth must be 1 to {uapi.MAX_QUEUE_DEPTH}, not {depth}")
        if buffer_size < 512:
            raise ValueError(f"buffer_size must be at least 512 bytes, not {buffer_size}")
        cdef int error
        with nogil:
            error = pu_queue_open(&self.q, fd, queue_id, <uint16_t>depth, buffer_size)
        if error < 0:
            raise errors.queue_error(-error, queue_id)
        self.owner = PyThread_get_thread_ident()
        self.is_open = True
        self.ios = [self.new_io(tag) for tag in range(depth)]

    @classmethod
    def loopback(cls, *, depth=128, buffer_size=512 * 1024):
        return cls(-1, depth=depth, buffer_size=buffer_size)

    def __dealloc__(self):
        if self.ios is not None:
            if self.is_open:
                pu_queue_close(&self.q)
            pu_queue_free(&self.q)

    cdef IO new_io(self, uint16_t tag):
        io = <IO>IO.__new__(IO)
        io.queue = self
        io.tag = tag
        io.desc = &self.q.desc[tag]
        return io

    cdef int alive(self) except -1:
        if not self.is_open:
            raise errors.DeviceClosed("the queue is closed")
        return 0

    def close(self):
        if self.is_open:
            self.is_open = False
            pu_queue_close(&self.q)
            self.ios = []  # breaks the cycle; IOs that somebody kept stay readable as stale

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
        return self.q.owned

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
        cdef int error
        with nogil:
            error = pu_queue_fetch(&self.q)
        if error < 0:
            raise errors.queue_error(-error, self.q.id)

    cdef int wait_batch(self, int64_t timeout_ns) except -2:
        """How many requests came; -1: the kernel has taken every tag back."""
        cdef int there
        with nogil:
            there = pu_queue_wait(&self.q, timeout_ns)
        if there >= 0:
            if there == 0:
                PyErr_CheckSignals()
            return there
        if there == -ENODEV:
            return -1
        if there == -ESHUTDOWN:
            raise errors.DeviceLost(f"queue {self.q.id} was cut off while a handler did not return")
        raise errors.queue_error(-there, self.q.id)

    cdef IO take(self, uint16_t tag):
        io = <IO>self.ios[tag]
        if PU_REFERENCES(<PyObject *>io) != 2:  # somebody kept it: not just the list and `io`
            io = self.new_io(tag)
            self.ios[tag] = io
        io.generation = self.q.tags[tag].generation
        io.deferred = False
        return io

    def wait(self, timeout=None):
        self.alive()
        cdef list found = []
        if self.wait_batch(nanoseconds(timeout)) < 0:
            return None
        for i in range(self.q.nr_ready):
            found.append(self.take(self.q.ready[i]))
        return found

    def __iter__(self):
        while (batch := self.wait()) is not None:
            yield from batch

    cdef int finish(self, uint16_t tag, int64_t result) noexcept:
        if PyThread_get_thread_ident() == self.owner:
            return pu_queue_answer(&self.q, tag, result)
        return pu_queue_post(&self.q, tag, result)

    def serve_native(self, uintptr_t handler, uintptr_t context=0):
        self.alive()
        cdef int error
        with nogil:
            error = pu_queue_serve(&self.q, <pu_handler>handler, <void *>context)
        if error == -ESHUTDOWN:
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
        for i in range(self.q.nr_ready):
            tag = self.q.ready[i]
            result = handlers.answer(self.take(tag))
            if result == LATER:
                continue
            error = pu_queue_answer(&self.q, tag, result)
            if error < 0 and error != -EALREADY:  # else: failed from outside meanwhile
                raise errors.queue_error(-error, self.q.id)
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
        )

    def wake(self):
        if self.is_open:
            pu_queue_wake(&self.q)

    def fail_held(self, int error=EIO):
        if self.is_open:
            pu_queue_fail_held(&self.q, error)

    def sever(self):
        cdef int error
        if self.is_open:
            error = pu_queue_sever(&self.q)
            if error < 0:
                raise OSError(-error, os.strerror(-error))

    # Loopback only: the kernel's side of the conversation.

    def inject(self, uint16_t tag, uint32_t op_flags, uint64_t offset, uint64_t length):
        self.alive()
        cdef int error = pu_queue_inject(
            &self.q, tag, op_flags, offset >> 9, <uint32_t>(length >> 9)
        )
        if error < 0:
            raise ValueError(f"tag {tag} cannot take a request now")
        pu_queue_wake(&self.q)

    def answered(self, uint16_t tag):
        """None while the request is unanswered, then its result."""
        self.alive()
        return None if self.q.tags[tag].state != 1 else self.q.tags[tag].result

    def memory(self, uint16_t tag, size_t length):
        """The tag's buffer as the kernel would see it."""
        self.alive()
        return memoryview(Span.make(self, pu_queue_buffer(&self.q, tag), length, True))
