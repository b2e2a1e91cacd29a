"""Targets as one text, and the registry that finds their classes by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyublk
from pyublk import layers, targets
from pyublk.named import Registry
from pyublk.service.plan import DiskSpec
from pyublk.targets import File, Null, Ram, Slice
from pyublk.targets.sources import from_text, split_argument

MINE = """
import pyublk
class Mine(pyublk.Target):
    def __init__(self, key: int = 1, *, size: int = 4096):
        super().__init__(size=size)
        self.key = key
    def read(self, offset, buffer): buffer[:] = bytes(len(buffer))
class Over(pyublk.Layer):
    def __init__(self, below, file: str = "", *, hosts: list[str] = ()):
        super().__init__(below)
        self.file, self.hosts = file, hosts
class Greedy(pyublk.Target):
    def __init__(self): super().__init__(size=4096)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sourced.py").write_text(MINE)
    return tmp_path / "sourced.py"


def test_a_path_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("disk.img", "a:b.img", "ram"):
        (tmp_path / name).touch()
    for text in ("disk.img", f"{tmp_path}/no:such", "./ram:1M", "a:b.img", "ram", "no-such.img"):
        made = from_text(text)
        assert isinstance(made, File)
        assert os.fspath(made.path) == os.path.normpath(text)
        assert not made.read_only
    assert from_text("disk.img", read_only=True).read_only
    direct = from_text("disk.img", options={"direct": "yes"}, size=8192)
    assert isinstance(direct, File)


def test_a_name_and_its_argument_are_a_target(mine: Path) -> None:
    ram = from_text("ram:", size=8192)
    assert isinstance(ram, Ram)
    assert ram.size == 8192
    assert isinstance(from_text("null:", size=8192, read_only=True), Null)
    assert from_text("null:", size=8192, read_only=True).read_only
    part = from_text("slice:disk:1.img", options={"offset": "4096"}, size=8192)
    assert isinstance(part, Slice)
    for text in ("sourced:Mine:13", f"{mine}:Mine:13", "sourced.py:Mine:13"):
        assert from_text(text).key == 13  # type: ignore[attr-defined]
    assert from_text("sourced:Mine").key == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an empty text"),
        ("ram", r"'ram' is a path, and there is no such file: write 'ram:' for the target"),
        (
            "rma:64M",
            r"there is no target 'rma' \(did you mean 'ram'\?\); a source is a path "
            r"\(\./rma:64M for a file of this name\), or NAME:ARGUMENT with one of .*file, ",
        ),
        ("ftp://host/disk.img", "there is no target 'ftp'"),
        ("slice:", "slice needs file: write slice FILE, or"),
        ("ram:x", r"ram takes 0 argument\(s\) \(none\), not 1"),
        ("no.module:Class", "there is no module 'no.module'"),
        ("no.py:Class", "there is no file 'no.py'"),
    ],
)
def test_what_is_no_source_is_told_in_a_sentence(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        from_text(text)
    assert "\n" not in str(raised.value)


def test_an_address_is_an_argument_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets.BUILT_IN, "nbd", File)
    assert split_argument("nbd://host:10809/export") == (File, ("nbd://host:10809/export",))
    assert split_argument("nbd:unix:/run/x.sock") == (File, ("unix:/run/x.sock",))
    assert split_argument("file:https://host/x") == (File, ("https://host/x",))


def test_a_description_takes_an_argument_after_the_name(mine: Path) -> None:
    spec = DiskSpec.from_toml('target = "slice:disk.img"\nsize = "8K"\n[options]\noffset = 0\n')
    assert isinstance(spec.make_target(), Slice)
    spec = DiskSpec(target="sourced.py:Mine:7", options={"size": "8192"})
    assert spec.make_target().key == 7  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"there is no target 'slcie' \(did you mean 'slice'\?\)"):
        DiskSpec(target="slcie:./disk.img").make_target()
    with pytest.raises(ValueError, match=r"no module 'rma' .*did you mean 'ram'"):
        DiskSpec(target="rma:x").make_target()


