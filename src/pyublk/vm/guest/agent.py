"""The command of a machine that stays: runs others in it, several at once.

Lines of JSON on its standard input, each with the number of a command: `run` begins it, `in` is its
input in base64 (None: the end), `signal` is passed on, `gone` kills it. On the standard output:
`ready` first; then `out`, `err` and `exit`. It is a script for itself, and ends with its input.
"""

import base64
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
from contextlib import suppress

NOT_EXECUTABLE, NOT_FOUND = 126, 127

_jobs: "dict[int, subprocess.Popen[bytes]]" = {}
_inputs: "dict[int, queue.SimpleQueue[str | None]]" = {}
_lock = threading.Lock()


def tell(**message: object) -> None:
    """Send a line."""
    with _lock:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def look_again() -> None:
    """Let go of what the kernel remembers of the host's files: they may have changed since."""
    for _ in range(2):  # what lies above them is let go of first
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")


def begin(number: int, argv: list[str], cwd: str, env: dict[str, str]) -> None:
    """Start a command, and a thread that passes its output on."""
    look_again()
    pipe = subprocess.PIPE
    try:
        if not os.path.isdir(cwd):
            raise NotADirectoryError(f"there is no directory {cwd} in the machine")
        process = subprocess.Popen(
            argv, cwd=cwd, env=env, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
    except (OSError, ValueError) as error:
        told = f"pyublk vm: {argv[0]}: {error}\n".encode()
        tell(id=number, err=base64.b64encode(told).decode())
        tell(id=number, exit=NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE)
        return
    _jobs[number] = process
    _inputs[number] = queue.SimpleQueue()
    for run, more in ((serve, number), (feed, _inputs[number])):
        threading.Thread(target=run, args=(process, more), daemon=True).start()


def serve(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Pass the output on until the command has ended, whoever else still holds the pipes."""
    assert process.stdout is not None
    assert process.stderr is not None
    streams = {process.stdout.fileno(): "out", process.stderr.fileno(): "err"}
    ended = os.pidfd_open(process.pid)
    with selectors.DefaultSelector() as selector:
        for descriptor in (*streams, ended):
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)
        over = False
        while not over:
            for key, _ in selector.select():
                over |= key.fd == ended
            for descriptor, name in list(streams.items()):
                if not drain(number, descriptor, name):
                    selector.unregister(descriptor)
                    del streams[descriptor]
    os.close(ended)
    code = process.wait()
    del _jobs[number]
    _inputs.pop(number).put(None)
    process.stdout.close()
    process.stderr.close()
    tell(id=number, exit=128 - code if code < 0 else code)


def drain(number: int, descriptor: int, name: str) -> bool:
    """Pass on what there is; returns whether more may come."""
    while True:
        try:
            data = os.read(descriptor, 1 << 15)
        except BlockingIOError:
            return True
        if not data:
            return False
        tell(id=number, **{name: base64.b64encode(data).decode()})


def feed(process: "subprocess.Popen[bytes]", pieces: "queue.SimpleQueue[str | None]") -> None:
    """Pass the input on, as fast as the command reads it."""
    assert process.stdin is not None
    with suppress(OSError), process.stdin:  # it may close its input, or end
        while (piece := pieces.get()) is not None:
            process.stdin.write(base64.b64decode(piece))
            process.stdin.flush()


def kill(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to the command and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def main() -> None:
    """Obey until the input ends."""
    tell(ready=os.uname().release)
    for line in sys.stdin:
        message = json.loads(line)
        number = message["id"]
        if "run" in message:
            begin(number, **message["run"])
        elif (process := _jobs.get(number)) is not None:
            if "in" in message:
                _inputs[number].put(message["in"])
            else:
                kill(process, message.get("signal", signal.SIGKILL))
    for process in list(_jobs.values()):
        kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
