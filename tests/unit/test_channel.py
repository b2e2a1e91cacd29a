"""The channel to a server: what it says to good and bad clients, and what lies in its place."""

import errno
import json
import os
import select
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyublk import errors
from pyublk.service import channel, listener, requests
from pyublk.service.channel import ChannelError, Client, is_abandoned
from pyublk.service.listener import Listener, Undoable

TIMEOUT = 20.0


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "3.sock"


Serve = Callable[..., Listener]


@pytest.fixture
def serve(place: Path) -> Iterator[Serve]:
    """A listener there whose requests are the functions that it is given."""
    with ExitStack() as made:

        def start(**functions: Callable[..., Any]) -> Listener:
            def answer(name: str, arguments: dict[str, Any], _: object) -> Any:
                return functions[name](**arguments)

            one = Listener()
            made.callback(one.close_all)
            one.open(place, sorted(functions), answer)
            return one

        yield start


def raw(place: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT)
    connection.connect(str(place))
    return connection


def talk(place: Path, *lines: bytes) -> list[dict[str, Any]]:
    """What is answered to these lines, the greeting first."""
    with raw(place) as connection, connection.makefile("rb") as answers:
        connection.sendall(b"".join(lines))
        return [json.loads(answers.readline()) for _ in range(len(lines) + 1)]


def test_a_client_is_greeted_and_answered_line_by_line(serve: Serve, place: Path) -> None:
    serve(double=lambda number: number * 2, hello=lambda: None)
    greeting, four, hello = talk(
        place,
        b'{"execute": "double", "arguments": {"number": 2}, "id": "a"}\n',
        b'{"execute": "hello"}\n',
    )
    assert greeting == {
        "pyublk": listener.version(),
        "protocol": 1,
        "capabilities": ["double", "hello"],
    }
    assert four == {"return": 4, "id": "a"}
    assert hello == {"return": None}
    with Client(place) as client:
        assert client.ask("double", number=3) == 6
        assert client.server_pid == os.getpid()


def test_a_server_knows_its_version_before_another_is_installed() -> None:
    listener.version.cache_clear()
    listening = Listener()
    until = time.monotonic() + TIMEOUT
    while not listener.version.cache_info().currsize and time.monotonic() < until:
        time.sleep(0.01)
    listening.close_all()
    assert listener.version.cache_info().currsize == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"nonsense\n", "the line is not JSON: "),
        (b"[" * 100_000 + b"\n", "the line is not JSON: "),
        (b"\xff\xfe\n", "the line is not JSON: "),
        (b"[]\n", 'a request is an object with "execute"'),
        (b'{"execute": 3}\n', 'a request is an object with "execute"'),
        (b'{"execute": "stay", "arguments": []}\n', '"arguments" is an object'),
        (b'{"execute": "stay", "now": 1}\n', 'has "execute", "arguments" and "id", and no \'now\''),
        (b'{"execute": "go"}\n', "there is no request 'go' here; there is: stay"),
    ],
)
def test_a_bad_request_is_told_why_and_the_next_one_is_answered(
    serve: Serve, place: Path, line: bytes, text: str
) -> None:
    serve(stay=lambda: "here")
    _, bad, good = talk(place, line, b'\n{"execute": "stay"}\n')
    assert bad["error"]["kind"] == "ValueError"
    assert text in bad["error"]["text"]
    assert good == {"return": "here"}


def test_a_line_that_is_too_long_ends_the_connection(serve: Serve, place: Path) -> None:
    serve(stay=lambda: "here")
    with raw(place) as connection, connection.makefile("rb") as answers:
        answers.readline()

        def send() -> None:
            try:
                connection.sendall(b"x" * (channel.LONGEST_REQUEST + (1 << 17)))
            except OSError:  # it was sent away in the middle
                return

        sender = threading.Thread(target=send)
        sender.start()
        answer = json.loads(answers.readline())
        sender.join(TIMEOUT)
    assert answer["error"]["text"] == "a line has at most 1048576 bytes"
    with Client(place) as client:
        assert client.ask("stay") == "here"


