# Dispatcher: the requests of an async target, on an asyncio event loop.

cdef extern from "Python.h":
    enum: PYGEN_RETURN, PYGEN_ERROR, PYGEN_NEXT
    int PyIter_Send(object, object, PyObject **) except PYGEN_ERROR
    int unchecked_send "PyIter_Send"(object, object, PyObject **) noexcept
    bint PyCoro_CheckExact(object)
    Py_ssize_t PyMapping_Size(object) except -1


# Of asyncio, which only a Dispatcher needs, and which is half of what importing pyublk would cost.
CancelledError = Future = Task = _enter_task = _leave_task = None


cdef int import_asyncio() except -1:
    global CancelledError, Future, Task, _enter_task, _leave_task
    from asyncio import CancelledError, Future, Task
    from asyncio.tasks import _enter_task, _leave_task
    return 0


cdef inline object owned(PyObject *reference):
    """Takes over a reference that a C function gave."""
    given = <object>reference
    Py_DECREF(given)
    return given


cdef object for_a_task(object future):
    """What a coroutine has yielded. A Task never ends when it cannot even be asked what it is."""
    bool(getattr(future, "_asyncio_future_blocking", None))
    return future


async def awaiting(awaitable):
    """A coroutine of whatever else a method returned."""
    return await awaitable


@cython.final
cdef class RequestTask:
    """What asyncio.current_task() is in a handler: a task that is made only when it is needed.

    asyncio.timeout and asyncio.TaskGroup ask two things of the current task when they begin,
    answered here; all else makes an asyncio.Task, which drives the coroutine from then on. One of
    these serves request after request, unless a handler keeps it: then it stays that request's.
    """

    cdef Dispatcher dispatcher
    cdef object coro, task
    cdef Suspended request  # None in a first step, unless it was wanted
    cdef bint over
    cdef object __weakref__

    def __init__(self):
        raise TypeError("a RequestTask comes from a Dispatcher")

    cdef inline int serve(self, object coro, Suspended request) except -1:
        self.coro = coro
        self.request = request
        return 0

    cdef object real(self):
        if self.task is None:
            if self.request is None:
                self.request = self.dispatcher.new_suspended(None, self.coro)
                self.request.over = self.over
            if self.request.context is None:  # then this is in a step
                self.request.context = self.dispatcher.give_context()
            self.task = self.request.make_task()
        return self.task

    def cancelling(self):
        return 0 if self.task is None else self.task.cancelling()

    def uncancel(self):
        return 0 if self.task is None else self.task.uncancel()

    def done(self):
        return self.over if self.task is None else self.task.done()

    def cancel(self, msg=None):
        return False if self.over else self.real().cancel(msg)

    def get_coro(self):
        return self.coro

    def __getattr__(self, name):
        return getattr(self.real(), name)

    def __await__(self):
        return self.real().__await__()

    def __repr__(self):
        return f"<RequestTask {self.coro!r}>"


