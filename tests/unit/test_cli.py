"""The command line as far as it goes without a driver: parsing, messages, exit codes, JSON."""

import errno
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from pyublk import errors
from pyublk.cli import _COMMANDS, main
from pyublk.cli.failures import ExitCode, Failure, NoDriver, exit_code
from pyublk.service.reports import TargetFailed
from pyublk.uapi import ControlCommand

COMMANDS = sorted(_COMMANDS)


@pytest.fixture(autouse=True)
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the driver, whatever this one has."""
    monkeypatch.setattr("pyublk.control.CONTROL_NODE", str(tmp_path / "no-control"))
    monkeypatch.setenv("PYUBLK_RUN_DIR", str(tmp_path / "run"))


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(main, arguments, prog_name="pyublk")


# ---- help ----


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: pyublk {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_the_groups_help_names_every_command() -> None:
    output = run("--help").output
    for name, (_, what) in _COMMANDS.items():
        assert name in output
        assert what in output


def test_the_groups_help_imports_no_command() -> None:
    program = (
        "import sys; from pyublk.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*(m for m in sys.modules if m.startswith(('pyublk.vm', 'pyublk.cli.', 'rich'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1].split() == ["pyublk.cli.failures"]


def test_version() -> None:
    assert run("--version").output == "pyublk, version 0.1.0\n"


def test_python_m_pyublk_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyublk", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == run("--help").output


# ---- wrong usage: 2 ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lst"], "No such command 'lst'. Did you mean 'list'?"),
        (["frobnicate"], "No such command 'frobnicate'."),
        (["list", "--jsn"], "--json"),
        (["add"], "Missing argument 'TARGET'"),
        (
            ["add", "null", "--size", "1X"],
            "size must be a size such as 1G or 512MiB, not '1X'",
        ),
        (["add", "null", "--depth", "0"], "depth must be 1 to 4096, not 0"),
        (["add", "null", "--depth", "x"], "depth must be 1 to 4096, not 'x'\n"),
        (["add", "null", "--queues", "none"], "queues must be 1 to 4096 or max, not 'none'"),
        (["add", "null", "--id", "9999999"], "id must be 0 to 1048575, not 9999999"),
        (["add", "null", "-o", "size"], "'size' is no KEY=VALUE"),
        (
            ["add", "null", "-o", "a=1", "-o", "a=2"],
            "a is given twice: several values go with commas",
        ),
        (["add", "null", "-o", "=1"], "'=1' is no KEY=VALUE"),
        (["add", "null", "--affinity", "3-1"], "affinity must be sets of CPUs such as 0-3:4-7 or"),
        (["add", "null", "--affinity", "1,"], "0-3:4-7 or auto or any, not '1,'"),
        (["add", "null", "--path", "fast"], "path must be one of auto, copy, get-data, user-copy"),
        (["add", "null", "--trim-after", "0"], "must be a number of seconds above 0 or never, not"),
        (["stop"], "Missing argument 'ID...'"),
        (["stop", "sda"], "'sda' is no device: give an id, /dev/ublkbN or `all`"),
        (["info", "all"], "'all' is no device: give an id, /dev/ublkbN\n"),
        (["replace", "0", "first"], "'LEG': 'first' is not a valid whole number"),
        (["logs", "-n", "all", "0"], "'all' is not a valid whole number"),
        (["stop", "0", "--safe", "--force"], "--safe and --force exclude each other"),
        (["stop", "0", "--timeout", "0"], "0.0 is not in the range x>=0.1"),
        (["stop", "0", "--timeout", "nan"], "nan is no number of seconds that can be waited for"),
        (["stop", "0", "--timeout", "1e300"], "1e300 is no number of seconds"),
        (["vm", "--timeout", "-1", "--", "true"], "-1.0 is not in the range x>0"),
        (["vm", "--timeout", "inf", "--", "true"], "inf is no number of seconds"),
        (["vm", "--cpus", "two", "--", "true"], "'two' is not a valid integer"),
        (["vm", "--cpus", "0", "--", "true"], "a machine has 1 to 255 processors, not 0"),
        (["vm", "--cpus", "-3", "--", "true"], "a machine has 1 to 255 processors, not -3"),
        (["vm", "--cpus", str(10**20), "--", "true"], "a machine has 1 to 255 processors"),
        (["vm", "--memory", "0", "--", "true"], "at least 256 MiB of memory, not 0 bytes"),
        (
            ["vm", "--memory", "1000000G", "--", "true"],
            "at most this machine's own, ",
        ),
        (["vm", "--memory", "-1G", "--", "true"], "'-1G' is not a size of memory"),
        (["vm", "--kernel", "newest", "--", "true"], "no kernel is called 'newest': give latest"),
        (["vm", "--env", "=", "--", "true"], "the variable '=' cannot be passed on"),
        (["vm", "--count-instructions", "--cpus", "2", "--", "true"], "takes one processor, not 2"),
        (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == ExitCode.USAGE
    assert words in result.stderr
    assert result.stdout == ""


# ---- odd surroundings ----


def command(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """The command as a process of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(
        [sys.executable, "-m", "pyublk", *arguments], text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["add", "--help"], ["doctor"], ["doctor", "--json"],
     ["completion", "zsh"]],
    ids=" ".join,
)  # fmt: skip
def test_what_cannot_be_printed_is_a_failure_without_a_traceback(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = command(*arguments, stdout=full)
    assert done.stderr == "pyublk: No space left on device\n"
    assert done.returncode == ExitCode.FAILED
    reader, writer = os.pipe()
    os.close(reader)
    done = command(*arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (ExitCode.FAILED, "")


def test_messages_that_nobody_can_read_change_nothing() -> None:
    with open("/dev/full", "w") as full:
        assert command("info", "x", stderr=full).returncode in (ExitCode.FAILED, ExitCode.USAGE)
        assert command("doctor", stderr=full).stdout == command("doctor").stdout


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("arguments", [["doctor"], ["info", "nought"], ["--version"]], ids=" ".join)
def test_closed_standard_descriptors_are_like_dev_null(
    closed: list[int], arguments: list[str]
) -> None:
    redirections = " ".join(f"{number}>&-" for number in closed)
    script = f'exec "$@" {redirections}'
    line = ["sh", "-c", script, "sh", sys.executable, "-m", "pyublk", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    expected = command(*arguments)
    assert done.returncode == expected.returncode
    assert done.stdout == ("" if 1 in closed else expected.stdout)
    assert done.stderr == ("" if 2 in closed else expected.stderr)


def test_no_file_gets_the_number_of_a_closed_standard_descriptor() -> None:
    program = (
        "import os\n"
        "from pyublk.launch import fill_descriptors\n"
        "for number in (0, 1, 2): os.close(number)\n"
        "fill_descriptors()\n"
        "places = [os.readlink(f'/proc/self/fd/{n}') for n in range(3)]\n"
        "os._exit(places != ['/dev/null'] * 3 or os.open('/', os.O_RDONLY) < 3)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_ctrl_c_while_the_command_is_loaded() -> None:
    """Each time a little later, up to the end: 130 or what the command had to say, no traceback."""
    program = (
        "import sys, os, signal, threading, builtins\n"
        "sys.argv = ['pyublk', 'doctor']\n"
        "count, original = 0, builtins.__import__\n"
        "def counting(*args, **kwargs):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == int(os.environ['AT']): os.kill(os.getpid(), signal.SIGINT)\n"
        "    return original(*args, **kwargs)\n"
        "import pyublk.launch\n"
        "builtins.__import__ = counting\n"
        "from pyublk.cli import main\n"
        "main()\n"
    )
    codes = set()
    for at in (1, 2, 30, 100, 200, 300, 400, 100000):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"AT": str(at)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert "Abort" not in done.stderr
        codes.add(done.returncode)
        assert done.returncode in (ExitCode.INTERRUPTED, ExitCode.OK, ExitCode.FAILED), at
    assert ExitCode.INTERRUPTED in codes
    assert codes != {ExitCode.INTERRUPTED}, "no signal came in the last run"


def test_ctrl_c_is_left_alone_where_pyublk_is_a_library() -> None:
    program = (
        "import signal, pyublk\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


# ---- no driver: 3 ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["add", "null"],
        ["add", "null", "--foreground"],
        ["list"],
        ["list", "--json"],
        ["info", "0"],
        ["stop", "all"],
        ["del", "/dev/ublkb0"],
        ["features"],
    ],
    ids=" ".join,
)
def test_no_driver(arguments: list[str], tmp_path: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == ExitCode.NO_DRIVER
    assert result.stdout == ""
    first, *rest = result.stderr.splitlines()
    assert first.startswith("pyublk: /dev/ublk-control does not exist: the ublk driver is not load")
    assert any(line.startswith("  What to do: ") for line in rest)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ram"], "ram needs size: give it as an option"),
        (["stripe", "--option", "chunk=64K"], "Stripe needs at least one file"),
        (["nul"], "there is no target 'nul' (did you mean 'null'?)"),
        (["null", "--option", "sizee=1"], "null has no option 'sizee' (did you mean 'size'?)"),
    ],
)
def test_a_target_that_is_written_wrongly_is_told_without_a_driver_too(
    arguments: list[str], said: str
) -> None:
    result = run("add", *arguments)
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr.startswith(f"pyublk: {said}")


def test_the_traceback_is_shown_when_asked_for() -> None:
    assert "Traceback" not in run("list").stderr
    for shown in (run("--traceback", "list"), run("list", env={"PYUBLK_TRACEBACK": "1"})):
        assert shown.exit_code == ExitCode.NO_DRIVER
        assert "Traceback (most recent call last)" in shown.stderr
        assert "pyublk: /dev/ublk-control does not exist" in shown.stderr


# ---- the kinds of failure ----


def timed_out() -> OSError:
    return errors.command_error(ControlCommand.STOP_DEV, errno.ETIMEDOUT, device=1)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("a bug"), ExitCode.FAILED),
        (TargetFailed("KeyError: 1"), ExitCode.FAILED),
        (OSError(errno.EIO, "I/O error"), ExitCode.FAILED),
        (FileNotFoundError(errno.ENOENT, "No such file"), ExitCode.FAILED),
        (ValueError("size is 5"), ExitCode.USAGE),
        (errors.InvalidTarget("X has no read"), ExitCode.USAGE),
        (NoDriver("no driver"), ExitCode.NO_DRIVER),
        (errors.control_missing_error(errno.EACCES), ExitCode.PERMISSION),
        (errors.io_uring_error(errno.EPERM), ExitCode.PERMISSION),
        (errors.device_not_found(7), ExitCode.NO_DEVICE),
        (
            errors.command_error(ControlCommand.STOP_DEV, errno.ENODEV, device=1),
            ExitCode.NO_DEVICE,
        ),
        (errors.DeviceBusy("mounted"), ExitCode.BUSY),
        (errors.command_error(ControlCommand.ADD_DEV, errno.EEXIST, device=1), ExitCode.BUSY),
        (
            errors.command_error(ControlCommand.TRY_STOP_DEV, errno.EBUSY, device=1),
            ExitCode.BUSY,
        ),
        (timed_out(), ExitCode.TIMEOUT),
        (errors.HandlerTimeout("it hangs"), ExitCode.TIMEOUT),
    ],
)
def test_each_kind_of_failure_has_its_code(error: Exception, code: ExitCode) -> None:
    assert exit_code(error) == code


