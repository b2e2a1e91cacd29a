# Native targets and the sharded lock.

NULL_HANDLER = <uintptr_t>&pu_null_handle


cdef class Ram:
    """`size` bytes of memory, sparse until written, or those of a `file` in memory; `handler` and
    `context` serve it natively."""

    cdef pu_ram ram
    cdef bint made
    cdef int process

    def __init__(self, uint64_t size, int file=-1):
        if self.made:
            raise RuntimeError("this memory is made already")
        cdef int error = pu_ram_init(&self.ram, size, file)
        if error < 0:
            raise OSError(-error, f"cannot reserve {size} bytes of memory: {os.strerror(-error)}")
        self.process = pu_process()
        self.made = True

    def __dealloc__(self):
        if self.made and self.process == pu_process():
            pu_ram_destroy(&self.ram)

    @property
    def handler(self):
        return <uintptr_t>&pu_ram_handle

    @property
    def context(self):
        return <uintptr_t>&self.ram

    @property
    def file(self):
        return self.ram.file if self.made and self.process == pu_process() else -1

    def resident(self):
        """Bytes that really occupy memory now."""
        cdef uint64_t size
        if self.process != pu_process():
            return 0  # the parent has it all
        with nogil:
            size = pu_ram_resident(&self.ram)
        return size


cdef class ShardedLock:
    """Readers share a byte range, a writer has it alone; distant ranges do not meet."""

    cdef pu_lock lock
    cdef bint made

    def __init__(self, unsigned int shards=64, uint64_t granule=1 << 20):
        if self.made:
            raise RuntimeError("this lock is made already")
        if shards < 1 or granule < 1:
            raise ValueError("shards and granule must be at least 1")
        cdef int error = pu_lock_init(&self.lock, shards, granule)
        if error < 0:
            raise OSError(-error, os.strerror(-error))
        self.made = True

    def __dealloc__(self):
        if self.made:
            pu_lock_destroy(&self.lock)

    def reading(self, uint64_t offset, uint64_t length):
        return _Held.make(self, offset, length, False)

    def writing(self, uint64_t offset, uint64_t length):
        return _Held.make(self, offset, length, True)


cdef class _Held:
    cdef ShardedLock owner
    cdef uint64_t offset, length
    cdef bint exclusive

    @staticmethod
    cdef _Held make(ShardedLock owner, uint64_t offset, uint64_t length, bint exclusive):
        held = <_Held>_Held.__new__(_Held)
        held.owner = owner
        held.offset = offset
        held.length = length
        held.exclusive = exclusive
        return held

    def __enter__(self):
        with nogil:
            if self.exclusive:
                pu_lock_write(&self.owner.lock, self.offset, self.length)
            else:
                pu_lock_read(&self.owner.lock, self.offset, self.length)

    def __exit__(self, *exc):
        pu_lock_unlock(&self.owner.lock, self.offset, self.length)