@cython.final
@cython.freelist(64)
cdef class Suspended:
    """A request's coroutine that goes on after its first step.

    As long as nobody wants a task of it, it is called by what it waits for. With an asyncio.Task,
    it is the coroutine that one drives, and yields once more what it had yielded already.
    """

    cdef Dispatcher dispatcher
    cdef IO io
    cdef object coro, task
    cdef object context    # its own; None: the one for all
    cdef Py_ssize_t place  # in the dispatcher's list
    cdef object future     # what it waits for, unless the Task has it
    cdef bint blocking     # it is to be awaited, as `await` says with its flag
    cdef bint due          # it waits for nothing but its turn
    cdef RequestTask kept  # by the handler: it is the current task in all its steps
    cdef bint over

    def __init__(self):
        raise TypeError("a Suspended comes from a Dispatcher")

    cdef int wait_for(self, object future) except -1:
        """The coroutine has yielded this outside of a Task."""
        if future is None:
            return 0
        self.future = future
        self.blocking = getattr(future, "_asyncio_future_blocking", False)
        if self.blocking:  # else others could not await it
            future._asyncio_future_blocking = False
        if self.task is not None:
            return 0
        if not self.calls_back():
            self.make_task()  # which knows what to do, or what to say
        else:
            future.add_done_callback(self, context=self.dispatcher.context)
        return 0

    cdef int suspend(self, object future) except -1:
        """Waits for what the coroutine has yielded, whatever that is."""
        cdef Dispatcher dispatcher = self.dispatcher
        cdef int64_t result
        if future is None and self.task is None:  # it goes on when all others have had their turn
            self.due = True
            dispatcher.due.append(self)
            return 0
        try:
            self.wait_for(future)
        except BaseException as raised:
            self.future = None
            # The step is over: there is no current task for the log to ask for its name.
            _leave_task(dispatcher.loop, dispatcher.current)
            result = dispatcher.failure(raised, self.io)
            _enter_task(dispatcher.loop, dispatcher.current)
            self.end(result)
        return 0

    cdef bint calls_back(self) except -1:
        return (
            self.blocking and isinstance(self.future, Future)
            and self.future.get_loop() is self.dispatcher.loop
        )

    def __call__(self, future):
        """What it waits for is done."""
        if self.task is None and self.future is future:
            self.future = None
            self.dispatcher.go_on_alone(self)

    cdef object make_task(self):
        if self.task is None:
            self.due = False
            if self.future is not None and self.calls_back():
                self.future.remove_done_callback(self)
            if self.context is None:
                self.context = PyContext_Copy(self.dispatcher.context)
            self.task = Task(
                self, loop=self.dispatcher.loop, name="ublk request", context=self.context
            )
        return self.task

    cdef int end(self, int64_t result) except -1:
        cdef Dispatcher dispatcher = self.dispatcher
        io = self.io
        self.over = True
        if self.kept is not None:
            self.kept.over = True
        self.task = self.kept = self.io = self.context = None
        dispatcher.forget(self)
        if not io.answered_otherwise(result, dispatcher.handlers.reporter):
            io.queue.answer_here(io, result)
        if not io.queue.turn_wanted:
            io.queue.turn_wanted = True
            if dispatcher.answered is not None:
                dispatcher.answered(io.queue)
        return 0

    # What a Task calls.

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
                return for_a_task(self.coro.throw(thrown))
            if PyIter_Send(self.coro, value, &given) == PYGEN_NEXT:
                return for_a_task(owned(given))
            result = self.dispatcher.result_of(owned(given), self.io)
        except StopIteration as done:
            result = self.dispatcher.result_of(done.value, self.io)
        except BaseException as raised:
            result = self.dispatcher.failure(raised, self.io)
        thrown = None
        self.end(result)
        raise StopIteration


