# The helper process: control commands, and what else may wait for a disk (_core/control.h).

HELPER_PROGRAM = os.path.join(os.path.dirname(os.path.abspath(errors.__file__)), "pyublk-helper")


cdef int await_helper(pu_control *call, double deadline) except -1:
    """Whether it ended in time; a signal's handler may raise meanwhile."""
    cdef int ended = 0
    cdef int slice_ms
    until = monotonic() + deadline
    while not ended:
        left = until - monotonic()
        if left <= 0:
            break
        slice_ms = <int>min(left * 1000 + 1, 100.0)
        with nogil:
            ended = pu_control_wait(call, slice_ms)
        PyErr_CheckSignals()
    return ended


cdef class Helper:
    """This process's helper, which is started for the first of these and ends with the last."""

    cdef pu_helper *helper
    cdef int process

    def __cinit__(self, int control_node=-1):
        cdef bytes program = os.fsencode(HELPER_PROGRAM)
        cdef const char *where = program
        cdef int error
        self.process = pu_process()
        with nogil:
            error = pu_helper_get(&self.helper, where, control_node)
        if error < 0:
            raise errors.helper_error(-error, HELPER_PROGRAM)

    def __dealloc__(self):
        if self.helper is not NULL:
            with nogil:
                pu_helper_put(self.helper)

    @property
    def pid(self):
        return pu_helper_pid(self.ours())

    cdef pu_helper *ours(self) except NULL:
        if not pu_helper_is_ours(self.helper):
            raise errors.forked_error(self.process)
        return self.helper

    cdef object ask(self, pu_ask *ask, bytearray payload, int memory, double deadline):
        """(stage, result), or None when the deadline passed, or False when even then it goes on."""
        cdef pu_control call
        cdef pu_helper *helper = self.ours()
        cdef size_t size = len(payload)
        cdef const char *source = payload
        cdef bint ended = False, gone
        cdef int stage = 0, result = 0
        cdef int error
        with nogil:
            error = pu_control_begin(&call, helper, ask, source, size, memory)
        if error < 0:
            raise errors.helper_error(-error, HELPER_PROGRAM)
        try:
            ended = await_helper(&call, deadline)
            stage = call.stage
            result = call.result
            if ended and ask.kind == PU_ASK_COMMAND:
                memcpy(<char *>payload, call.buffer, size)
        finally:
            with nogil:
                gone = pu_control_end(&call)
        if not ended:
            return None if gone else False
        return stage, result

    def control(self, uint32_t command, uint32_t device, *, uint16_t queue=0xFFFF,
                uint64_t data=0, bytearray payload=None, uint16_t path_length=0,
                bint guarded=False, memory=None, double deadline=30.0):
        cdef pu_ask ask
        cdef int file = -1
        memset(&ask, 0, sizeof(ask))
        ask.kind = PU_ASK_COMMAND
        ask.cmd_op = command
        ask.cmd.dev_id = device
        ask.cmd.queue_id = queue
        ask.cmd.data = data
        ask.cmd.dev_path_len = path_length
        if guarded:
            ask.flags |= PU_ASK_GUARDED
        if memory is not None:
            file, ask.file_offset, ask.file_bytes, read_only = memory
            ask.flags |= PU_ASK_MEMORY | (PU_ASK_READ_ONLY if read_only else 0)
        outcome = self.ask(&ask, bytearray() if payload is None else payload, file, deadline)
        if not outcome:
            return ("deadline", 0 if outcome is None else 1)
        stage, result = outcome
        if result == PU_CONTROL_KILLED:
            raise ChildProcessError(
                ECHILD, "the process of a control command was killed before it told the outcome"
            )
        if stage == PU_CONTROL_RING:
            return ("ring", result)
        return ("enter" if stage == PU_CONTROL_SUBMIT else "command", result)

    def guard(self, uint32_t device, uint64_t cookie, bint guarded, *, bint restarted=False,
              int memory=-1, uint32_t hang_ms=0, double deadline):
        cdef pu_ask ask
        memset(&ask, 0, sizeof(ask))
        ask.kind = PU_ASK_GUARD if guarded else PU_ASK_UNGUARD
        ask.cmd.dev_id = device
        ask.cookie = cookie
        ask.hang_ms = hang_ms
        if restarted:
            ask.flags |= PU_ASK_RESTARTED
        if memory >= 0:
            ask.flags |= PU_ASK_MEMORY
        return self.told(&ask, memory, deadline)

    def restart_by(self, int program, *, double deadline):
        cdef pu_ask ask
        memset(&ask, 0, sizeof(ask))
        ask.kind = PU_ASK_PROGRAM
        return self.told(&ask, program, deadline)

    cdef object told(self, pu_ask *ask, int file, double deadline):
        """0 or -errno, of what the helper only takes note of."""
        outcome = self.ask(ask, bytearray(), file, deadline)
        if not outcome:
            return -_errno.ETIMEDOUT
        _, result = outcome
        return -_errno.ECHILD if result == PU_CONTROL_KILLED else result


