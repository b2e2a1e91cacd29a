"""What can be asked of a disk's server while it serves, and servers of several disks."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from blocks import Blocks
from command_line import COMMAND, added, run_here
from needs import Program, needs
from servers import end_recorded_servers, helpers_of, until

import pyublk
from pyublk.cli.failures import ExitCode
from pyublk.service import channel
from pyublk.service.channel import ChannelError, Client, server_place
from pyublk.service.records import Record, run_directory, socket_place
from pyublk.uapi import Feature

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
PAGE = Path(__file__).parents[2] / "docs" / "channel.md"

TARGETS = """\
import os
import threading

import pyublk


class Says(pyublk.Target):
    def __init__(self, what: str = "nothing"):
        super().__init__(size=1 << 20, read_only=True)
        self.what = what.encode()

    def read(self, offset, buffer):
        buffer[:] = self.what.ljust(len(buffer), b".")

    def status(self):
        return {"says": self.what.decode()}


class HangsAt(Says):
    def __init__(self, place: int, told: str):
        super().__init__("never")
        self.place, self.told = place, os.path.abspath(told)

    def read(self, offset, buffer):
        if offset == self.place:
            with open(self.told, "w") as pipe:
                pipe.write("hanging")
            threading.Event().wait()
        super().read(offset, buffer)


class Fails(Says):
    def open(self):
        raise PermissionError(13, "the vault is closed")


