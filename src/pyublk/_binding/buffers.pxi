# The memory of requests, who sees it, and the number of a char device.

# As long as it is, its memory is: the collector takes neither from the other.
@cython.no_gc_clear
cdef class Span:
    """Memory with an owner, which memoryviews of it keep; counts who has a buffer of it."""

    cdef object owner
    cdef char *data
    cdef Py_ssize_t length
    cdef Py_ssize_t exports
    cdef bint writable

    @staticmethod
    cdef Span make(object owner, void *data, Py_ssize_t length, bint writable):
        span = <Span>Span.__new__(Span)
        span.owner = owner
        span.data = <char *>data
        span.length = length
        span.writable = writable
        return span

    @staticmethod
    cdef Span borrow(object buffer, bint writable):
        view = memoryview(buffer).cast("B")
        if writable and view.readonly:
            raise ValueError("the buffer must be writable, such as a bytearray")
        return Span.make(view, address_of(view), len(view), writable)

    @cython.critical_section
    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.length, not self.writable, flags)
        self.exports += 1

    @cython.critical_section
    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1


cdef char *address_of(object view) except? NULL:
    cdef const unsigned char[::1] bytes_of = view
    return <char *>&bytes_of[0] if len(view) else NULL


def address(memory):
    """Where the bytes of a buffer are."""
    return <uintptr_t>address_of(memoryview(memory))


cdef class Buffers:
    """Memory for the requests of `depth` tags, `size` bytes each; several threads may share it."""

    cdef pu_buffers *buffers
    cdef readonly unsigned int depth
    cdef readonly size_t size

    def __init__(self, unsigned int depth, size_t size):
        if self.buffers != NULL:
            raise RuntimeError("this memory is made already")
        self.buffers = pu_buffers_new(<uint16_t>depth, size)
        if self.buffers == NULL:
            raise MemoryError(f"cannot reserve {depth} buffers of {size} bytes")
        self.depth = depth
        self.size = size

    def __dealloc__(self):
        if self.buffers != NULL:
            pu_buffers_free(self.buffers)


@cython.no_gc  # which would clear `buffers` before __dealloc__ needs it; it is in no cycle
cdef class KeptBuffer:
    """What a tag had until now, and somebody still sees: theirs as long as they do."""

    cdef Buffers buffers
    cdef uint8_t *data

    @staticmethod
    cdef KeptBuffer make(Buffers buffers, uint8_t *data):
        kept = <KeptBuffer>KeptBuffer.__new__(KeptBuffer)
        kept.buffers = buffers
        kept.data = data
        return kept

    def __dealloc__(self):
        if self.data != NULL:
            pu_buffers_unmap(self.buffers.buffers, self.data)


cdef class CharDevice:
    """An open char device, whose number is taken until everybody who may use it has gone."""

    cdef int fd

    def __cinit__(self):
        self.fd = -1

    def __init__(self, int fd):
        """Takes `fd` over."""
        self.fd = fd

    def fileno(self):
        return self.fd

    @cython.critical_section
    def close(self):
        """For when nobody uses it any more."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            pu_fork_drop(fd)
            os.close(fd)

    def __dealloc__(self):
        if self.fd >= 0:
            pu_fork_drop(self.fd)
            close_number(self.fd)
