# Memory that a device shares with its clients.

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
