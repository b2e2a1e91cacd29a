# Many queues of one thread.

cdef class QueueSet:
    """What a thread sleeps in that serves many queues."""

    cdef pu_set set
    cdef dict places  # of each queue
    cdef list queues  # of each place, or None
    cdef bint is_open
    cdef uint64_t owner
    cdef int process

    def __init__(self, uint32_t room=4096):
        cdef int error
        if self.queues is not None:
            raise RuntimeError("this set is open already")
        if not 1 <= room <= 16384:
            raise ValueError(f"room must be 1 to 16384 queues, not {room}")
        error = pu_set_open(&self.set, room)
        if error < 0:
            raise errors.io_uring_error(-error)
        self.owner = pu_this_thread()
        self.process = pu_process()
        self.places = {}
        self.queues = []
        self.is_open = True

    def __dealloc__(self):
        if self.is_open:
            pu_set_close(&self.set)

    cdef int check(self) except -1:
        if not self.is_open:
            raise errors.DeviceClosed("the set of queues is closed")
        if self.process != pu_process():
            raise errors.forked_error(self.process)
        if self.owner != pu_this_thread():
            raise RuntimeError("a set of queues is used by the thread that made it, and no other")
        return 0

    @cython.critical_section
    def close(self):
        if self.is_open:
            self.is_open = False
            pu_set_close(&self.set)
            self.places = {}
            self.queues = []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __len__(self):
        return len(self.places)

    def add(self, Queue queue not None):
        self.check()
        queue.alive()
        if queue.owner != self.owner:
            raise RuntimeError(f"queue {queue.q.id} is served by the thread that made it")
        if queue in self.places:
            raise ValueError(f"queue {queue.q.id} is in this set already")
        cdef int place = pu_set_add(&self.set, &queue.q)
        if place == -ENOSPC:
            raise OSError(ENOSPC, f"this set has no room for more than {len(self)} queues")
        if place < 0:
            raise errors.queue_error(-place, queue.q.id)
        while len(self.queues) <= place:
            self.queues.append(None)
        self.queues[place] = queue
        self.places[queue] = place

    def remove(self, Queue queue not None):
        self.check()
        place = self.places.pop(queue, None)
        if place is None:
            raise ValueError(f"queue {queue.q.id} is not in this set")
        pu_set_remove(&self.set, place)
        self.queues[place] = None

    def wait(self, timeout=None):
        self.check()
        cdef int64_t limit = nanoseconds(timeout)
        cdef int there
        with nogil:
            there = pu_set_wait(&self.set, limit)
        if there < 0:
            raise errors.io_uring_error(-there)
        if not there:
            PyErr_CheckSignals()
        queues = self.queues
        return [queues[self.set.ready[i]] for i in range(self.set.nr_ready)]

    @cython.critical_section
    def wake(self):
        if self.is_open and self.process == pu_process():
            pu_set_wake(&self.set)
