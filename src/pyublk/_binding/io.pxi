# Requests as Python sees them, and who is called for them.

cdef tuple OPS = tuple(
    uapi.Op(number) if number in uapi.Op._value2member_map_ else number for number in range(32)
)

cdef uint64_t NOT_SHOWN = UINT64_MAX  # the shape of no request

cdef enum:
    LATER = 1  # a handler's outcome: answered by itself, or to be answered later


cdef extern from *:
    """
    /* Lets an `except` have what an unchecked call has raised. */
    static inline int PU_RAISED(void)
    {
        return -1;
    }
    """
    int PU_RAISED() except -1


cdef extern from *:
    """
    /* A call of one or two arguments (else NULL). A method is called as the function that it is of,
     * a function by its own entry, and no reference is counted: the caller keeps them all. */
    static inline PyObject *PU_CALL(PyObject *called, PyObject *first, PyObject *second)
    {
        PyObject *arguments[] = { NULL, NULL, first, second };
        size_t count = second ? 2 : 1;
        PyObject *function;

        if (!PyMethod_Check(called))
            return PyObject_Vectorcall(called, arguments + 2,
                                       count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
        function = PyMethod_GET_FUNCTION(called);
        arguments[1] = PyMethod_GET_SELF(called);
        count++;
        if (!PyFunction_Check(function))
            return PyObject_Vectorcall(function, arguments + 1,
                                       count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
        return ((PyFunctionObject *)function)->vectorcall(
            function, arguments + 1, count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    }
    """
    object PU_CALL(PyObject *, PyObject *, PyObject *)


# A `try` costs some 40 instructions, whether or not anything is raised.
ctypedef PyObject *(*UncheckedCall)(Handlers, IO) noexcept  # NULL: it raised


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
    cdef uint64_t shown      # the shape of the request that it fits, or NOT_SHOWN
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

    cdef inline object get_view(self):
        with cython.critical_section(self):
            if self.view is not None and self.shown == self.shape() and (
                self.span.data == <char *>pu_queue_buffer(&self.queue.q, self.tag)
            ) and not PU_RELEASED(<PyObject *>self.view):
                return self.view
            return self.make_view()

    cdef inline uint64_t shape(self) noexcept:
        """What decides about a view of the request's memory, but for where that is."""
        cdef uint32_t kind = self.desc.op_flags & (0xFF | PU_FLAG_SHMEM_ZC)
        return kind | <uint64_t>self.desc.nr_sectors << 32

    cdef object make_view(self):
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
        self.shown = self.shape() if self.queue.q.copies else NOT_SHOWN
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
        self.shown = NOT_SHOWN
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
        cdef PyObject *method = <PyObject *>None
        if self.handle is not None:
            return PU_CALL(<PyObject *>self.handle, <PyObject *>io, NULL)
        if op == <uint32_t>PU_OP_READ:
            method = <PyObject *>self.read
        elif op == <uint32_t>PU_OP_WRITE:
            method = <PyObject *>self.write
            if desc.op_flags & PU_FLAG_FUA and self.write_fua is not None:
                method = <PyObject *>self.write_fua
        if method == <PyObject *>None:
            return self.call_without_data(desc, op)
        cdef object place = pu_desc_offset(desc)
        view = io.get_view()
        return PU_CALL(method, <PyObject *>place, <PyObject *>view)

    cdef object call_without_data(self, pu_desc *desc, uint32_t op):
        if op == <uint32_t>PU_OP_FLUSH:
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

    cdef inline int64_t answer(self, IO io) except? LATER:
        """0, -errno, or LATER."""
        cdef PyObject *outcome = (<UncheckedCall>Handlers.call)(self, io)
        cdef int64_t result = 0
        if outcome == NULL:
            result = self.failed(io)
        else:
            if outcome != <PyObject *>None:
                result = self.reporter.result_of(<object>outcome, io)
            Py_DECREF(<object>outcome)
        if self.handle is not None and io.answered_otherwise(result, self.reporter):
            return LATER
        return result

    cdef int64_t failed(self, IO io) except? LATER:
        try:
            return PU_RAISED()
        except BaseException as raised:
            if io.queue.process != pu_process():  # the handler forked: the request is the parent's
                raise
            return self.reporter.result_of(raised, io)

    def answer_from_here(self, IO io):
        """Runs the handler on the calling thread; the queue's own thread commits."""
        cdef int64_t result = self.answer(io)
        if result != LATER:
            io.queue.answer(io, result)
