# What a Dispatcher makes of a request: its current task, and what goes on after its first step.

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


@cython.final
cdef class RequestTask:
    """What asyncio.current_task() is in a handler: a task that is made only when it is needed.

    asyncio.timeout and asyncio.TaskGroup ask two things of the current task when they begin,
    answered here; all else makes an asyncio.Task, which drives the coroutine from then on. One of
    these serves request after request, unless a handler keeps it: then it stays that request's.
    """

    cdef Dispatcher dispatcher
    cdef object task
    cdef object coro        # None: it is not kept, and is of what the dispatcher steps
    cdef Suspended request  # None: likewise, or nobody wanted it of a request without a second step
    cdef bint over
    cdef object __weakref__

    def __init__(self):
        raise TypeError("a RequestTask comes from a Dispatcher")

    cdef object coroutine(self):
        return self.dispatcher.stepped() if self.coro is None else self.coro

    cdef object real(self):
        if self.task is None:
            request = self.request
            if request is None and self.coro is None:
                request = self.dispatcher.stepped_again()
            if request is None:
                request = self.dispatcher.new_suspended(self.coroutine())
                request.over = self.over
            if request.context is None:  # then this is in a step
                request.context = self.dispatcher.give_context()
            self.task = request.make_task()
            self.request = request
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
        return self.coroutine()

    def __getattr__(self, name):
        return getattr(self.real(), name)

    def __await__(self):
        return self.real().__await__()

    def __repr__(self):
        return f"<RequestTask {self.coroutine()!r}>"


@cython.final
@cython.trashcan(True)  # one that is over has the next one
cdef class Suspended:
    """A request's coroutine that goes on after its first step. Used again for another one's, unless
    somebody has kept it.

    As long as nobody wants a task of it, it is called by what it waits for. With an asyncio.Task,
    it is the coroutine that one drives, and yields once more what it had yielded already.
    """

    cdef Dispatcher dispatcher
    cdef IO io             # None: it is over, or still in its first step
    cdef object coro, task
    cdef object context    # its own; None: the one for all
    cdef Py_ssize_t place  # in the dispatcher's list; -1: not there
    cdef Suspended next    # of those that are over
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

    cdef inline int suspend(self, PyObject *given) except -1:
        """Waits for what the coroutine has yielded, whatever that is."""
        if given != <PyObject *>None or self.task is not None:
            return self.suspend_for(owned(given))
        Py_DECREF(None)
        self.due = True  # it goes on when all others have had their turn
        self.dispatcher.due.append(self)
        return 0

    cdef int suspend_for(self, object future) except -1:
        cdef Dispatcher dispatcher = self.dispatcher
        cdef int64_t result
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
        self.next = dispatcher.idle
        dispatcher.idle = self
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