def test_a_short_name_goes_before_a_package(mine: Path) -> None:
    (mine.parent / "null.py").write_text(MINE)
    with pytest.raises(ValueError, match="null takes 0 argument"):
        from_text("null:Mine", size=4096)
    assert type(from_text("null.py:Mine")).__name__ == "Mine"


def test_classes_are_imported_when_they_are_asked_for(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(mine.parent), *sys.path])
    (mine.parent / "lazy_one.py").write_text(MINE)
    monkeypatch.setitem(targets.BUILT_IN, "lazy", "lazy_one:Mine")
    assert "lazy" in targets.names()
    assert "lazy_one" not in sys.modules
    assert targets.resolve("lazy") is sys.modules["lazy_one"].Mine
    assert targets.Mine is sys.modules["lazy_one"].Mine  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = targets.Nothing  # type: ignore[attr-defined]


def test_a_package_that_an_extra_has_is_named(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(mine.parent), *sys.path])
    (mine.parent / "needy.py").write_text("import no_such_package.inner\n")
    (mine.parent / "broken.py").write_text("import pyublk.no_such_module\n")
    monkeypatch.setitem(targets.BUILT_IN, "needy", "needy:Needy")
    monkeypatch.setitem(targets.BUILT_IN, "broken", "broken:Broken")
    with pytest.raises(
        pyublk.ExtraMissing, match=r"no_such_package is not installed: pip install 'pyublk\[needy"
    ):
        from_text("needy:x")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        targets.resolve("broken")


def test_every_built_in_class_is_there() -> None:
    """In a process of its own, which finds no class that this one imported."""
    program = """
import inspect
from pyublk import layers, targets
from pyublk.errors import ExtraMissing
for registry in (targets, layers):
    for name in registry.BUILT_IN:
        try:
            assert inspect.isclass(registry.resolve(name)), name
        except ExtraMissing as error:
            print(error)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_other_packages_have_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Points(list[object]):
        def select(self, name: str) -> "Points":
            return Points(one for one in self if one.name == name)  # type: ignore[attr-defined]

    class Point:
        name = "theirs"

        def load(self) -> type[pyublk.Target]:
            return Null

    registry = Registry("target", pyublk.Target, "group", {"ram": Ram})
    monkeypatch.setattr(registry, "_entry_points", lambda: Points([Point()]))
    assert registry.names() == ["ram", "theirs"]
    assert registry.resolve("theirs") is Null
    assert registry.split("theirs:a:b") == ("theirs", "a:b")
    assert registry.split("others:a:b") == ("others:a", "b")


# ---- layers by name ----


def test_a_layer_is_made_of_a_text(mine: Path) -> None:
    below = Null(size=1 << 20)
    for place in ("sourced.py:Over", "sourced:Over", f"{mine}:Over"):
        made = layers.build(place, below)
        assert isinstance(made, pyublk.Layer)
        assert made.below.target is below
        made = layers.build(f"{place}:file=a=b:c,,d,hosts=x,,y", below)
        assert (made.file, made.hosts) == ("a=b:c,d", ["x", "y"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sourced.py:Over:filr=x",
            r"Over has no option 'filr' \(did you mean 'file'\?\); it takes",
        ),
        ("sourced.py:Over:below=x", "Over has no option 'below'"),
        ("sourced.py:Over:file", "'file' in the layer 'sourced.py:Over:file' is not KEY=VALUE"),
        ("sourced.py:Over:=x", "'=x' in the layer"),
        ("sourced.py:Over:file=a,file=b", "file is given twice"),
        ("sourced.py:Ovre", r"sourced.py has no 'Ovre' \(did you mean 'Over'\?\); its layers are"),
        ("sourced.py:Greedy", "Greedy takes no target below it"),
        ("nowhere", "there is no layer 'nowhere'"),
        ("", "there is no layer ''"),
    ],
)
def test_what_is_no_layer_is_told_in_a_sentence(mine: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers.build(text, Null(size=1 << 20))


def test_layers_are_near_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.BUILT_IN, "overlay", pyublk.Layer)
    with pytest.raises(ValueError, match=r"there is no layer 'overlya' \(did you mean 'overlay'"):
        layers.build("overlya:file=x", Null(size=1 << 20))
    assert "overlay" in layers.names()