def test_failures_are_raised_again_at_the_client(serve: Serve, place: Path) -> None:
    def fail(kind: str) -> None:
        if kind == "os":
            raise OSError(errno.ENOSPC, "the disk is full")
        if kind == "closed":
            raise errors.DeviceClosed("it is over")
        raise TimeoutError("too late")

    serve(fail=fail, odd=lambda: object())
    with Client(place) as client:
        with pytest.raises(OSError, match="the disk is full") as caught:
            client.ask("fail", kind="os")
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(errors.DeviceClosed, match="it is over"):
            client.ask("fail", kind="closed")
        with pytest.raises(TimeoutError, match="too late"):
            client.ask("fail", kind="late")
        with pytest.raises(Exception, match="not JSON serializable"):
            client.ask("odd")


def test_one_request_holds_up_no_other(serve: Serve, place: Path) -> None:
    go_on = threading.Event()
    serve(hang=lambda: go_on.wait(TIMEOUT), stay=lambda: "here")
    with Client(place) as patient, Client(place) as other:
        with pytest.raises(ChannelError, match=r"did not answer within 0\.1 s"):
            patient.ask("hang", timeout=0.1)
        assert other.ask("stay") == "here"
        go_on.set()


def test_idle_clients_give_way_to_new_ones(serve: Serve, place: Path) -> None:
    serve(stay=lambda: "here")
    with ExitStack() as held:
        first = held.enter_context(raw(place))
        assert first.recv(4096)
        for _ in range(listener.MOST_CLIENTS - 1):
            assert held.enter_context(raw(place)).recv(4096)
        with Client(place) as client:
            assert client.ask("stay") == "here"
        assert first.recv(1) == b""


def test_a_client_that_takes_no_answers_is_sent_away(
    serve: Serve, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "SLOW", 0.2)
    one = serve(much=lambda: "x" * (1 << 20))
    with raw(place) as connection:
        connection.sendall(b'{"execute": "much"}\n' * 16)
        until = time.monotonic() + TIMEOUT
        while one._clients and time.monotonic() < until:
            time.sleep(0.01)
        assert not one._clients


def test_what_cannot_be_told_is_undone(serve: Serve, place: Path) -> None:
    begun, undone, go_on = threading.Event(), threading.Event(), threading.Event()

    def make() -> Undoable:
        begun.set()
        assert go_on.wait(TIMEOUT)
        return Undoable("made", undone.set)

    serve(make=make)
    with raw(place) as connection:
        connection.sendall(b'{"execute": "make"}\n')
        assert begun.wait(TIMEOUT)
    go_on.set()
    assert undone.wait(TIMEOUT)
    undone.clear()
    with Client(place) as client:
        assert client.ask("make") == "made"
    assert not undone.is_set()


def test_its_end_waits_for_nobody_and_leaves_nothing(serve: Serve, place: Path) -> None:
    hangs = threading.Event()
    one = serve(hang=lambda: hangs.wait(TIMEOUT))
    with raw(place) as asking, raw(place) as idle:
        asking.sendall(b'{"execute": "hang"}\n')
        assert asking.recv(4096)
        assert idle.recv(4096)
        began = time.monotonic()
        one.close_all()
        assert time.monotonic() - began < 10
        assert idle.recv(1) == b""
    hangs.set()
    assert not place.exists()
    with pytest.raises(ChannelError, match="nobody listens at"):
        Client(place)


