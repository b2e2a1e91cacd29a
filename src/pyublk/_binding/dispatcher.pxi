# Dispatcher: the requests of an async target, on an asyncio event loop.

ctypedef int (*UncheckedStep)(Dispatcher, Suspended) noexcept  # -1: it raised


async def awaiting(awaitable):
    """A coroutine of whatever else a method returned."""
    return await awaitable


@cython.final
cdef class Dispatcher:
    """Runs a target's coroutines on one event loop, for any number of queues.

    Each is stepped once on the spot. Those that end there are answered like a plain method; one
    that suspends is called by what it waits for. An asyncio.Task is made only on demand.
    """

    cdef Handlers handlers
    cdef object loop, answered
    cdef object context        # what requests begin with
    cdef object shared         # a copy for all of them, as long as it is empty
    cdef object entered        # the context of a batch's steps: that one
    cdef object ready, timers  # what the loop has to do; None when it does not show it
    cdef list suspended        # with those that are over, and may be used again
    cdef Suspended idle        # the first of these
    cdef list due              # what goes on in the loop's next turn
    cdef bint scheduled        # which the loop knows
    cdef RequestTask current
    cdef int references        # of `current`, when no handler keeps it
    cdef PyObject *coro        # in a step, `current` is the task of this
    cdef PyObject *request     # likewise; NULL in a first step

    def __init__(self, Handlers handlers not None, loop, answered=None):
        import_asyncio()
        self.handlers = handlers
        self.loop = loop
        self.context = PyContext_CopyCurrent()
        self.shared = PyContext_Copy(self.context)
        self.answered = answered
        self.ready = getattr(loop, "_ready", None)
        self.timers = getattr(loop, "_scheduled", None)
        self.suspended = []
        self.due = []
        self.renew()

    def turn(self, Queue queue not None):
        queue.alive()
        queue.turn_wanted = False
        cdef int there = queue.wait_batch(0)
        if there < 0:
            return None
        if there:
            self.serve_batch(queue, False)
        return there

    def sleep(self, Queue queue not None, int other, timeout=None):
        queue.alive()
        queue.turn_wanted = False
        cdef int64_t limit = nanoseconds(None if timeout is None else max(timeout, 0))
        cdef double until = 0
        cdef bint watches
        cdef int there
        cdef Py_ssize_t timers = 0 if self.timers is None else len(self.timers)
        if limit > 0:
            until = monotonic() + timeout
        while True:
            watches = pu_queue_watch(&queue.q, other) == 0  # else: the ring is full for a moment
            there = queue.wait_batch(limit if watches else 0)
            if there < 0:
                return None
            if there:
                self.serve_batch(queue, self.ready is not None)
            if queue.q.watched:
                return True
            if limit == 0 or (watches and not there):
                return False
            if self.ready is None or self.timers is None:
                return False
            if len(self.ready) or len(self.timers) != timers or self.loop._stopping:
                return False
            if limit > 0:
                limit = <int64_t>((until - <double>monotonic()) * 1e9)
                if limit <= 0:
                    return False

    def waiting(self):
        return [(<Suspended>each).coro for each in self.unfinished()]

    def tasks(self):
        return [(<Suspended>each).make_task() for each in self.unfinished()]

    cdef list unfinished(self):
        return [each for each in list(self.suspended) if (<Suspended>each).io is not None]

    cdef int renew(self) except -1:
        request = <RequestTask>RequestTask.__new__(RequestTask)
        request.dispatcher = self
        self.current = request
        return 0

    cdef int enter(self) except -1:
        self.enter_task()
        self.entered = self.shared
        PyContext_Enter(self.entered)
        return 0

    cdef int enter_task(self) except -1:
        _enter_task(self.loop, self.current)
        self.references = PU_REFERENCES(<PyObject *>self.current)
        return 0

    cdef int leave(self) except -1:
        PyContext_Exit(self.entered)
        _leave_task(self.loop, self.current)
        return 0

    cdef object give_context(self):
        """The context for all is one request's from now on."""
        given, self.shared = self.shared, PyContext_Copy(self.context)
        return given

    cdef inline bint has_changed_context(self) except -1:
        """After a step in the context for all: whether it is one request's now."""
        return self.shared is not self.entered or PyMapping_Size(self.entered) != 0

    cdef object change_context(self):
        """For the steps to come; returns the one until now."""
        context = self.entered
        if self.shared is context:
            self.give_context()
        PyContext_Exit(context)
        self.entered = self.shared
        PyContext_Enter(self.entered)
        return context

    cdef int serve_batch(self, Queue queue, bint asleep) except -1:
        """The first steps of what has come. `asleep`: the loop would do what is in `ready` next."""
        self.enter()
        try:
            for i in range(queue.q.nr_ready):
                self.begin(queue.take(queue.q.ready[i]))
            if asleep and not len(self.ready):  # its next turn would be theirs alone
                self.go_on_with_due()
        finally:
            self.leave()
        return self.schedule()

    cdef object stepped(self):
        return None if self.coro == NULL else <object>self.coro

    cdef Suspended stepped_again(self):
        """None in a first step."""
        return None if self.request == NULL else <Suspended>self.request

    cdef inline Suspended take_suspended(self):
        """One that nobody has any more, or a new one."""
        request = self.idle
        if request is None:
            return self.new_suspended(None)
        self.idle = request.next
        request.next = None
        if not PU_ALONE(<PyObject *>request, 2):  # kept: not just the list and `request`
            return self.replace_suspended(request)
        request.over = False
        return request

    cdef Suspended new_suspended(self, object coro):
        request = <Suspended>Suspended.__new__(Suspended)
        request.dispatcher = self
        request.place = -1
        request.coro = coro
        return request

    cdef Suspended replace_suspended(self, Suspended kept):
        request = self.new_suspended(None)
        request.place, kept.place = kept.place, -1
        self.suspended[request.place] = request
        return request

    cdef int remember(self, Suspended request) except -1:
        request.place = len(self.suspended)
        self.suspended.append(request)
        return 0

    cdef int begin(self, IO io) except -1:
        """The first step of a request, and its answer when there is no second one."""
        cdef PyObject *given = NULL
        cdef int64_t result = 0
        cdef int step = PYGEN_ERROR
        cdef PyObject *made = (<UncheckedCall>Handlers.call)(self.handlers, io)
        coro = None
        if made != NULL:
            coro = owned(made)
            if not PyCoro_CheckExact(coro):
                coro = awaiting(coro)
            self.coro = <PyObject *>coro
            step = unchecked_send(coro, None, &given)
        if step != PYGEN_NEXT:
            result = self.result_of_step(step, given, io)
        if step == PYGEN_NEXT:
            request = self.current.request
            if request is None:
                request = self.take_suspended()
                request.coro = coro
            request.io = io
            if self.has_changed_context():
                request.context = self.change_context()
            if request.place < 0:
                self.remember(request)
            if self.is_kept():
                self.let_go(request)
            self.coro = NULL
            request.suspend(given)
        else:
            if self.has_changed_context():
                self.change_context()
            if self.is_kept():
                self.let_go_of_ended(coro)
            self.coro = NULL
            if self.handlers.handle is None or not io.answered_otherwise(
                result, self.handlers.reporter
            ):
                io.queue.answer_here(io, result)
        return 0

    cdef int go_on(self, Suspended request) except -1:
        """A later step, without a Task."""
        cdef PyObject *given = NULL
        cdef int64_t result = 0
        cdef int step
        cdef bint has_own = request.context is not None
        cdef bint is_kept = request.kept is not None
        if is_kept:
            _leave_task(self.loop, self.current)
            _enter_task(self.loop, request.kept)
        else:
            self.coro = <PyObject *>request.coro
            self.request = <PyObject *>request
        if has_own:
            PyContext_Enter(request.context)
        step = unchecked_send(request.coro, None, &given)
        if step != PYGEN_NEXT:
            result = self.result_of_step(step, given, request.io)
        if has_own:
            PyContext_Exit(request.context)
        elif self.has_changed_context():
            request.context = self.change_context()
        if is_kept:
            _leave_task(self.loop, request.kept)
            _enter_task(self.loop, self.current)
        elif self.is_kept():
            self.let_go(request)
        self.coro = self.request = NULL
        if step == PYGEN_NEXT:
            request.suspend(given)
        else:
            request.end(result)
        return 0

    cdef int go_on_alone(self, Suspended request) except -1:
        self.enter()
        try:
            self.go_on(request)
        finally:
            self.leave()
        return self.schedule()

    cdef int schedule(self) except -1:
        """What is due goes on when the loop's other callbacks have had their turn."""
        if self.due and not self.scheduled:
            self.loop.call_soon(self._go_on_together, context=self.context)
            self.scheduled = True
        return 0

    def _go_on_together(self):
        self.scheduled = False
        self.enter()
        try:
            self.go_on_with_due()
        finally:
            self.leave()
        self.schedule()

    cdef int go_on_with_due(self) except -1:
        due, self.due = self.due, []
        for each in due:
            request = <Suspended>each
            if not request.due:  # it has a Task now
                continue
            request.due = False
            if (<UncheckedStep>Dispatcher.go_on)(self, request) < 0:
                self.not_answered()
        return 0

    cdef int not_answered(self) except -1:
        """Reports an exception, so that other requests go on."""
        try:
            PU_RAISED()
        except Exception as error:
            self.loop.call_exception_handler(
                {"message": "a request was not answered", "exception": error}
            )
        return 0

    cdef inline bint is_kept(self) noexcept:
        """Whether a handler keeps the current task, or has made an asyncio.Task of it."""
        cdef int references = PU_REFERENCES(<PyObject *>self.current)
        if references == INT_MAX:  # no telling
            return True
        return references != self.references or self.current.task is not None

    cdef int let_go(self, Suspended request) except -1:
        """After a step: the current task stays with its request, which somebody keeps."""
        if request.context is None:  # a Task may be made of it in another one's step
            request.context = PyContext_Copy(self.context)
        request.kept = self.current
        self.current.coro = request.coro
        self.current.request = request
        return self.replace()

    cdef int let_go_of_ended(self, object coro) except -1:
        self.current.coro = coro
        self.current.over = True
        if self.current.request is not None:
            self.current.request.over = True
        return self.replace()

    cdef int replace(self) except -1:
        _leave_task(self.loop, self.current)
        self.renew()
        return self.enter_task()

    cdef inline int64_t result_of_step(self, int step, PyObject *given, IO io) noexcept:
        if step == PYGEN_RETURN and given == <PyObject *>None:
            Py_DECREF(None)
            return 0
        return self.other_result(step, given, io)

    cdef int64_t other_result(self, int step, PyObject *given, IO io) noexcept:
        if step == PYGEN_RETURN:
            return self.result_of(owned(given), io)
        try:
            return PU_RAISED()
        except BaseException as raised:
            return self.failure(raised, io)

    cdef int64_t result_of(self, object outcome, IO io) noexcept:
        return 0 if outcome is None else self.handlers.reporter.result_of(outcome, io)

    cdef int64_t failure(self, object raised, IO io) noexcept:
        if issubclass(type(raised), CancelledError):  # isinstance would ask the object itself
            return -EIO
        return self.handlers.reporter.result_of(raised, io)
