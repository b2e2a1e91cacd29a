# Queues that are served by an NBD server.

cdef extern from "_core/nbd.h" nogil:
    uint32_t PU_NBD_MAX_LINKS

    struct pu_nbd_link:
        uint32_t pending
        uint64_t replies

    struct pu_nbd:
        pu_nbd_link *links
        uint64_t resent
        bint to_tell

    uint32_t pu_nbd_entries(uint32_t)
    int pu_nbd_open(pu_nbd *, pu_queue *, uint32_t)
    void pu_nbd_stop(pu_nbd *)
    void pu_nbd_close(pu_nbd *)
    int pu_nbd_turn(pu_nbd *, int64_t)
    int pu_nbd_tell(pu_nbd *, int *)
    void pu_nbd_attach(pu_nbd *, uint32_t, int)
    void pu_nbd_drop(pu_nbd *, uint32_t, int)
    void pu_nbd_release(pu_nbd *, uint32_t)
    void pu_nbd_set_fail(pu_nbd *, bint)
    void pu_nbd_shut(int)


cdef class ConnectedQueue(Queue):
    """A queue served by an NBD server, over sockets that its own ring sends and receives on."""

    cdef pu_nbd nbd
    cdef list sockets  # of each link; None: it is down
    cdef readonly list unfinished  # those that ended with requests in flight
    cdef bint opened

    def __init__(self, fd, uint16_t queue_id=0, *, unsigned int links=1, **options):
        cdef int error
        if not 1 <= links <= PU_NBD_MAX_LINKS:
            raise ValueError(f"links must be 1 to {PU_NBD_MAX_LINKS}, not {links}")
        super().__init__(
            fd, queue_id, extra_entries=pu_nbd_entries(links), files=[-1] * links, **options
        )
        error = pu_nbd_open(&self.nbd, &self.q, links)
        if error < 0:
            self.close()
            raise errors.queue_error(-error, queue_id)
        self.opened = True
        self.sockets = [None] * links
        self.unfinished = []

    @classmethod
    def loopback(cls, *, links=1, depth=DEFAULT_DEPTH, buffer_size=DEFAULT_MAX_IO_SIZE, gate=None):
        return cls(-1, links=links, depth=depth, buffer_size=buffer_size, gate=gate)

    def __dealloc__(self):
        if self.opened:
            pu_nbd_close(&self.nbd)

    cdef int end(self) except -1:
        if self.opened and self.q.tags != NULL:
            pu_nbd_stop(&self.nbd)
        Queue.end(self)
        cdef bint parents = self.process != pu_process()
        sockets, self.sockets = self.sockets or [], [None] * len(self.sockets or [])
        for i, socket in enumerate(sockets):
            if socket is None:
                continue
            if parents or not self.nbd.links[i].pending:
                socket.close()
                continue
            # The server may still do what it was asked: whoever cares waits for its end.
            pu_nbd_shut(socket.fileno())
            self.unfinished.append(socket)
        return 0

    cdef int check_link(self, unsigned int link) except -1:
        if link >= len(self.sockets):
            raise ValueError(f"the queue has {len(self.sockets)} link(s), and no link {link}")
        return 0

    @cython.critical_section
    def attach(self, unsigned int link, socket):
        self.check_link(link)
        if not self.is_open:
            return False
        if self.sockets[link] is not None:
            raise ValueError(f"link {link} has a socket already")
        cdef int number = socket.fileno()
        if number < 0:
            raise ValueError("the socket is closed")
        self.sockets[link] = socket
        pu_nbd_attach(&self.nbd, link, number)
        return True

    @cython.critical_section
    def drop(self, unsigned int link, int reason):
        self.check_link(link)
        if self.is_open and reason > 0:
            pu_nbd_drop(&self.nbd, link, reason)

    @cython.critical_section
    def release(self, unsigned int link):
        self.check_link(link)
        if self.is_open:
            pu_nbd_release(&self.nbd, link)

    @cython.critical_section
    def set_fail(self, bint fail):
        if self.is_open:
            pu_nbd_set_fail(&self.nbd, fail)

    @cython.critical_section
    def links(self):
        return [
            (
                self.sockets[i] is not None,
                self.nbd.links[i].pending,
                self.nbd.links[i].replies,
            )
            for i in range(len(self.sockets))
        ]

    @property
    def resent(self):
        return self.nbd.resent

    def serve_connected(self, lost):
        self.alive()
        pu_watch_end(&self.watch)
        while self.connected_round(lost, -1, not self.q.loopback):
            if self.q.loopback and pu_queue_held(&self.q) == pu_gate_kept(&self.q):
                return

    def step(self, lost, *, timeout=None):
        cdef int64_t limit = nanoseconds(timeout)
        self.alive()
        pu_watch_end(&self.watch)
        for _ in range(PU_TURN_ROUNDS):
            if not self.connected_round(lost, limit, False):
                return False
            if not pu_queue_pending(&self.q):
                return True
            limit = 0
        # Whoever waits for `fileno` now must not wait for what has not been handed over.
        with nogil:
            pu_queue_submit(&self.q)
        return True

    cdef bint connected_round(self, lost, int64_t timeout_ns, bint until_told) except -1:
        """A wait, or as many as it takes, and telling of links that went down. False: the device
        has been stopped."""
        cdef int there, link, reason
        with nogil:
            there = pu_nbd_turn(&self.nbd, timeout_ns)
            while until_told and there == 0 and not self.nbd.to_tell:
                there = pu_nbd_turn(&self.nbd, timeout_ns)
        if not self.goes_on(there):
            return False
        while self.nbd.to_tell:
            link = pu_nbd_tell(&self.nbd, &reason)
            if link >= 0:
                socket, self.sockets[link] = self.sockets[link], None
                lost(self, link, socket, reason)
        return True

    cdef str obstacle(self):
        return "its server did not answer"