def test_only_its_owner_can_use_it_and_what_lies_there_is_replaced(
    serve: Serve, place: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    place.symlink_to(victim)
    one = serve(stay=lambda: "here")
    assert stat.S_ISSOCK(place.lstat().st_mode)
    assert stat.S_IMODE(place.lstat().st_mode) == 0o600
    assert victim.read_text() == "kept"
    place.unlink()
    place.write_text("another's")
    one.close(place)
    assert place.read_text() == "another's"


def test_no_link_is_followed_to_a_socket(serve: Serve, place: Path, tmp_path: Path) -> None:
    serve(stay=lambda: "here")
    (tmp_path / "4.sock").symlink_to(place)
    (tmp_path / "5.sock").write_text("")
    for name, said in (("4", "it is not a socket"), ("5", "it is not a socket")):
        with pytest.raises(ChannelError, match=said):
            Client(tmp_path / f"{name}.sock")


def test_a_name_may_be_longer_than_a_sockets(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 40)
    folder.mkdir()
    one = Listener()
    one.open(folder / "3.sock", ["stay"], lambda _name, _arguments, _conversation: "here")
    try:
        with Client(folder / "3.sock") as client:
            assert client.ask("stay") == "here"
    finally:
        one.close_all()


def test_the_socket_of_a_server_that_was_killed_is_known_as_such(place: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from pyublk.service import channel\n"
        "held = channel.listen(pathlib.Path(sys.argv[1]))\n"
        "print('there', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        assert not is_abandoned(place)
        with pytest.raises(ChannelError, match="did not answer within"):
            Client(place, timeout=0.2)
        server.kill()
        server.wait()
    assert is_abandoned(place)
    with pytest.raises(ChannelError, match="nobody listens"):
        Client(place)


def test_what_is_no_server_of_ours_is_told(place: Path) -> None:
    for said, message in (
        (b"hello\n", "does not speak this protocol"),
        (b"", "ended before it answered"),
    ):
        listening = channel.listen(place)

        def speak(listening: socket.socket = listening, said: bytes = said) -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(said)

        speaker = threading.Thread(target=speak)
        speaker.start()
        with pytest.raises(ChannelError, match=message):
            Client(place)
        speaker.join(TIMEOUT)
        listening.close()


def test_arguments_are_those_of_the_function() -> None:
    seen = []

    def probe(disk: object, size: int, name: str | None = None) -> None:
        seen.append((disk, size, name))

    requests.REQUESTS["probe"] = probe
    disk: Any = object()
    conversation: Any = None
    try:
        requests.call(disk, "probe", {"size": 1, "name": None}, conversation)
        for arguments, text in (
            ({}, "probe needs 'size'"),
            ({"size": 1, "colour": 2}, "probe has no argument 'colour'; it takes size, name"),
            ({"size": True}, "size of probe must be a whole number"),
            ({"size": 1, "name": 2}, "name of probe must be a text or null"),
        ):
            with pytest.raises(ValueError, match=text):
                requests.call(disk, "probe", arguments, conversation)
    finally:
        del requests.REQUESTS["probe"]
    assert seen == [(disk, 1, None)]


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "x" * 65, "a b"])
def test_a_servers_name_is_one_of_a_file(name: str) -> None:
    with pytest.raises(ValueError, match="is not a server's name: use 1 to 64 letters"):
        channel.check_server_name(name)


def test_a_socket_that_changes_hands(
    place: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server before has closed it, and the next one is on record: that one is asked."""

    class Now(SimpleNamespace):
        def read(self, _device: int) -> SimpleNamespace:
            serve(stay=lambda: "here")
            return next_one

    before = SimpleNamespace(id=3, cookie=5, path="/dev/ublkb3", server=SimpleNamespace(pid=1))
    next_one = SimpleNamespace(**vars(before) | {"server": SimpleNamespace(pid=os.getpid())})
    monkeypatch.setattr(channel, "socket_place", lambda _device: place)
    monkeypatch.setattr(channel, "Record", Now())
    assert channel.ask(cast(Any, before), "stay") == "here"


@pytest.mark.parametrize("greets", [False, True])
def test_a_server_that_hands_over_before_it_reads(
    place: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, greets: bool
) -> None:
    """It closes the socket of a client that it has not taken, or has not read from after the
    greeting; that one asks the next server."""
    one = SimpleNamespace(
        id=3, cookie=5, path="/dev/ublkb3", server=SimpleNamespace(pid=os.getpid())
    )
    monkeypatch.setattr(channel, "socket_place", lambda _device: place)
    monkeypatch.setattr(channel, "Record", SimpleNamespace(read=lambda _device: one))
    with socket.socket(socket.AF_UNIX) as before:
        before.bind(str(place))
        before.listen()
        asking = threading.Thread(target=lambda: said.append(channel.ask(cast(Any, one), "stay")))
        said: list[Any] = []
        asking.start()
        assert select.select([before], [], [], TIMEOUT)[0]  # it waits to be taken
        if greets:
            with before.accept()[0] as taken:
                taken.sendall(b'{"pyublk": "0.1.0", "protocol": 1, "capabilities": []}\n')
                assert select.select([taken], [], [], TIMEOUT)[0]  # it has asked
                serve(stay=lambda: "here")
        else:
            serve(stay=lambda: "here")
    asking.join(TIMEOUT)
    assert said == ["here"]


def test_a_server_that_has_ended_and_no_other(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = SimpleNamespace(id=3, cookie=5, path="/dev/ublkb3", server=SimpleNamespace(pid=1))
    monkeypatch.setattr(channel, "socket_place", lambda _device: place)
    monkeypatch.setattr(channel, "Record", SimpleNamespace(read=lambda _device: one))
    with pytest.raises(ChannelError, match="nobody listens"):
        channel.ask(cast(Any, one), "stay")
