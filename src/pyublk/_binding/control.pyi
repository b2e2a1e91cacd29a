"""The helper process: control commands, and what else may wait for a disk."""

from typing import Literal, Self, final

HELPER_PROGRAM: str

@final
class Helper:
    """This process's helper, which is started for the first of these and ends with the last. It
    issues control commands, and deletes guarded devices when this process ends without having done
    so. One that is killed is replaced. Commands need the `control_node`'s descriptor. Raises
    OSError where it cannot be started."""

    def __new__(cls, control_node: int = -1) -> Self: ...
    @property
    def pid(self) -> int:
        """Its process; 0 while it could not be replaced."""

    def control(
        self,
        command: int,
        device: int,
        *,
        queue: int = 0xFFFF,
        data: int = 0,
        payload: bytearray | None = None,
        path_length: int = 0,
        guarded: bool = False,
        memory: tuple[int, int, int, bool] | None = None,
        deadline: float = 30.0,
    ) -> tuple[Literal["ring", "enter", "command", "deadline"], int]:
        """Runs one command; `payload` is given to the kernel and rewritten with its answer.

        `memory`, for REG_BUF, is a file's (descriptor, offset, bytes, whether it is only read).
        Returns (stage, result): stage "ring", "enter" or "command" tells what `result` (0 or more,
        or -errno) is the result of; "deadline" that the command was given up, with result 1 when
        the kernel goes on with it all the same. Raises ChildProcessError when the helper was killed
        meanwhile.
        """

    def guard(
        self,
        device: int,
        cookie: int,
        guarded: bool,
        *,
        restarted: bool = False,
        memory: int = -1,
        hang_ms: int = 0,
        deadline: float,
    ) -> int:
        """Whether it deletes the device of that cookie when this process ends, or, if it is
        `restarted`, executes the program of `restart_by`, for which it holds the file `memory`. It
        kills this process when the disk has requests and answers none for `hang_ms` (0: never).
        0 or -errno."""

    def restart_by(self, program: int, *, deadline: float) -> int:
        """What it executes then: the file `program` has words, each ended by a 0: the command's, an
        empty one, the environment's. 0 or -errno."""

@final
class WriteInChild:
    """A text on its way to a file of sysfs, by the helper: some such files wait for a disk's
    requests, beyond the reach of signals. One that is dropped is called off."""

    def __init__(self, path: str, text: str) -> None: ...
    def finish(self, *, deadline: float) -> int | None:
        """Waits for its end. Returns 0 or -errno (-ECANCELED: the helper was killed), or None when
        the deadline passed: the kernel goes on as long as it must."""

def write_in_child(path: str, text: str, *, deadline: float) -> int | None:
    """A `WriteInChild`, finished."""

def open_private(path: str, flags: int) -> int:
    """As os.open, with O_CLOEXEC, for a `CharDevice`: a forked child lets go of it at once."""

def process() -> int:
    """This process, also after a fork, without a system call. What was made in another one is the
    parent's."""

def spawn_helpers_by(sock: int) -> None:
    """From now on another process, at the other end of `sock`, starts this one's helpers. It is
    sent what it calls `spawn_helper_for` with, and answers by an int32, the pid or -errno, and
    the pidfd. `sock` must stay open."""

def spawn_helper_for(sock: int, server: int) -> tuple[int, int]:
    """Starts the helper of another process, whose pidfd is `server`: returns the helper's pidfd and
    pid. Raises OSError."""