ctypedef PyObject *(*UncheckedCoroutine)(Dispatcher, IO) noexcept  # NULL: it raised


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
    cdef list suspended
    cdef list due              # of these, what goes on in the loop's next turn
    cdef bint scheduled        # which the loop knows
    cdef RequestTask current
    cdef int references        # of `current`, when no handler keeps it

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
            self.begin_batch(queue)
            self.schedule()
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
                self.begin_batch(queue)
                if self.ready is None or len(self.ready):
                    self.schedule()
                elif self.due:  # the loop's next turn would be theirs alone
                    self._go_on_together()
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
        return [(<Suspended>each).coro for each in list(self.suspended)]

    def tasks(self):
        return [(<Suspended>each).make_task() for each in list(self.suspended)]

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
        self.current.serve(None, None)
        _leave_task(self.loop, self.current)
        return 0

    cdef object give_context(self):
        """The context for all is one request's from now on."""
        given, self.shared = self.shared, PyContext_Copy(self.context)
        return given

    cdef inline object own_context(self):
        """After a step in the context for all: None, unless it is one request's now."""
        if self.shared is self.entered and PyMapping_Size(self.entered) == 0:
            return None
        return self.change_context()

    cdef object change_context(self):
        context = self.entered
        if self.shared is context:
            self.give_context()
        PyContext_Exit(context)
        self.entered = self.shared
        PyContext_Enter(self.entered)
        return context

    cdef int begin_batch(self, Queue queue) except -1:
        self.enter()
        try:
            for i in range(queue.q.nr_ready):
                self.begin(queue.take(queue.q.ready[i]))
        finally:
            self.leave()
        return 0

    cdef int remember(self, Suspended request) except -1:
        request.place = len(self.suspended)
        self.suspended.append(request)
        return 0

    cdef int forget(self, Suspended request) except -1:
        """The last one takes its place; who looks meanwhile sees it twice, and misses none."""
        cdef Py_ssize_t end = len(self.suspended) - 1
        last = <Suspended>self.suspended[end]
        last.place = request.place
        self.suspended[last.place] = last
        self.suspended.pop()
        return 0

    cdef object coroutine_of(self, IO io):
        coro = self.handlers.call(io)
        return coro if PyCoro_CheckExact(coro) else awaiting(coro)

    cdef int begin(self, IO io) except -1:
        """The first step of a request, and its answer when there is no second one."""
        cdef PyObject *made
        cdef PyObject *given = NULL
        cdef int64_t result = 0
        cdef int step = PYGEN_ERROR
        coro = None
        self.current.serve(None, None)
        made = (<UncheckedCoroutine>Dispatcher.coroutine_of)(self, io)
        if made != NULL:
            coro = owned(made)
            self.current.coro = coro
            step = unchecked_send(coro, None, &given)
        if step != PYGEN_NEXT:
            result = self.result_of_step(step, given, io)
        context = self.own_context()
        if step == PYGEN_NEXT:
            request = self.current.request
            if request is None:
                request = self.new_suspended(io, coro)
            request.io = io
            request.context = context
            self.remember(request)
            self.let_go(request)
            request.suspend(owned(given))
        else:
            self.let_go(None)
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
        kept = request.kept
        if kept is None:
            self.current.serve(request.coro, request)
        else:
            _leave_task(self.loop, self.current)
            _enter_task(self.loop, kept)
        context = request.context
        if context is not None:
            PyContext_Enter(context)
        step = unchecked_send(request.coro, None, &given)
        if step != PYGEN_NEXT:
            result = self.result_of_step(step, given, request.io)
        if context is not None:
            PyContext_Exit(context)
        else:
            request.context = self.own_context()
        if kept is None:
            self.let_go(request)
        else:
            _leave_task(self.loop, kept)
            _enter_task(self.loop, self.current)
        if step == PYGEN_NEXT:
            request.suspend(owned(given))
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
        due, self.due = self.due, []
        self.enter()
        try:
            for each in due:
                request = <Suspended>each
                if not request.due:  # it has a Task now
                    continue
                request.due = False
                try:
                    self.go_on(request)
                except Exception as error:  # others are to go on
                    self.loop.call_exception_handler(
                        {"message": "a request was not answered", "exception": error}
                    )
        finally:
            self.leave()
        self.schedule()

    cdef inline bint is_kept(self) noexcept:
        """Whether a handler keeps the current task, or has made an asyncio.Task of it."""
        cdef int references = PU_REFERENCES(<PyObject *>self.current)
        if references == INT_MAX:  # no telling
            return True
        return references != self.references or self.current.task is not None

    cdef int let_go(self, Suspended request) except -1:
        """After a step: the current task stays with its request if somebody keeps it. `request`
        None: the request is over."""
        if not self.is_kept():
            return 0
        if request is not None:
            if request.context is None:  # a Task may be made of it in another one's step
                request.context = PyContext_Copy(self.context)
            request.kept = self.current
            self.current.request = request
        else:
            self.current.over = True
            if self.current.request is not None:
                self.current.request.over = True
        return self.replace()

    cdef int replace(self) except -1:
        _leave_task(self.loop, self.current)
        self.renew()
        return self.enter_task()

    cdef Suspended new_suspended(self, IO io, object coro):
        request = <Suspended>Suspended.__new__(Suspended)
        request.dispatcher = self
        request.io = io
        request.coro = coro
        return request

    cdef int64_t result_of_step(self, int step, PyObject *given, IO io) noexcept:
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
