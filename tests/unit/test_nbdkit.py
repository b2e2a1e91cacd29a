"""Plugins of nbdkit as targets: they are called as by nbdkit, and answer the same."""

import ast
import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pyublk import targets
from pyublk.errors import InvalidTarget
from pyublk.targets import nbdkit_api
from pyublk.targets.nbdkit import NBDKit
from pyublk.testing import Disk

PLUGINS = Path(__file__).parents[1] / "nbdkit_plugins"
SECOND, FIRST = PLUGINS / "second.py", PLUGINS / "first.py"
SIZE = 1 << 20


def has_nbdkit() -> bool:
    """Whether nbdkit is there, with its plugin for Python, of whatever version."""
    if shutil.which("nbdkit") is None or shutil.which("qemu-io") is None:
        return False
    asked = ["nbdkit", "python", "--dump-plugin"]
    return subprocess.run(asked, capture_output=True, timeout=60, check=False).returncode == 0


needs_nbdkit = pytest.mark.skipif(
    not has_nbdkit(),
    reason="the packages nbdkit, nbdkit-plugin-python and qemu-utils are not installed",
)

#: Requests, as qemu-io's commands.
COMMANDS = [
    "write -P 7 0 8k",
    "write -f -P 8 8k 4k",
    "flush",
    "write -z 0 4k",
    "write -z -u 4k 4k",
    "discard 64k 4k",
    "read -P 8 8k 4k",
    f"write -P 1 {SIZE - 2048} 512",
    f"read {SIZE - 1024} 512",
    f"read -P 0 {SIZE - 512} 512",
]


def ask(disk: Disk, command: str) -> str | None:
    """Sends a request that qemu-io's command means; the error's text, if it fails."""
    what, *words = command.split()
    options = {word for word in words if word in ("-z", "-u", "-f")}
    pattern = int(words[words.index("-P") + 1]) if "-P" in words else 0
    try:
        if what == "flush":
            disk.flush()
            return None
        numbers = [int(one.replace("k", "")) << 10 * one.endswith("k") for one in words[-2:]]
        offset, length = numbers
        if what == "read":
            disk.pread(length, offset)
        elif what == "discard":
            disk.discard(offset, length)
        elif "-z" in options:
            disk.write_zeroes(offset, length, unmap="-u" in options)
        else:
            disk.pwrite(bytes([pattern]) * length, offset, fua="-f" in options)
    except OSError as error:
        return os.strerror(error.errno or 0)
    return None


