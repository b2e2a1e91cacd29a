# Dispatcher: the requests of an async target, on an asyncio event loop.

cdef extern from "Python.h":
    enum: PYGEN_NEXT
    int PyIter_Send(object, object, PyObject **) except -1
    bint PyCoro_CheckExact(object)


cdef object owned(PyObject *reference):
    """Takes over a reference that a C function gave."""
    given = <object>reference
    Py_DECREF(given)
    return given


async def awaiting(awaitable):
    """A coroutine of whatever else a method returned."""
    return await awaitable


cdef class RequestTask:
    """What asyncio.current_task() is in a handler: a task, made only when it is needed.

    Until its coroutine suspends for the first time, a request has no asyncio.Task. asyncio.timeout
    and asyncio.TaskGroup ask two things of the current task when they begin, answered here; all
    else makes the Task and goes to it. One of these serves request after request, unless a handler
    keeps it: then it stays that request's.
    """

    cdef Dispatcher dispatcher
    cdef object coro, context, task
    cdef Suspended carried
    cdef bint over
    cdef object __weakref__

    def __init__(self):
        raise TypeError("a RequestTask comes from a Dispatcher")

    cdef object real(self):
        if self.carried is None:
            self.carried = self.dispatcher.carry(self.coro, self.context)
            self.carried.over = self.over
            self.task = self.carried.task
        return self.task

    def cancelling(self):
        return 0 if self.task is None else self.task.cancelling()

    def uncancel(self):
        return 0 if self.task is None else self.task.uncancel()

    def get_coro(self):
        return self.coro

    def __getattr__(self, name):
        return getattr(self.real(), name)

    def __await__(self):
        return self.real().__await__()

    def __repr__(self):
        return f"<RequestTask {self.coro!r}>"


@cython.freelist(64)
cdef class Suspended:
    """The rest of a request's coroutine, as its asyncio.Task drives it: the future it waits for,
    handed out once more, then the coroutine's own steps, then the answer."""

    cdef Dispatcher dispatcher
    cdef IO io
    cdef object coro, task
    cdef object future     # yielded already, and not yet seen by the Task
    cdef bint blocking     # it is to be awaited, as `await` says with its flag
    cdef RequestTask kept  # by the handler: it goes on to be the current task
    cdef bint over

    def __init__(self):
        raise TypeError("a Suspended comes from a Dispatcher")

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.step(None, None)

    def send(self, value):
        return self.step(value, None)

    def throw(self, kind, value=None, trace=None):
        if value is None:
            value = kind() if isinstance(kind, type) else kind
        return self.step(None, value)

    def close(self):
        self.coro.close()

    def __getattr__(self, name):  # cr_frame, __qualname__ and so on, for those who look
        return getattr(self.coro, name)

    cdef object step(self, object value, object thrown):
        if self.over:
            raise StopIteration
        if self.future is not None:
            future, self.future = self.future, None
            # The second: as if the Task had been told to cancel while it waited.
            if thrown is None or (
                self.blocking and isinstance(thrown, CancelledError)
                and future.cancel(*thrown.args[:1])
            ):
                if self.blocking:
                    future._asyncio_future_blocking = True
                return future
        if self.kept is None:
            return self.run(value, thrown)
        task, kept, loop = self.task, self.kept, self.dispatcher.loop
        _leave_task(loop, task)
        _enter_task(loop, kept)
        try:
            return self.run(value, thrown)
        finally:
            _leave_task(loop, kept)
            _enter_task(loop, task)

    cdef object run(self, object value, object thrown):
        cdef PyObject *given = NULL
        cdef int64_t result = 0
        try:
            if thrown is not None:
                return self.coro.throw(thrown)
            if PyIter_Send(self.coro, value, &given) == PYGEN_NEXT:
                return owned(given)
            result = self.dispatcher.result_of(owned(given), self.io)
        except StopIteration as done:
            result = self.dispatcher.result_of(done.value, self.io)
        except BaseException as raised:
            result = self.dispatcher.failure(raised, self.io)
        thrown = None
        io = self.io
        self.over = True
        self.task = self.kept = self.io = None
        self.dispatcher.suspended.discard(self)
        self.dispatcher.answer(io, result)
        if self.dispatcher.answered is not None:
            self.dispatcher.answered(io.queue)
        raise StopIteration