@cython.final
@cython.no_gc_clear
cdef class WriteInChild:
    """A text on its way to a file, by the helper."""

    cdef Helper helper
    cdef pu_control call
    cdef bint under_way
    cdef object result

    def __init__(self, path, text):
        cdef pu_ask ask
        cdef bytes words = os.fsencode(path) + b"\0" + os.fsencode(text) + b"\0"
        cdef const char *source = words
        cdef size_t size = len(words)
        cdef int error
        if self.helper is not None:
            raise RuntimeError("this write is under way already")
        self.helper = Helper()
        memset(&ask, 0, sizeof(ask))
        ask.kind = PU_ASK_WRITE
        with nogil:
            error = pu_control_begin(&self.call, self.helper.helper, &ask, source, size, -1)
        if error < 0:
            raise errors.helper_error(-error, HELPER_PROGRAM)
        self.under_way = True

    def __dealloc__(self):
        self.end()

    cdef bint end(self) noexcept:
        """Calls it off, unless it has ended. Whether it has."""
        cdef bint ended
        if not self.under_way or not pu_helper_is_ours(self.helper.helper):
            return True
        self.under_way = False
        with nogil:
            ended = pu_control_end(&self.call)
        return ended

    def finish(self, *, double deadline):
        if self.under_way:
            try:
                if await_helper(&self.call, deadline):
                    killed = self.call.result == PU_CONTROL_KILLED
                    self.result = -_errno.ECANCELED if killed else self.call.result
            finally:
                self.end()
        return self.result


def write_in_child(path, text, *, double deadline):
    return WriteInChild(path, text).finish(deadline=deadline)


cdef void helper_was_killed(int pid) noexcept nogil:
    Py_AddPendingCall(tell_of_killed_helper, <void *><intptr_t>pid)


cdef int tell_of_killed_helper(void *number) noexcept:
    """On the main thread, when it runs Python next: the core's thread is none of Python's."""
    cdef int pid = <int><intptr_t>number
    try:
        if pid > 0:
            helper_log.warning("the helper process was killed; process %d takes its place", pid)
        else:
            helper_log.error(
                "the helper process was killed, and another cannot be started (%s): disks are not "
                "deleted when this process is killed", os.strerror(-pid)
            )
    except Exception:
        pass  # a handler of the log's, of which nobody here could be told
    return 0


helper_log = logging.getLogger("pyublk.helper")
pu_helper_tell(helper_was_killed)


@atexit.register
def _ignore_killed_helper():
    """An interpreter that ends has no use for the news, nor a place for it."""
    pu_helper_tell(NULL)


# The helpers of a process that has given up root's rights are started by another one.

def spawn_helpers_by(int sock):
    pu_spawn_by(sock)


def spawn_helper_for(int sock, int server):
    cdef bytes program = os.fsencode(HELPER_PROGRAM)
    cdef const char *where = program
    cdef int pidfd, pid, error
    with nogil:
        error = pu_spawn_helper_for(where, sock, server, &pidfd, &pid)
    if error < 0:
        raise errors.helper_error(-error, HELPER_PROGRAM)
    return pidfd, pid


# Descriptors that a forked child must not keep.

def open_private(path, int flags):
    cdef bytes place = os.fsencode(path)
    cdef const char *where = place
    cdef int fd
    with nogil:
        pu_fork_hold()
        fd = pu_fork_add(pu_fd_high(c_open(where, flags | O_CLOEXEC)))
        error = errno
        pu_fork_release()
    if fd < 0:
        raise OSError(error, os.strerror(error), path)
    return fd


cdef int dup_private(int fd) except -1:
    cdef int copy
    with nogil:
        pu_fork_hold()
        copy = pu_fork_add(pu_fd_high(fcntl(fd, F_DUPFD_CLOEXEC, 0)))
        error = errno
        pu_fork_release()
    if copy < 0:
        raise OSError(error, os.strerror(error))
    return copy


def process():
    return pu_process()
