"""Machines that stay: started once, given commands, stopped.

A process of its own, the keeper, holds each machine, and serves commands on a socket. What belongs
to a machine lies in a directory of its name, with a lock that the keeper has for as long as it
lives; so one that was killed is found out, and its machine is gone with it.
"""

import base64
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pyublk import launch
from pyublk.vm import attached
from pyublk.vm.errors import VMError, WrongUsage
from pyublk.vm.kernels import cache_directory
from pyublk.vm.machine import Machine

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
#: Seconds until a machine must be there: it is booted up to three times, a minute each.
_START = 240
#: Seconds until it must have ended: a guest that hangs is found out within 70.
_STOP = 90
_AGENT = Path(__file__).parent / "guest" / "agent.py"


@dataclass(frozen=True)
class Staying:
    """A machine that stays, or what one has left behind.

    Attributes:
        name: what it is called.
        alive: whether it is there; else its keeper has died.
        pid: of its keeper.
        release: its kernel's, once it has booted.
        since: when it was started, in seconds since 1970.
    """

    name: str
    alive: bool
    pid: int
    release: str
    since: float


def check_name(name: str) -> str:
    """Return a name that a machine can have.

    Raises:
        WrongUsage: it is none.
    """
    if not _NAME.fullmatch(name):
        raise WrongUsage(
            f"{name!r} is no name for a machine: up to 32 letters, digits, '_', '.' and '-'"
        )
    return name


def _place(name: str) -> Path:
    check_name(name)
    return cache_directory() / "machines" / name


def machines() -> list[Staying]:
    """Return every machine that stays, and those that have died without a stop."""
    places = sorted((cache_directory() / "machines").glob("*/lock"))
    return [found for lock in places if (found := _look(lock.parent.name)) is not None]