cdef class Dispatcher:
    """Runs a target's coroutines on one event loop, for any number of queues.

    Each is stepped once on the spot. Most end there, and are answered like a plain method; one
    that suspends goes on as an asyncio.Task.
    """

    cdef Handlers handlers
    cdef object loop, answered
    cdef object ready, timers  # what the loop has to do; None when it does not show it
    cdef set suspended
    cdef RequestTask current
    cdef int references        # of `current`, when no handler keeps it

    def __init__(self, Handlers handlers not None, loop, answered=None):
        self.handlers = handlers
        self.loop = loop
        self.answered = answered
        self.ready = getattr(loop, "_ready", None)
        self.timers = getattr(loop, "_scheduled", None)
        self.suspended = set()
        self.renew()

    def turn(self, Queue queue not None):
        queue.alive()
        cdef int there = queue.wait_batch(0)
        if there < 0:
            return None
        if there:
            self.begin_batch(queue)
        return there

    def sleep(self, Queue queue not None, int other, timeout=None):
        queue.alive()
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
                self.begin_batch(queue)
            if queue.q.watched:
                return True
            if limit == 0 or (watches and not there):
                return False
            if self.ready is None or self.timers is None:
                return False
            if len(self.ready) or len(self.timers) != timers:
                return False
            if limit > 0:
                limit = <int64_t>((until - <double>monotonic()) * 1e9)
                if limit <= 0:
                    return False

    def waiting(self):
        return [(<Suspended>each).coro for each in list(self.suspended)]

    def cancel(self):
        for each in list(self.suspended):
            (<Suspended>each).task.cancel()

    cdef int renew(self) except -1:
        request = <RequestTask>RequestTask.__new__(RequestTask)
        request.dispatcher = self
        self.current = request
        return 0

    cdef int enter(self) except -1:
        _enter_task(self.loop, self.current)
        self.references = PU_REFERENCES(<PyObject *>self.current)
        return 0

    cdef int begin_batch(self, Queue queue) except -1:
        self.enter()
        try:
            for i in range(queue.q.nr_ready):
                self.begin(queue.take(queue.q.ready[i]))
        finally:
            _leave_task(self.loop, self.current)
        return 0

    cdef int begin(self, IO io) except -1:
        """The first step of a request, and its answer when there is no second one."""
        cdef PyObject *given = NULL
        cdef int64_t result = 0
        cdef bint suspends = False
        coro = None
        context = PyContext_CopyCurrent()
        self.current.context = context
        PyContext_Enter(context)
        try:
            coro = self.handlers.call(io)
            if not PyCoro_CheckExact(coro):
                coro = awaiting(coro)
            self.current.coro = coro
            suspends = PyIter_Send(coro, None, &given) == PYGEN_NEXT
            if not suspends:
                result = self.result_of(owned(given), io)
        except BaseException as raised:
            result = self.failure(raised, io)
        finally:
            PyContext_Exit(context)
        if suspends:
            self.suspend(io, coro, context, owned(given))
        else:
            self.release()
            self.answer(io, result)
        return 0

    cdef int suspend(self, IO io, object coro, object context, object future) except -1:
        cdef Suspended carried = self.current.carried
        if carried is None:
            carried = self.carry(coro, context)
        carried.io = io
        carried.future = future
        if future is not None:
            carried.blocking = getattr(future, "_asyncio_future_blocking", False)
            if carried.blocking:  # else others could not await it until the Task runs
                future._asyncio_future_blocking = False
        self.suspended.add(carried)
        if self.kept():
            carried.kept = self.current
            self.current.carried = carried
            self.current.task = carried.task
            self.replace()
        else:
            self.current.coro = self.current.context = None
        return 0

    cdef int release(self) except -1:
        """The request that was current is over."""
        if not self.kept():
            self.current.coro = self.current.context = None
            return 0
        self.current.over = True
        if self.current.carried is not None:
            self.current.carried.over = True
        self.replace()
        return 0

    cdef bint kept(self) noexcept:
        return (
            PU_REFERENCES(<PyObject *>self.current) != self.references
            or self.current.carried is not None
        )

    cdef int replace(self) except -1:
        _leave_task(self.loop, self.current)
        self.renew()
        self.enter()
        return 0

    cdef Suspended carry(self, object coro, object context):
        carried = <Suspended>Suspended.__new__(Suspended)
        carried.dispatcher = self
        carried.coro = coro
        carried.task = Task(carried, loop=self.loop, name="ublk request", context=context)
        return carried

    cdef int64_t result_of(self, object outcome, IO io) except? 1:
        return 0 if outcome is None else -<int64_t>self.handlers.report(outcome, io)

    cdef int64_t failure(self, object raised, IO io) except? 1:
        if isinstance(raised, CancelledError):
            return -EIO
        return -<int64_t>self.handlers.report(raised, io)

    cdef int answer(self, IO io, int64_t result) except -1:
        cdef Queue queue = io.queue
        if io.deferred or not pu_queue_holds(&queue.q, io.tag, io.generation):
            return 0
        io.drop_view()
        cdef int error = pu_queue_answer(&queue.q, io.tag, io.give_answer(result))
        if error < 0 and error != -EALREADY:  # else: failed from outside meanwhile
            raise errors.queue_error(-error, queue.q.id)
        return 0
