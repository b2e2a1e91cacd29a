# Control commands and the like by a child process, and the guardian of a device (_core/control.h).

cdef int await_child(pu_control *call, double deadline) except -1:
    """Whether the child ended in time; a signal's handler may raise meanwhile."""
    cdef int waited = 0
    cdef int slice_ms
    until = monotonic() + deadline
    while not waited:
        left = until - monotonic()
        if left <= 0:
            break
        slice_ms = <int>min(left * 1000 + 1, 100.0)
        with nogil:
            waited = pu_control_wait(call, slice_ms)
        if waited == -EINTR:
            waited = 0
        PyErr_CheckSignals()
    return waited != 0


def write_apart(path, text, *, double deadline):
    """Writes a text to a file of sysfs, from a child process: some such files wait for a disk's
    requests, beyond the reach of signals.

    Returns 0 or -errno (-ECANCELED: the child was killed), or None when the deadline passed: the
    child goes on as long as it must.
    """
    cdef pu_control call
    cdef bytes place = os.fsencode(path)
    cdef bytes content = os.fsencode(text)
    cdef int error = pu_control_begin_write(&call, place, content)
    cdef bint ended = False
    cdef int result
    if error < 0:
        return error
    try:
        ended = await_child(&call, deadline)
        result = call.reply.result
    finally:
        with nogil:
            pu_control_end(&call)
    if not ended:
        return None
    return -_errno.ECANCELED if result == PU_CONTROL_KILLED else result


def control(int fd, uint32_t command, uint32_t device, *, uint16_t queue=0xFFFF, uint64_t data=0,
            bytearray payload=None, uint16_t path_length=0, double deadline=30.0):
    """Runs one command; `payload` is given to the kernel and rewritten with its answer.

    Returns (stage, result): stage "ring", "enter" or "command" tells what `result` (0 or more, or
    -errno) is the result of; "deadline" that the command was given up, with result 1 when even
    its child process could not be ended.
    """
    cdef pu_ctrl_cmd cmd
    cdef pu_control call
    cdef bint ended = False
    cdef int stage, result
    cdef bint gone
    cdef size_t size = len(payload) if payload is not None else 0
    cdef const char *source = <const char *>payload if size else NULL
    memset(&cmd, 0, sizeof(cmd))
    cmd.dev_id = device
    cmd.queue_id = queue
    cmd.data = data
    cmd.dev_path_len = path_length
    cdef int error = pu_control_begin(&call, fd, command, &cmd, source, size)
    if error < 0:
        raise OSError(-error, f"no process for a control command: {os.strerror(-error)}")
    try:
        ended = await_child(&call, deadline)
        stage = call.reply.stage
        result = call.reply.result
        if ended and size:
            memcpy(<char *>payload, call.reply.buffer, size)
    finally:
        with nogil:
            gone = pu_control_end(&call)
    if not ended:
        return ("deadline", 0 if gone else 1)
    if result == PU_CONTROL_KILLED:
        raise ChildProcessError(
            ECHILD, "the process of a control command was killed before it told the outcome"
        )
    if stage == PU_CONTROL_DONE:
        return ("command", result)
    return ("ring" if stage == PU_CONTROL_RING else "enter", result)


cdef class Guard:
    """A child process that deletes a device when this process dies without doing so."""

    cdef int pidfd
    cdef readonly int pid

    def __init__(self, int control_fd, uint32_t device, uint64_t cookie):
        cdef int pid = 0
        cdef int pidfd = pu_guard_start(control_fd, device, cookie, &pid)
        if pidfd < 0:
            raise OSError(-pidfd, f"cannot start the guardian process: {os.strerror(-pidfd)}")
        self.pidfd = pidfd
        self.pid = pid

    def stop(self):
        if self.pid:
            pu_guard_stop(self.pidfd, self.pid)
            self.pid = 0
