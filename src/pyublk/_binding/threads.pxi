# Threads: their numbers, their names, and what those that serve queues ask of the kernel.

def this_thread():
    """A number that no other thread ever has."""
    return pu_this_thread()


def name_thread(name):
    cdef bytes text = os.fsencode(name)
    cdef const char *chars = text
    prctl(PR_SET_NAME, chars)


def become_io_flusher():
    pu_io_flusher()