def test_a_failure_is_a_sentence_and_its_notes(capsys: pytest.CaptureFixture[str]) -> None:
    Failure(timed_out()).show()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith("pyublk: STOP_DEV on device 1: ")
    assert err.splitlines()[1].startswith("  Cause: ")
    assert err.splitlines()[2].startswith("  What to do: ")
    assert "Errno" not in err


def test_an_unforeseen_failure_says_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    Failure(RuntimeError("a bug")).show()
    assert capsys.readouterr().err == (
        "pyublk: RuntimeError: a bug (pyublk --traceback ... shows where)\n"
    )


def test_every_code_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    for code in ExitCode:
        assert f"| {code.value} |" in page


# ---- doctor ----


def test_the_doctors_json_is_all_that_is_printed() -> None:
    result = run("doctor", "--json")
    told = json.loads(result.stdout)
    assert result.stderr == ""
    assert told["repaired"] == []
    checks = {check["name"]: check for check in told["checks"]}
    assert checks["control node"]["status"] == "failed"
    assert checks["control node"]["remedy"].startswith("try `modprobe ublk_drv`")
    assert checks["io_uring"]["status"] == "ok"
    assert result.exit_code == ExitCode.FAILED


def test_the_doctors_table() -> None:
    result = run("doctor")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["CHECK", "STATUS", "FINDING", "WHAT", "TO", "DO"]
    assert any(line.startswith("control node") and "failed" in line for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_a_table_on_a_terminal_is_folded_to_its_width() -> None:
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "pyublk", "doctor"],
        stdout=theirs,
        env=os.environ | {"COLUMNS": "60", "TERM": "xterm"},
    ) as command:
        os.close(theirs)
        shown = b""
        with suppress(OSError), open(ours, "rb", buffering=0) as terminal:  # EIO at its end
            while some := terminal.read(4096):
                shown += some
    assert command.wait() in (ExitCode.OK, ExitCode.FAILED)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()
    assert lines[0].split()[:2] == ["CHECK", "STATUS"]
    assert b"\x1b[1mCHECK" in shown, "the head is bold"
    assert max(map(len, lines)) <= 60


