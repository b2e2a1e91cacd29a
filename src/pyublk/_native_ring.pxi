# Ring: an io_uring for Python, usable on its own.

cdef class Ring:
    cdef pu_ring ring
    cdef dict held  # user_data -> what the kernel still reads or writes

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

    def __dealloc__(self):
        pu_ring_close(&self.ring)

    def close(self):
        pu_ring_close(&self.ring)
        self.held = {}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    cdef int alive(self) except -1:
        if self.ring.fd < 0:
            raise ValueError("the ring is closed")
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
        # Its completion would let go of what is held for the other.
        if len(self.held) and user_data in self.held:
            raise ValueError(f"user_data {user_data} is in flight: choose another number")
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

    cdef int make_room(self) except -1:
        cdef int done
        with nogil:
            done = pu_ring_submit(&self.ring, 0, 0, 0)
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
        sqe = self.sqe(PU_OPCODE_TIMEOUT, user_data)
        self.held[user_data] = timespec
        sqe.addr = <uint64_t><uintptr_t><const char *>timespec
        sqe.len = 1

    cdef object transfer(self, uint8_t opcode, int fd, object buffer, bint writable,
                         uint64_t offset, uint64_t user_data):
        span = Span.borrow(buffer, writable)
        sqe = self.sqe(opcode, user_data)
        self.held[user_data] = span
        sqe.fd = fd
        sqe.off = offset
        sqe.addr = <uint64_t><uintptr_t>(<Span>span).data
        sqe.len = <uint32_t>(<Span>span).length

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
        cdef int done, again = 0
        cdef uint32_t wanted = 0
        if timeout is None and min_wait is None:
            wanted = min(wait, self.ring.cq_entries)
        with nogil:
            done = pu_ring_submit(&self.ring, wait, limit, min_wait_us)
            # Kernels end a wait when a time-out fires, which is before its completion is there.
            while (done >= 0 and again >= 0 and pu_ring_ready(&self.ring) < wanted
                   and not pu_ring_unsubmitted(&self.ring)):
                again = pu_ring_submit(&self.ring, wait, limit, 0)
        if done == -EINTR or again == -EINTR:
            PyErr_CheckSignals()
            return max(done, 0)
        if done == -ETIME:
            return 0
        if done < 0:
            raise OSError(-done, f"io_uring_enter: {os.strerror(-done)}")
        return done

    def completions(self):
        self.alive()
        cdef uint32_t there = pu_ring_ready(&self.ring)
        cdef bint wide = self.ring.setup_flags & PU_SETUP_CQE32
        cdef list found = []
        cdef const pu_cqe *cqe
        for i in range(there):
            cqe = pu_ring_cqe(&self.ring, i)
            extra = (<const char *>(cqe + 1))[:16] if wide else b""
            found.append(Completion(cqe.user_data, cqe.res, cqe.flags, extra))
            self.held.pop(cqe.user_data, None)
        pu_ring_advance(&self.ring, there)
        return found

    def for_each(self, callback):
        self.alive()
        cdef uint32_t there = pu_ring_ready(&self.ring)
        cdef uint32_t seen = 0
        cdef const pu_cqe *cqe
        cdef bint holding = len(self.held) > 0
        try:
            while seen < there:
                cqe = pu_ring_cqe(&self.ring, seen)
                seen += 1
                if holding:
                    self.held.pop(cqe.user_data, None)
                callback(cqe.user_data, cqe.res)
        finally:
            pu_ring_advance(&self.ring, seen)
        return seen

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
