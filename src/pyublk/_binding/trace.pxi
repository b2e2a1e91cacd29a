# Memory for the records of a queue's requests.

cdef size_t RECORD = 48


cdef class TraceBuffer:
    cdef pu_trace trace

    def __init__(self, size_t size, *, uint32_t device=0, uint32_t number=0):
        cdef int error
        if self.trace.records != NULL:
            raise RuntimeError("this buffer has its memory already")
        if size < RECORD:
            raise ValueError(f"a record has {RECORD} bytes, so {size} are too few")
        with nogil:
            error = pu_trace_open(&self.trace, size)
        if error < 0:
            raise MemoryError(f"there are no {size} bytes for a trace")
        self.trace.device = device
        self.trace.cpu = number
        self.trace.began = pu_now_ns()

    def __dealloc__(self):
        pu_trace_close(&self.trace)

    @property
    def kept(self):
        return pu_trace_kept(&self.trace)

    @property
    def lost(self):
        return pu_trace_lost(&self.trace)

    def records(self):
        """To be written to a file; no queue has the buffer any more."""
        return memoryview(Span.make(self, self.trace.records, self.kept * RECORD, False))