def on_a_terminal(columns: int, program: str) -> list[str]:
    """What it prints there, without colours."""
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=theirs,
        env=os.environ | {"COLUMNS": str(columns), "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError), open(ours, "rb", buffering=0) as terminal:  # EIO at its end
            while some := terminal.read(4096):
                shown += some
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()


@pytest.mark.parametrize("columns", [57, 60, 80])
def test_a_table_that_has_room_for_its_words_cuts_none(columns: int) -> None:
    rows = [
        [
            "control node",
            "failed",
            "/dev/ublk-control does not exist here",
            "try `modprobe ublk_drv`",
        ],
        ["driver", "ok", "this kernel has none", "use a kernel with CONFIG_BLK_DEV_UBLK, or a vm"],
    ]
    program = f"from pyublk.cli.output import print_table\nprint_table(list('ABCD'), {rows!r})"
    lines = on_a_terminal(columns, program)
    assert lines[0].split() == list("ABCD")
    assert max(map(len, lines)) <= columns
    assert set(" ".join(cell for row in rows for cell in row).split()) <= set(
        " ".join(lines).split()
    )


def test_columns_that_would_cut_words_go_below() -> None:
    columns = ["ID", "PATH", "TARGET", "STATE", "SERVER", "USED BY"]
    rows = [
        ["0", "/dev/ublkb0", "examples/rot13.py:Rot13", "live", "python3 (148)", "mounted at /mnt"],
        ["1", "/dev/ublkb1", "ram", "live", "-", "-"],
    ]
    program = f"from pyublk.cli.output import print_table\nprint_table({columns!r}, {rows!r})"
    lines = [line.rstrip() for line in on_a_terminal(60, program)]
    assert lines[0].split() == ["ID", "PATH", "TARGET", "STATE"]
    assert lines[1].split() == ["0", "/dev/ublkb0", "examples/rot13.py:Rot13", "live"]
    assert lines[2:4] == ["  SERVER: python3 (148)", "  USED BY: mounted at /mnt"]
    assert lines[4].split() == ["1", "/dev/ublkb1", "ram", "live"]
    wide = on_a_terminal(120, program)
    assert wide[0].split() == ["ID", "PATH", "TARGET", "STATE", "SERVER", "USED", "BY"]
    assert len(wide) == 3


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_the_help_fits_60_columns_and_cuts_no_word(name: str | None) -> None:
    def help_at(width: int) -> str:
        sizes = {"terminal_width": width, "max_content_width": width}
        root = click.Context(main, info_name="pyublk", **sizes)
        if name is None:
            return main.get_help(root)
        command = main.get_command(root, name)
        assert command is not None
        return command.get_help(click.Context(command, info_name=name, parent=root, **sizes))

    narrow = help_at(60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert set(help_at(300).split()) <= set(re.sub(r"-\n +", "-", narrow).split())


# ---- completion ----


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_call_the_command_back(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert "_PYUBLK_COMPLETE" in result.stdout
    assert f"{shell}_complete" in result.stdout


def test_bash_takes_the_script() -> None:
    script = run("completion", "bash").stdout
    done = subprocess.run(
        ["bash", "-c", f"{script}\ncomplete -p pyublk"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split()[-3:] == ["-F", "_pyublk_completion", "pyublk"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pyublk st", {"stats", "stop"}),
        ("pyublk add nu", {"null"}),
        ("pyublk add null --que", {"--queues"}),
        ("pyublk completion ", {"bash", "zsh", "fish"}),
        ("pyublk stop a", {"all"}),
        ("pyublk info a", set()),
    ],
)
def test_words_are_completed(line: str, expected: set[str]) -> None:
    assert {entry.partition(",")[2] for entry in completions(line)} == expected


def test_classes_of_a_file_and_their_parameters_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without running it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "raise SystemExit\n"
        "class Mine:\n    def __init__(self, path, *, key=1, kind=2): pass\nclass Other: pass\n"
    )
    assert set(completions("pyublk add mine.py:")) == {"plain,mine.py:Mine", "plain,mine.py:Other"}
    assert completions("pyublk add mine.py:M") == ["plain,mine.py:Mine"]
    assert set(completions("pyublk add mine.py:Mine -o k")) == {"plain,key=", "plain,kind="}
    assert completions("pyublk add mine.py:Other -o ") == []
    assert completions("pyublk add nowhere.py:") == []
    assert "plain,size=" in completions("pyublk add ram --option ")
    assert completions("pyublk add nothing -o ") == []


def test_kernels_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tmp_path / "pyublk/kernels"
    kernels.mkdir(parents=True)
    (kernels / "6.12").symlink_to("6.12.1-x")
    (kernels / "6.12.1-x").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert set(completions("pyublk vm --kernel ")) == {"plain,6.12", "plain,host", "plain,latest"}
    assert completions("pyublk vm --kernel l") == ["plain,latest"]


def test_a_file_may_follow_where_no_target_fits() -> None:
    assert completions("pyublk add my") == ["file,my"]


def completions(line: str) -> list[str]:
    """What bash is told at the end of `line`: kinds and words."""
    place = len(line.split(" ")) - 1
    env = {"_PYUBLK_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(place)}
    return [entry for entry in run(env=env).stdout.splitlines() if entry]
