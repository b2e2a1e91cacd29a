# Ring: an io_uring for Python, usable on its own.

@cython.final
cdef class Hold:
    """What the kernel reads or fills for an operation, until that is over."""

    cdef uint64_t user_data
    cdef object memory


cdef void let_go(void *ring, uint64_t token, int32_t result) noexcept with gil:
    (<Ring>ring).release(token)


cdef class Ring:
    cdef pu_ring ring
    # An operation that holds memory goes to the kernel under a token, which nobody else can have
    # chosen: no other completion is taken for its own.
    cdef dict held  # token -> Hold
    cdef dict tokens  # user_data -> token
    cdef uint64_t next_token
    cdef uint32_t in_flight  # of those
    cdef uint32_t busy  # calls under way that look at the ring
    cdef bint taking  # one of them is for_each

    def __cinit__(self):
        self.ring.fd = -1

    def __init__(self, unsigned int entries=64, *, unsigned int cq_entries=0,
                 unsigned int required=0, unsigned int wanted=0x13180):
        if not 1 <= entries <= 32768:
            raise ValueError(f"entries must be 1 to 32768, not {entries}")
        if self.ring.fd >= 0:
            raise RuntimeError("this ring is open already")
        cdef int error
        with nogil:
            error = pu_ring_open(&self.ring, entries, cq_entries, required, wanted)
        if error < 0:
            self.ring.fd = -1
            raise errors.io_uring_error(-error)
        self.held = {}
        self.tokens = {}
        self.next_token = int.from_bytes(os.urandom(8), "little")

    def __dealloc__(self):
        pu_ring_close(&self.ring)

    # Before the collector lets go of what is held.
    def __del__(self):
        self.end()

    @cython.critical_section
    def close(self):
        if self.busy:
            raise RuntimeError(
                "the ring is in use: close it when submit, completions or for_each has returned"
            )
        self.end()

    cdef object end(self):
        cdef pu_ring ring = self.ring
        cdef bint over
        if ring.fd < 0:
            return
        self.ring.fd = -1  # for everybody else it is closed
        with nogil:
            over = pu_ring_end(&ring, &self.in_flight, let_go, <void *>self)
            pu_ring_close(&ring)
        held, self.held, self.tokens = self.held, {}, {}
        if not over:
            Py_INCREF(held)  # the kernel still writes there: nobody else may, ever
            warnings.warn(
                f"the ring was closed with {len(held)} operation(s) that the kernel still carries "
                "out: their buffers are kept until the process ends",
                ResourceWarning,
                stacklevel=1,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    cdef int alive(self) except -1:
        if self.ring.fd < 0:
            raise ValueError("the ring is closed")
        if self.ring.process != pu_process():
            raise ValueError("the ring is of the process that made it: make another after a fork")
        return 0

    def fileno(self):
        self.alive()
        return self.ring.fd

    @property
    def flags(self):
        return self.ring.setup_flags

    @property
    def features(self):
        return self.ring.features

    @property
    def entries(self):
        return self.ring.sq_entries

    @property
    def cq_entries(self):
        return self.ring.cq_entries

    @property
    def enters(self):
        return self.ring.enters

    @property
    def overflows(self):
        self.alive()
        return self.ring.k_cq_overflow[0]

    @property
    def unsubmitted(self):
        self.alive()
        return pu_ring_unsubmitted(&self.ring)

    @property
    def ready(self):
        self.alive()
        return pu_ring_ready(&self.ring)

    cdef pu_sqe *sqe(self, uint8_t opcode, uint64_t user_data) except NULL:
        self.alive()
        if self.in_flight:
            self.check_number(user_data)
        sqe = pu_ring_get_sqe(&self.ring)
        if sqe is NULL:
            self.make_room()
            sqe = pu_ring_get_sqe(&self.ring)
        if sqe is NULL:
            raise BlockingIOError(
                _errno.EAGAIN,
                "the submission queue is full and the kernel takes nothing: take completions first",
            )
        sqe.opcode = opcode
        sqe.fd = -1
        sqe.user_data = user_data
        return sqe

    cdef pu_sqe *hold(self, uint8_t opcode, uint64_t user_data, object memory) except NULL:
        """An entry for an operation on `memory`."""
        cdef uint64_t token = self.next_token
        self.alive()
        self.check_number(user_data)
        hold = <Hold>Hold.__new__(Hold)
        hold.user_data = user_data
        hold.memory = memory
        self.next_token += 1
        self.held[token] = hold
        self.tokens[user_data] = token
        self.in_flight += 1
        try:
            return self.sqe(opcode, token)
        except BaseException:
            self.release(token)
            raise

    cdef int check_number(self, uint64_t user_data) except -1:
        if user_data in self.tokens:
            raise ValueError(f"user_data {user_data} is in flight: choose another number")
        return 0

    cdef uint64_t release(self, uint64_t token):
        """An operation is over: its user_data."""
        found = self.held.pop(token, None)
        if found is None:
            return token
        hold = <Hold>found
        del self.tokens[hold.user_data]
        self.in_flight -= 1
        return hold.user_data

    cdef int make_room(self) except -1:
        cdef int done
        self.busy += 1
        with nogil:
            done = pu_ring_submit(&self.ring, 0, 0, 0)
        self.busy -= 1
        if done == -EINTR:
            PyErr_CheckSignals()
        # Out of memory, or completions first: sqe() says it, in words that fit.
        elif done < 0 and done != -EAGAIN and done != -EBUSY:
            raise OSError(-done, f"io_uring_enter: {os.strerror(-done)}")
        return 0

    def prepare(self, uint8_t opcode, *, int fd=-1, uint64_t offset=0, uint64_t address=0,
                uint32_t length=0, uint32_t op_flags=0, uint64_t user_data=0, uint8_t sqe_flags=0,
                uint16_t ioprio=0, uint16_t buf_index=0, int file_index=0, bytes command=b""):
        cdef Py_ssize_t room = 80 if self.ring.setup_flags & PU_SETUP_SQE128 else 16
        if len(command) > room:
            raise ValueError(f"command has {len(command)} bytes, this ring's entries hold {room}")
        sqe = self.sqe(opcode, user_data)
        if opcode == PU_OPCODE_ASYNC_CANCEL or opcode == PU_OPCODE_TIMEOUT_REMOVE:
            address = self.tokens.get(address, address)  # it names an operation
        sqe.flags = sqe_flags
        sqe.ioprio = ioprio
        sqe.fd = fd
        sqe.off = offset
        sqe.addr = address
        sqe.len = length
        sqe.op_flags = op_flags
        sqe.buf_index = buf_index
        sqe.file_index = file_index
        memcpy(sqe.cmd, <const char *>command, len(command))

    def nop(self, uint64_t user_data=0):
        self.sqe(PU_OPCODE_NOP, user_data)

    def timeout(self, seconds, uint64_t user_data=0):
        cdef int64_t spec[2]
        cdef int64_t ns = nanoseconds(seconds)
        spec[0] = ns // 1000000000
        spec[1] = ns % 1000000000
        timespec = (<const char *>spec)[:16]
        sqe = self.hold(PU_OPCODE_TIMEOUT, user_data, timespec)
        sqe.addr = <uint64_t><uintptr_t><const char *>timespec
        sqe.len = 1

    cdef object transfer(self, uint8_t opcode, int fd, object buffer, bint writable,
                         uint64_t offset, uint64_t user_data):
        span = Span.borrow(buffer, writable)
        sqe = self.hold(opcode, user_data, span)
        sqe.fd = fd
        sqe.off = offset
        sqe.addr = <uint64_t><uintptr_t>(<Span>span).data
        sqe.len = <uint32_t>min((<Span>span).length, UINT32_MAX)

    def read(self, int fd, buffer, uint64_t offset, uint64_t user_data=0):
        self.transfer(PU_OPCODE_READ, fd, buffer, True, offset, user_data)

    def write(self, int fd, buffer, uint64_t offset, uint64_t user_data=0):
        self.transfer(PU_OPCODE_WRITE, fd, buffer, False, offset, user_data)

    def msg_ring(self, int fd, *, uint64_t target_user_data, int32_t result=0,
                 uint64_t user_data=0):
        sqe = self.sqe(PU_OPCODE_MSG_RING, user_data)
        sqe.fd = fd
        sqe.off = target_user_data
        sqe.len = <uint32_t>result

    def submit(self, unsigned int wait=0, timeout=None, min_wait=None):
        self.alive()
        cdef int64_t limit = nanoseconds(timeout)
        cdef uint32_t min_wait_us = 0
        if min_wait is not None:
            if not self.ring.features & PU_FEAT_MIN_TIMEOUT:
                raise errors.FeatureMissing("min_wait", "Linux 6.12", "an older kernel")
            min_wait_us = <uint32_t>(nanoseconds(min_wait) // 1000)
        cdef int done
        self.busy += 1
        with nogil:
            done = pu_ring_submit_and_wait(&self.ring, wait, limit, min_wait_us)
        self.busy -= 1
        if done == -EINTR:
            PyErr_CheckSignals()
            return 0
        if done == -ETIME:
            return 0
        if done < 0:
            raise OSError(-done, f"io_uring_enter: {os.strerror(-done)}")
        return done

    def completions(self):
        cdef bint wide = self.ring.setup_flags & PU_SETUP_CQE32
        cdef list found = []
        cdef const pu_cqe *cqe
        cdef uint64_t user_data
        cdef uint32_t seen = 0
        cdef uint32_t there = self.begin_taking()
        try:
            while seen < there:
                cqe = pu_ring_cqe(&self.ring, seen)
                seen += 1
                user_data = self.release(cqe.user_data) if self.in_flight else cqe.user_data
                extra = (<const char *>(cqe + 1))[:16] if wide else b""
                found.append(Completion(user_data, cqe.res, cqe.flags, extra))
        finally:
            self.end_taking(seen)
        return found

    def for_each(self, callback):
        cdef const pu_cqe *cqe
        cdef uint64_t user_data
        cdef uint32_t seen = 0
        cdef uint32_t there = self.begin_taking()
        try:
            while seen < there:
                cqe = pu_ring_cqe(&self.ring, seen)
                seen += 1
                user_data = self.release(cqe.user_data) if self.in_flight else cqe.user_data
                callback(user_data, cqe.res)
        finally:
            self.end_taking(seen)
        return seen

    cdef uint32_t begin_taking(self) except? 0:
        self.alive()
        if self.taking:
            raise RuntimeError("completions are being taken: for_each must return first")
        self.taking = True
        self.busy += 1
        return pu_ring_ready(&self.ring)

    cdef void end_taking(self, uint32_t seen) noexcept:
        pu_ring_advance(&self.ring, seen)
        self.taking = False
        self.busy -= 1

    def register_files(self, fds):
        self.alive()
        cdef bytes table = b"".join(int(fd).to_bytes(4, "little", signed=True) for fd in fds)
        self.register(PU_REGISTER_FILES, table, len(table) // 4)

    def unregister_files(self):
        self.alive()
        self.register(PU_UNREGISTER_FILES, None, 0)

    def register_eventfd(self, int fd):
        self.alive()
        self.register(PU_REGISTER_EVENTFD, int(fd).to_bytes(4, "little"), 1)

    cdef object register(self, uint32_t opcode, bytes argument, uint32_t count):
        cdef const char *where = <const char *>argument if argument is not None else NULL
        cdef int error = pu_ring_register(&self.ring, opcode, where, count)
        if error < 0:
            raise OSError(-error, f"io_uring_register: {os.strerror(-error)}")

    def register_self(self):
        self.alive()
        cdef int error = pu_ring_register_self(&self.ring)
        if error < 0:
            raise OSError(-error, f"io_uring_register: {os.strerror(-error)}")