def by_nbdkit(plugin: Path, *parameters: str) -> tuple[list[str | None], bytes]:
    """The errors of these requests, and the bytes after them."""
    script = 'qemu-io -t none -f raw "$uri"' + "".join(f" -c '{one}'" for one in COMMANDS)
    script += f' ; qemu-io -f raw "$uri" -c "read -v 0 {SIZE - 4096}"'
    done = subprocess.run(
        ["nbdkit", "-U", "-", "python", str(plugin), *parameters, "--run", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    answers: list[str | None] = []
    dump = bytearray()
    for line in done.stdout.splitlines():
        if line[8:11] == ":  ":
            dump += bytes.fromhex(line[11:58])
        elif " failed: " in line:
            answers.append(line.partition(" failed: ")[2])
        elif line.startswith(("wrote", "read ", "discard ")):
            answers.append(None)
    return answers[:-1], bytes(dump)


def calls_in(log: Path) -> list[str]:
    """Without those of the beginning, and the flushes that a client sends by itself."""
    return [line for line in log.read_text().splitlines() if line.split()[0] not in ("flush",)]


@needs_nbdkit
@pytest.mark.parametrize(
    ("plugin", "parameters"),
    [(SECOND, []), (SECOND, ["zero=emulated", "size=1M"]), (FIRST, [])],
    ids=["version 2", "zeroes written", "version 1"],
)
def test_a_plugin_is_called_as_by_nbdkit(
    plugin: Path, parameters: list[str], tmp_path: Path
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    expected, contents = by_nbdkit(plugin, f"calls={theirs}", *parameters)
    with Disk(NBDKit(str(plugin), f"calls={ours}", *parameters)) as disk:
        answers = [ask(disk, one) for one in COMMANDS]
        made = calls_in(ours)
        dump = disk.pread(SIZE - 4096, 0)
    assert [one for one, command in zip(answers, COMMANDS, strict=True) if command != "flush"] == (
        expected
    )
    assert dump == contents
    assert calls_in(theirs)[: len(made)] == made


@pytest.mark.parametrize("text", ["010", " +00", "01k", "0x10", "1_k"])
def test_sizes_that_differ_between_nbdkits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"leave out its leading zeros|Unable to parse"):
        nbdkit_api.parse_size(text)


@needs_nbdkit
def test_sizes_and_constants_are_nbdkits(tmp_path: Path) -> None:
    texts = ["1", "1k", "1K", " 1k", "1M", "1G", "1T", "1P", "7E", "1s", "1S", "1b", "1B", "+1"]
    texts += ["1 k", "1kB", "1KiB", "-1", "0", "", "k", "1.5M", "8E", "16E", "1 "]
    ask_all = (
        f"TEXTS = {texts}"
        + """
import sys, nbdkit
def sizes(parse):
    for text in TEXTS:
        try:
            yield parse(text)
        except ValueError as error:
            yield str(error)
constants = {name: value for name, value in vars(nbdkit).items() if name.isupper()}
print(list(sizes(nbdkit.parse_size)), constants, file=sys.stderr)
def open(readonly): pass
def get_size(h): return 512
def pread(h, count, offset): pass
"""
    )
    plugin = tmp_path / "plugin.py"
    plugin.write_text(ask_all)
    done = subprocess.run(
        ["nbdkit", "-f", "-U", "-", "python", plugin, "--run", "true"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    told = next(line for line in done.stderr.splitlines() if line.startswith("["))

    def sizes() -> list[int | str]:
        found: list[int | str] = []
        for text in texts:
            try:
                found.append(nbdkit_api.parse_size(text))
            except ValueError as error:
                found.append(str(error))
        return found

    module = {name: value for name, value in vars(nbdkit_api.MODULE).items() if name.isupper()}
    theirs, brace, constants = told.partition(" {")
    assert theirs == str(sizes())
    assert ast.literal_eval(brace.strip() + constants) == module


def test_a_plugin_is_named_as_a_target_with_nbdkits_parameters(tmp_path: Path) -> None:
    made = targets.build(
        targets.resolve("nbdkit"), {"calls": str(tmp_path / "calls")}, [str(SECOND), "size=64K"]
    )
    with Disk(made) as disk:
        assert (disk.size, disk.params.basic.rotational, disk.params.basic.io_opt) == (
            65536, True, 8192,
        )  # fmt: skip
        assert disk.params.basic.fua
        status = made.status()
    assert status is not None
    assert status["thread_model"] == "THREAD_MODEL_PARALLEL"
    assert (tmp_path / "calls").read_text().splitlines()[0] == "open False the-default"
    by_option = targets.build(targets.resolve("nbdkit"), {}, [str(SECOND)], size=32768)
    with Disk(by_option) as disk:
        assert disk.size == 32768


def test_each_opening_has_a_plugin_of_its_own(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    target = NBDKit(str(SECOND), f"calls={calls}", export_name="mine", read_only=True)
    for _ in range(2):
        with Disk(target) as disk:
            assert disk.params.basic.read_only
            assert disk.pread(512, 0) == bytes(512)
    once = ["open True mine", "pread 512 0 0", "close True"]
    assert calls.read_text().splitlines() == once * 2


def plugin_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "plugin.py"
    path.write_text(
        "import errno, nbdkit\nAPI_VERSION = 2\ndef open(readonly): return 1\n"
        "def get_size(h): return 65536\n"
        "def pread(h, buf, offset, flags): buf[:] = bytes(len(buf))\n"
        f"{text}\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("text", "parameters", "kind", "said"),
    [
        ("", ["a=b"], ValueError, "takes no parameters, and was given a=b"),
        ("", ["a"], ValueError, "'a' is no parameter of a plugin: write key=value"),
        ("def config(k, v): raise KeyError(k)", ["a=b"], ValueError, "refuses a=b: 'a'"),
        ("def config_complete(): raise ValueError('b?')", [], ValueError, "refuses its parameters"),
        ("def thread_model(): return 7", [], InvalidTarget, "must be one of nbdkit.THREAD_MODEL"),
        ("API_VERSION = 3", [], InvalidTarget, "API_VERSION 3: versions 1 and 2 can be run"),
        ("del pread", [], InvalidTarget, "not a plugin for nbdkit: it does not define pread"),
        ("def get_size(h): return 1000", [], ValueError, "1000 bytes: a disk needs a positive mul"),
        ("def block_size(h): return 1 << 20, 1 << 20, 1 << 25", [], InvalidTarget, "1048576 bytes"),
        ("def block_size(h): return 512", [], InvalidTarget, "returned 512, and not three numbers"),
        (
            "def open(r):\n nbdkit.set_error(errno.ENOENT)\n raise RuntimeError('gone')",
            [],
            FileNotFoundError,
            "open of .* failed: .*gone",
        ),
        ("def get_size(h): raise RuntimeError('no size')", [], OSError, "get_size .* no size"),
    ],
)
def test_what_is_wrong_is_a_sentence(
    text: str, parameters: list[str], kind: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        Disk(NBDKit(plugin_of(tmp_path, text), *parameters)).open()


def test_no_script(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the plugin's script"):
        NBDKit()
    with pytest.raises(FileNotFoundError, match=r"the plugin .*none.py cannot be read"):
        NBDKit(str(tmp_path / "none.py"))


def test_a_plugin_that_cannot_is_not_asked(tmp_path: Path) -> None:
    refusing = (
        "def pwrite(h, buf, offset, flags): assert not flags\n"
        "def flush(h, flags): pass\ndef trim(h, count, offset, flags): 1/0\n"
        "def can_trim(h): return False\ndef can_fua(h): return nbdkit.FUA_EMULATE\n"
        "def can_flush(h): return 1\n"  # which nbdkit takes for no, as it is not True
    )
    with Disk(NBDKit(plugin_of(tmp_path, refusing))) as disk:
        basic = disk.params.basic
        assert (basic.fua, basic.volatile_cache, disk.params.discard) == (False, False, None)
        disk.pwrite(bytes(512), 0)
        with pytest.raises(OSError, match="does not take discards"):
            disk.discard(0, 512)
    with Disk(NBDKit(plugin_of(tmp_path, "def can_write(h): return False"))) as disk:
        assert disk.params.basic.read_only


def test_a_plugin_that_shuts_nbdkit_down_fails_what_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = NBDKit(plugin_of(tmp_path, "def pwrite(h, buf, offset, flags): nbdkit.shutdown()"))
    with Disk(target) as disk:
        disk.pwrite(bytes(512), 0)
        with pytest.raises(OSError, match="READ at 0") as failure:
            disk.pread(512, 0)
        assert failure.value.errno == errno.EIO  # the kernel does not pass ESHUTDOWN on
        assert target.status()["ended"] == "it called nbdkit.shutdown"
    assert "stop its disk" in caplog.text


def test_a_small_largest_request_splits_others(tmp_path: Path) -> None:
    text = (
        "calls = []\ndef block_size(h): return 512, 1024, 1024\n"
        "def pwrite(h, buf, offset, flags): calls.append((offset, len(buf)))\n"
        "def flush(h, flags): raise RuntimeError(calls)\n"
    )
    with Disk(NBDKit(plugin_of(tmp_path, text))) as disk:
        disk.pwrite(bytes(2560), 512)
        with pytest.raises(OSError, match="FLUSH at 0 failed"):
            disk.flush()
        assert disk.target.plugin._names["calls"] == [(512, 1024), (1536, 1024), (2560, 512)]  # type: ignore[attr-defined]