def _look(name: str) -> Staying | None:
    place = _place(name)
    try:
        with (place / "lock").open("rb") as lock:
            alive = not _try_lock(lock)
        told = json.loads((place / "about").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Staying(name, alive, told["pid"], told["release"], told["since"])


def _try_lock(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(name: str) -> Staying:
    found = _look(name)
    if found is None:
        raise VMError(f"there is no machine {name!r}: run 'pyublk vm start --name {name}'")
    if not found.alive:
        raise VMError(
            f"the machine {name!r} has died: its log is {_place(name) / 'log'}; "
            f"'pyublk vm start --name {name}' starts another"
        )
    return found


# ---- start and stop ----


def start(name: str, settings: Mapping[str, Any]) -> Staying:
    """Start a machine that stays.

    Args:
        name: what it is to be called.
        settings: the arguments of `Machine`, but `progress` and `refresh`.

    Raises:
        VMError: there is one of that name, or it did not start.
    """
    place = _place(name)
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (place / "lock").open("wb") as lock:
        if not _try_lock(lock):
            raise VMError(f"there is a machine {name!r} already")
        for left in ("socket", "about"):  # by one that has died
            (place / left).unlink(missing_ok=True)
        with (place / "log").open("wb") as log:
            keeper = subprocess.Popen(
                [sys.executable, "-m", __name__, name, str(lock.fileno()), json.dumps(settings)],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
    try:
        assert keeper.stdout is not None
        with keeper.stdout as told:
            ready = select.select([told], [], [], _START)[0] and told.readline()
        if ready:
            # It outlives this process; one that lives longer takes notice of its end.
            threading.Thread(target=keeper.wait, name="pyublk-vm", daemon=True).start()
            return _alive(name)
    except BaseException:
        keeper.kill()
        raise
    keeper.kill()
    keeper.wait()
    _, _, reason = (place / "log").read_text(errors="replace").rstrip().rpartition("pyublk vm: ")
    shutil.rmtree(place)
    raise VMError(reason or f"the machine {name!r} was not there within {_START} s")


def stop(name: str) -> bool:
    """Stop a machine, and remove what belongs to it; returns False for one that had died.

    Raises:
        VMError: there is none of that name.
    """
    found = _look(name)
    if found is None:
        raise VMError(f"there is no machine {name!r}")
    place = _place(name)
    with suppress(FileNotFoundError), (place / "lock").open("rb") as lock:
        for number, patience in ((signal.SIGTERM, _STOP), (signal.SIGKILL, 10)):
            if not found.alive:
                break
            with suppress(ProcessLookupError):
                os.kill(found.pid, number)  # it is the keeper's while that has the lock
            end = time.monotonic() + patience
            while not (free := _try_lock(lock)) and time.monotonic() < end:
                time.sleep(0.05)
            if free:
                break
    shutil.rmtree(place, ignore_errors=True)
    return found.alive


# ---- a command in it ----


def execute(name: str, argv: Sequence[str], *, env: Mapping[str, str]) -> int:
    """Run a command in a machine that stays, on this process's own standard streams.

    SIGINT is passed on to it.

    Returns:
        Its exit code; 126 or 127 when it could not be run or found, 128 + n when signal n ended it.

    Raises:
        VMError: there is no such machine, or it ended meanwhile.
    """
    if not argv:
        raise WrongUsage("no command was given")
    _alive(name)
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(_place(name) / "socket"))
        except OSError as error:
            raise VMError(f"the machine {name!r} does not answer: {error}") from error
        order = {"argv": list(argv), "cwd": str(Path.cwd()), "env": dict(env)}
        send = _Sender(connection)
        send(run=order)
        threading.Thread(target=_pass_input, args=(send,), daemon=True).start()
        with _interrupts_passed_on(send), connection.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "exit" in message:
                    return int(message["exit"])
                for stream, descriptor in (("out", 1), ("err", 2)):
                    if stream in message:
                        _write(descriptor, base64.b64decode(message[stream]))
    raise VMError(f"the machine {name!r} ended before the command did: see {_place(name) / 'log'}")


class _Sender:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def __call__(self, **message: Any) -> None:
        # When the machine is gone, who reads its answers finds out.
        with self._lock, suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")


def _pass_input(send: _Sender) -> None:
    with suppress(OSError):  # there is none
        while data := os.read(0, 1 << 15):
            send(**{"in": base64.b64encode(data).decode()})
    send(**{"in": None})


@contextmanager
def _interrupts_passed_on(send: _Sender) -> Iterator[None]:
    def handle(_number: int, _frame: object) -> None:
        # Not from here: the lock may be held by the code that this interrupts.
        threading.Thread(target=send, kwargs={"signal": int(signal.SIGINT)}).start()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


# ---- the keeper ----


class _Keeper:
    """Passes messages between the connections of clients and the agent in the machine."""

    def __init__(self, name: str) -> None:
        self._place = _place(name)
        self._clients: dict[int, _Sender] = {}
        self._next = 0
        self._to_agent_out, to_agent = os.pipe()
        from_agent, self._from_agent_in = os.pipe()
        self._to_agent = os.fdopen(to_agent, "wb", buffering=0)
        self._from_agent = os.fdopen(from_agent, "rb")
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._place / "socket"))
        self._listener.listen()

    def run(self, machine: Machine) -> int:
        """Keep the machine until the agent in it has ended."""
        signal.signal(signal.SIGTERM, self._end_agent)
        threading.Thread(target=self._hear_agent, daemon=True).start()
        done = machine.run(
            [sys.executable, str(_AGENT)],
            cwd="/",
            env=attached.environment(),
            stdin=self._to_agent_out,
            stdout=self._from_agent_in,
            stderr=2,
        )
        return done.returncode

    def _end_agent(self, _number: int, _frame: object) -> None:
        self._to_agent.close()  # it reads the end of its input

    def _hear_agent(self) -> None:
        for line in self._from_agent:
            message = json.loads(line)
            if "ready" in message:
                self._say_ready(message["ready"])
            elif (client := self._clients.get(message["id"])) is not None:
                client(**message)

    def _say_ready(self, release: str) -> None:
        about = {"pid": os.getpid(), "release": release, "since": time.time()}
        (self._place / "about").write_text(json.dumps(about))
        threading.Thread(target=self._accept, daemon=True).start()
        os.write(1, b"ready\n")

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self._next += 1
            arguments = (self._next, connection)
            threading.Thread(target=self._serve, args=arguments, daemon=True).start()

    def _serve(self, number: int, connection: socket.socket) -> None:
        self._clients[number] = _Sender(connection)
        with connection, connection.makefile("rb") as lines, suppress(OSError, ValueError):
            self._pass_on(number, lines)
        del self._clients[number]
        with suppress(OSError, ValueError):
            self._order({"id": number, "gone": True})

    def _pass_on(self, number: int, lines: BinaryIO) -> None:
        for line in lines:
            self._order({**json.loads(line), "id": number})

    def _order(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        with self._lock:
            while data:
                data = data[self._to_agent.write(data) :]


def main() -> int:
    """Run the keeper; returns its exit code."""
    launch.ctrl_c_interrupts()
    name, lock, settings = sys.argv[1:]
    os.set_inheritable(int(lock), False)  # the emulator may live a moment longer
    try:
        code = _Keeper(name).run(Machine(**json.loads(settings)))
    except VMError as error:
        return attached.report(error)  # the directory stays, with the log
    shutil.rmtree(_place(name), ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
