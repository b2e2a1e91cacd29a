"""Threads: their numbers, their names, and what those that serve queues ask of the kernel."""

def this_thread() -> int:
    """The calling thread's number. No other thread ever has it: idents go to new threads."""

def name_thread(name: str) -> None:
    """Gives the calling thread a name in the kernel, of which it keeps 15 bytes: what
    /proc/PID/task/*/comm and `ps -L` show."""

def become_io_flusher() -> None:
    """For each thread that serves requests but makes no queue, which does it too: memory that it
    allocates does not wait for dirty pages that only it can write (prctl(2), PR_SET_IO_FLUSHER).
    Without CAP_SYS_RESOURCE nothing happens."""