class SlowToOpen(Says):
    def __init__(self, told: str, go_on: str):
        super().__init__("late")
        self.told, self.go_on = os.path.abspath(told), os.path.abspath(go_on)

    def open(self):
        with open(self.told, "w") as pipe:
            pipe.write("opening")
        with open(self.go_on) as pipe:
            pipe.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the classes above and a run directory; no server outlives the test."""
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disks.py").write_text(TARGETS)
    yield tmp_path
    end_recorded_servers()


def left() -> list[str]:
    return sorted(path.name for path in run_directory().iterdir())


def asked(disk: dict[str, Any], request: str, **arguments: Any) -> Any:
    record = Record.read(disk["id"])
    assert record is not None
    return channel.ask(record, request, **arguments)


def stopped(*disks: dict[str, Any]) -> None:
    done = run_here("stop", *(str(disk["id"]) for disk in disks))
    assert done.exit_code == 0, done.output


Exchange = tuple[dict[str, Any], dict[str, Any]]


def conversations() -> list[list[Exchange]]:
    """The requests of the page with their answers, those of a block on one connection; without
    `hand_over`, which `test_upgrade` has."""
    found = []
    for block in re.findall(r"^```text\n(-> .*?)^```", PAGE.read_text(), re.M | re.S):
        exchanges = [one.split("\n<- ") for one in block.removeprefix("-> ").split("\n-> ")]
        if '"hand_over"' not in block:
            found.append([(json.loads(sent), json.loads(got)) for sent, got in exchanges])
    return found


def same_shape(shown: object, found: object, where: str = "answer") -> None:
    """The same fields, with values of the same types; texts of errors are the same."""
    if isinstance(shown, dict):
        assert isinstance(found, dict), where
        if "threads" not in where:
            assert shown.keys() == found.keys(), where
        for name in shown.keys() & found.keys():
            same_shape(shown[name], found[name], f"{where}.{name}")
    elif where.endswith(".buckets"):  # as many as there happen to be
        assert isinstance(found, list), where
        assert all(list(map(type, bucket)) == [int, int] for bucket in found), where
    elif isinstance(shown, list):
        assert isinstance(found, list), where
        for one, other in zip(shown, found, strict=True):
            same_shape(one, other, f"{where}[]")
    elif where.rpartition(".")[2] in ("text", "kind", "target", "path"):
        assert shown == found, where
    else:
        assert type(shown) is type(found), where


def test_every_request_of_the_page_is_answered_as_shown(
    place: Path, controller: pyublk.Controller
) -> None:
    for name in ("a.img", "b.img", "spare.img", "source.img"):
        (place / name).write_bytes(bytes(MIB))
    disk = added("mirror", "a.img", "b.img", "--id", "0", "--path", "copy")
    cached = added("cache", "cache", "source.img", "--option", "mode=write-back")
    until(lambda: asked(disk, "status")["target_status"]["progress"] == 1.0)
    os.truncate(place / "a.img", 0)
    with Blocks(disk["path"]) as blocks:
        assert blocks.read(4096, 0) == bytes(4096)
    until(lambda: asked(disk, "status")["target_status"]["legs"][0]["state"] == "failed")
    seen = set()
    for conversation in conversations():
        name = conversation[0][0]["execute"]
        if name == "resize" and not controller.features().has(Feature.UPDATE_SIZE):
            continue
        if name == "resize" and "error" not in conversation[0][1]:
            until(lambda: asked(disk, "status")["target_status"]["legs"][0]["state"] == "synced")
        seen.add(name)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(socket_place(cached["id"] if name == "cache" else 0)))
            with connection.makefile() as lines:
                greeting = json.loads(lines.readline())
                for request, shown in conversation:
                    line = json.dumps(request)
                    for directory in ("/srv", "/var/tmp"):
                        line = line.replace(directory, str(place))
                    connection.sendall(line.encode() + b"\n")
                    answer = lines.readline().replace(str(place), "/srv")
                    same_shape(shown, json.loads(answer), request["execute"])
    assert seen - {"fly"} >= set(greeting["capabilities"]) - {"resize", "hand_over"}
    assert run_here("stop", str(cached["id"])).exit_code == 0
    until(lambda: left() == [])


@pytest.mark.thorough
def test_socat_is_enough(place: Path) -> None:
    needs(Program("socat"))
    disk = added("null", "--size", "1M")
    (command,) = re.findall(r"^# (echo .*socat.*)$", PAGE.read_text(), re.M)
    command = command.replace("/run/pyublk/0.sock", str(socket_place(disk["id"])))
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=60, check=True
    )
    greeting, answer = map(json.loads, done.stdout.splitlines())
    assert greeting["protocol"] == 1
    assert answer["return"]["total"]["errors"] == 0
    stopped(disk)


@contextmanager
def hanging_reader(disk: dict[str, Any]) -> Iterator[None]:
    """A client whose read hangs in a `HangsAt` that tells by `told`, until the disk is stopped."""

    def read() -> None:
        with Blocks(disk["path"], os.O_RDONLY) as blocks:
            try:
                blocks.read(4096, MIB // 2)
            except OSError:
                return

    reader = threading.Thread(target=read)
    reader.start()
    assert Path("told").read_text() == "hanging"
    yield
    reader.join(60)


def test_it_answers_while_every_handler_hangs(place: Path) -> None:
    os.mkfifo("told")
    disk = added("disks.py:HangsAt", "-o", f"place={MIB // 2}", "-o", "told=told")

    with hanging_reader(disk):
        told = asked(disk, "status")
        assert (told["state"], told["target_status"]) == ("live", {"says": "never"})
        assert asked(disk, "stats")["total"]["reads"] >= 1
        (info,) = json.loads(run_here("info", str(disk["id"]), "--json").stdout)
        assert info["status"] == {"says": "never"}
        (thread,) = info["threads"].values()
        assert Path(f"/proc/{disk['server_pid']}/task/{thread}").exists()
        done = run_here("stop", "--force", str(disk["id"]))
        assert "never returned" in done.output or "ended with an error" in done.output


def test_a_server_that_is_held_is_told_as_silent_and_one_that_is_killed_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyublk.service.inventory.PATIENCE", 0.5)
    disk = added("null", "--size", "1M", "--no-restart")
    os.kill(disk["server_pid"], signal.SIGSTOP)
    try:
        done = run_here("info", str(disk["id"]))
        assert done.exit_code == 0
        assert re.search(r"status +unknown: the server behind .* did not answer", done.stdout)
    finally:
        os.kill(disk["server_pid"], signal.SIGKILL)
    with pyublk.Controller() as controller:
        until(lambda: not list(controller.devices()))
    assert f"{disk['id']}.sock" in left()
    with pytest.raises(ChannelError, match="nobody listens at"):
        Client(socket_place(disk["id"]))
    assert run_here("doctor", "--repair").exit_code in (0, 1)
    assert left() == []


@pytest.mark.thorough
def test_a_server_without_a_channel_serves_all_the_same(place: Path) -> None:
    """As one of an older version does."""
    disk = added("null", "--size", "1M")
    socket_place(disk["id"]).unlink()
    done = run_here("info", str(disk["id"]))
    assert done.exit_code == 0
    assert "unknown: nobody listens at" in done.stdout
    done = run_here("stats", str(disk["id"]))
    assert done.exit_code == ExitCode.FAILED
    assert "nobody listens at" in done.stderr
    stopped(disk)


@pytest.mark.thorough
def test_another_process_that_listens_there_is_not_believed(place: Path) -> None:
    disk = added("null", "--size", "1M")
    listening = channel.listen(socket_place(disk["id"]))

    def greet() -> None:
        with suppress(OSError):  # until it is shut down
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(b'{"pyublk": "0"}\n')

    greeter = threading.Thread(target=greet)
    greeter.start()
    record = Record.read(disk["id"])
    assert record is not None
    with pytest.raises(ChannelError, match=f"belongs to process {os.getpid()}, and"):
        channel.ask(record, "stats")
    listening.shutdown(socket.SHUT_RDWR)
    greeter.join(30)
    listening.close()
    stopped(disk)


def test_counters_are_printed(place: Path) -> None:
    disk = added("disks.py:Says", "--queues", "2")
    with Blocks(disk["path"], os.O_RDONLY) as blocks:
        for _ in range(5):
            blocks.read(4096, 0)
    done = run_here("stats", str(disk["id"]))
    assert done.exit_code == 0, done.output
    assert re.search(r"^COUNTER +TOTAL +QUEUE 0 +QUEUE 1$", done.stdout, re.M)
    told = json.loads(run_here("stats", str(disk["id"]), "--json").stdout)
    assert told["total"]["reads"] >= 5
    assert len(told["queues"]) == 2
    stopped(disk)


def test_resize_by_the_command(place: Path, controller: pyublk.Controller) -> None:
    disk = added("file", "disk.img", "--size", "1M")
    number = str(disk["id"])
    if not controller.features().has(Feature.UPDATE_SIZE):
        done = run_here("resize", number, "2M")
        assert done.exit_code == ExitCode.FAILED
        assert "older than Linux 6.16" in done.stderr
        assert Path("disk.img").stat().st_size == MIB
        stopped(disk)
        return
    done = run_here("resize", number, "2M")
    assert (done.exit_code, done.stdout) == (0, f"{disk['path']} now has 2MiB\n")
    assert Path("disk.img").stat().st_size == 2 * MIB
    assert json.loads(run_here("list", "--json").stdout)[0]["size"] == 2 * MIB
    (info,) = json.loads(run_here("info", number, "--json").stdout)
    assert info["plan"]["disk"]["size"] == 2 * MIB
    done = run_here("resize", number, "1M")
    assert done.exit_code == ExitCode.USAGE
    assert "loses the data beyond" in done.stderr
    assert run_here("resize", number, "1M", "--shrink").exit_code == 0
    assert Path("disk.img").stat().st_size == MIB
    assert run_here("resize", number, "1000").exit_code == ExitCode.USAGE
    stopped(disk)


def test_a_leg_is_replaced_by_the_command(place: Path) -> None:
    for name in ("a.img", "b.img", "spare.img"):
        (place / name).write_bytes(bytes(MIB))
    disk = added("mirror", "a.img", "b.img")
    number = str(disk["id"])

    def states() -> list[str]:
        (info,) = json.loads(run_here("info", number, "--json").stdout)
        return [leg["state"] for leg in info["status"]["legs"]]

    until(lambda: states() == ["synced", "synced"])
    done = run_here("replace", number, "0")
    assert done.exit_code == ExitCode.USAGE
    assert "has not failed" in done.stderr
    os.truncate("a.img", 0)
    with Blocks(disk["path"]) as blocks:
        blocks.read(4096, 0)
    until(lambda: states() == ["failed", "synced"])
    done = run_here("replace", number, "0", "spare.img")  # relative, to where the command is
    assert done.exit_code == 0, done.output
    assert str(place / "spare.img") in done.stdout
    until(lambda: states() == ["synced", "synced"])
    stopped(disk)


@pytest.mark.thorough
def test_only_a_mirror_has_legs(place: Path) -> None:
    disk = added("null", "--size", "1M")
    done = run_here("replace", str(disk["id"]), "0")
    assert done.exit_code == ExitCode.USAGE
    assert "is not a mirror: only a mirror has legs" in done.stderr
    stopped(disk)


def test_logs_are_printed_also_of_a_server_that_died(place: Path) -> None:
    disk = added("disks.py:Says")
    number = str(disk["id"])
    done = run_here("logs", number)
    assert done.exit_code == 0
    assert f"serving disks.py:Says as {disk['path']}" in done.stdout
    assert run_here("logs", "-n", "0", number).stdout == ""
    following = subprocess.Popen(
        [*COMMAND, "logs", "-f", "-n", "1", number], stdout=subprocess.PIPE, text=True
    )
    try:
        assert following.stdout is not None
        assert select.select([following.stdout], [], [], 60)[0]
        os.kill(disk["server_pid"], signal.SIGKILL)
        rest, _ = following.communicate(timeout=60)
        assert "serving disks.py:Says" in rest
        assert following.returncode == 0, "it ends with the server"
    finally:
        following.kill()
        following.wait()
    with pyublk.Controller() as controller:
        until(lambda: not list(controller.devices()))
    assert "serving disks.py:Says" in run_here("logs", number).stdout
    done = run_here("logs", "77")
    assert done.exit_code == ExitCode.NO_DEVICE
    assert "there is no log of disk 77" in done.stderr


def test_ps_tells_which_disk_a_server_serves(place: Path) -> None:
    # An @ before both is what systemd spares at a machine's end.
    for options, mark in (((), ""), (("--root-storage",), "@")):
        disk = added("ram", "--size", "1M", *options)
        proc = Path(f"/proc/{disk['server_pid']}")
        assert (proc / "comm").read_text() == f"pyublk:ublkb{disk['id']}\n"
        line = (proc / "cmdline").read_bytes().rstrip(b"\0")
        assert line == f"{mark}pyublk: ublkb{disk['id']} (ram)".encode()
        (helper,) = helpers_of(disk["server_pid"])
        line = Path(f"/proc/{helper}/cmdline").read_bytes().rstrip(b"\0")
        assert line == f"{mark}pyublk-helper: ublkb{disk['id']}".encode()
        stopped(disk)


# ---- several disks in a server ----


def test_several_disks_are_served_by_one_process(place: Path) -> None:
    disks = [added("--server", "lab", "disks.py:Says", "-o", f"what=disk{n}") for n in range(3)]
    (pid,) = {disk["server_pid"] for disk in disks}
    for number, disk in enumerate(disks):
        assert Path(disk["path"]).read_bytes()[:6] == f"disk{number}.".encode()
        assert asked(disk, "status")["target_status"] == {"says": f"disk{number}"}
        (info,) = json.loads(run_here("info", str(disk["id"]), "--json").stdout)
        assert info["log"] == str(run_directory() / f"{disk['id']}.log")
        assert f"as {disk['path']} by" in run_here("logs", str(disk["id"])).stdout
    line = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0")
    assert line.startswith(f"pyublk: server lab (ublkb{disks[0]['id']} disks.py:S".encode())
    assert "lab" in run_here("info", str(disks[0]["id"])).stdout
    with Client(server_place("lab")) as client:
        assert client.ask("disks") == [disk["id"] for disk in disks]
    stopped(disks[1])
    assert [one["id"] for one in json.loads(run_here("list", "--json").stdout)] == [
        disks[0]["id"],
        disks[2]["id"],
    ]
    assert f"{disks[1]['id']}.log" not in left()
    assert Path(disks[2]["path"]).read_bytes()[:6] == b"disk2."
    done = run_here("stop", "all")
    assert done.exit_code == 0, done.output
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert left() == []


@pytest.mark.thorough
def test_an_add_that_fails_leaves_the_others_alone(place: Path) -> None:
    done = run_here("add", "--server", "lab", "disks.py:Fails")
    assert done.exit_code == ExitCode.PERMISSION
    assert "the vault is closed" in done.stderr
    until(lambda: left() == [], what="a server without a disk ends")
    disk = added("--server", "lab", "disks.py:Says", "-o", "what=here")
    for arguments, code in (
        (["disks.py:Fails"], ExitCode.PERMISSION),
        (["disks.py:Non"], ExitCode.USAGE),
        (["nul"], ExitCode.USAGE),
        (["null", "--id", str(disk["id"])], ExitCode.BUSY),
    ):
        done = run_here("add", "--server", "lab", *arguments)
        assert done.exit_code == code, done.output
    assert Path(disk["path"]).read_bytes()[:5] == b"here."
    assert len(list(run_directory().glob("*.json"))) == 1
    stopped(disk)
    until(lambda: left() == [])


@pytest.mark.thorough
def test_each_disk_is_of_the_directory_where_it_was_added(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    disks = []
    for name in ("one", "two"):
        folder = place / name
        folder.mkdir()
        (folder / "disks.py").write_text(TARGETS)
        (folder / "same.py").write_text(TARGETS.replace('"nothing"', f'"{name}"'))
        (folder / f"module_{name}.py").write_text(TARGETS.replace('"nothing"', f'"m-{name}"'))
        (folder / "disk.img").write_bytes(name.encode().ljust(MIB, b"\0"))
        paths.append(folder)
        monkeypatch.chdir(folder)
        disks.append(added("--server", "lab", "same.py:Says"))
        assert Path(disks[-1]["path"]).read_bytes()[:4] == f"{name}.".encode()
        disks.append(added("--server", "lab", "file", "disk.img"))
        assert Path(disks[-1]["path"]).read_bytes()[:4] == f"{name}\0".encode()
        disks.append(added("--server", "lab", f"module_{name}:Says"))
        assert Path(disks[-1]["path"]).read_bytes()[:6] == f"m-{name}.".encode()
    (paths[0] / "common.py").write_text(TARGETS)
    (paths[1] / "common.py").write_text(TARGETS)
    monkeypatch.chdir(paths[0])
    disks.append(added("--server", "lab", "common:Says"))
    monkeypatch.chdir(paths[1])
    done = run_here("add", "--server", "lab", "common:Says")
    assert done.exit_code == ExitCode.USAGE
    assert "has the module 'common' from" in done.stderr
    done = run_here("add", "--server", "lab", "module_one:Says")
    assert done.exit_code == ExitCode.USAGE
    pid = disks[0]["server_pid"]
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended
            assert os.readlink(task / "cwd") == "/"
    assert run_here("stop", "all").exit_code == 0


@pytest.mark.thorough
def test_all_who_want_a_server_at_the_same_time_get_the_same(place: Path) -> None:
    def add(_number: int) -> dict[str, Any]:
        done = subprocess.run(
            [*COMMAND, "add", "--server", "lab", "null", "--size", "1M", "--json"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        made: dict[str, Any] = json.loads(done.stdout)
        return made

    with ThreadPoolExecutor(3) as pool:
        disks = list(pool.map(add, range(3)))
    assert len({disk["server_pid"] for disk in disks}) == 1
    assert len({disk["id"] for disk in disks}) == 3
    stopped(*disks)
    until(lambda: left() == [])


def test_a_server_that_is_killed_is_told_for_all_of_its_disks(place: Path) -> None:
    options = ("--server", "lab", "null", "--size", "1M", "--no-restart")
    disks = [added(*options) for _ in range(2)]
    os.kill(disks[0]["server_pid"], signal.SIGKILL)
    with pyublk.Controller() as controller:
        until(lambda: not list(controller.devices()))
    for disk in disks:
        assert "serving null as" in run_here("logs", str(disk["id"])).stdout
    checks = json.loads(run_here("doctor", "--json").stdout)["checks"]
    told = [one["finding"] for one in checks if one["name"] == "records"]
    for disk in disks:
        assert any(f"{disk['id']}.json was left behind by a server" in one for one in told)
    disk = added("--server", "lab", "null", "--size", "1M")
    assert disk["server_pid"] != disks[0]["server_pid"]
    stopped(disk)
    assert run_here("doctor", "--repair").exit_code in (0, 1)
    until(lambda: left() == [])


def test_a_server_of_several_ends_by_a_signal_with_all_of_its_disks(place: Path) -> None:
    disks = [added("--server", "lab", "file", f"{n}.img", "--size", "1M") for n in range(3)]
    for disk in disks:
        with open(disk["path"], "r+b") as file:
            file.write(b"kept" * 1024)
    os.kill(disks[0]["server_pid"], signal.SIGTERM)
    until(lambda: left() == [])
    for number in range(3):
        assert Path(f"{number}.img").read_bytes()[:8] == b"keptkept"


@pytest.mark.thorough
def test_a_disk_that_hangs_is_stopped_without_the_others(place: Path) -> None:
    os.mkfifo("told")
    good = added("--server", "lab", "disks.py:Says", "-o", "what=good")
    bad = added("--server", "lab", "disks.py:HangsAt", "-o", f"place={MIB // 2}", "-o", "told=told")

    with hanging_reader(bad):
        done = run_here("stop", "--force", str(bad["id"]))
    assert done.exit_code == ExitCode.TIMEOUT, done.output
    assert "never returned" in done.output
    assert Path(good["path"]).read_bytes()[:5] == b"good."
    until(lambda: "never returned" in run_here("logs", str(bad["id"])).stdout)
    stopped(good)


def test_an_add_that_is_interrupted_leaves_no_disk(place: Path) -> None:
    for name in ("told", "go-on"):
        os.mkfifo(name)
    good = added("--server", "lab", "null", "--size", "1M")
    adding = subprocess.Popen(
        [*COMMAND, "add", "--server", "lab", "disks.py:SlowToOpen", "-o", "told=told", "-o",
         "go_on=go-on"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert Path("told").read_text() == "opening"
    adding.send_signal(signal.SIGINT)
    adding.communicate(timeout=60)
    assert adding.returncode == ExitCode.INTERRUPTED
    with open("go-on", "w") as pipe:
        pipe.write("now")
    with pyublk.Controller() as controller:
        until(lambda: "SlowToOpen" in run_here("logs", str(good["id"])).stdout)
        until(lambda: [device.id for device in controller.devices()] == [good["id"]])
    time.sleep(0.1)
    stopped(good)
    until(lambda: left() == [])


@pytest.mark.thorough
def test_a_disk_of_several_that_somebody_else_stops_is_forgotten(
    place: Path, controller: pyublk.Controller
) -> None:
    disks = [added("--server", "lab", "null", "--size", "1M") for _ in range(2)]
    controller.stop(disks[0]["id"])
    until(lambda: f"{disks[0]['id']}.json" not in left())
    assert f"{disks[1]['id']}.json" in left()
    stopped(disks[1])
    until(lambda: left() == [])


@pytest.mark.parametrize("name", ["../lab", "", "a b"])
def test_a_servers_name_is_checked(name: str) -> None:
    done = run_here("add", "--server", name, "null")
    assert done.exit_code == ExitCode.USAGE
    assert "is not a server's name" in done.stderr
