"""Layers of a disk that is described: on the command line, in TOML, in a record, and as shown."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest

import pyublk
from pyublk.cli.adding import add
from pyublk.cli.completing import layer_texts
from pyublk.cli.listing import _stack_lines
from pyublk.cli.recovering import recover_
from pyublk.cli.upgrading import upgrade_
from pyublk.layers import changed, first_that_forgets, keeps_data, own_status, stack
from pyublk.layers.cache import Cache
from pyublk.layers.overlay import Overlay
from pyublk.service import definitions
from pyublk.service.definitions import Action
from pyublk.service.plan import DiskSpec, TakeOver, of_request, to_request
from pyublk.service.requests import ServedDisk, _statuses
from pyublk.targets import File, Mirror, Null
from pyublk.testing import Disk

LAYERS = """
import pyublk
class Flipped(pyublk.Layer):
    recoverable = True
    def __init__(self, below, mask: int = 255, *, name: str = "x"):
        super().__init__(below)
        self.mask, self.label, self.reads = mask, name, 0
    def read(self, offset, buffer):
        self.reads += 1
        self.below.read(offset, buffer)
        buffer[:] = bytes(one ^ self.mask for one in buffer)
    def write(self, offset, data):
        self.below.write(offset, memoryview(bytes(one ^ self.mask for one in data)))
    def status(self):
        return {"reads": self.reads}
class Forgetful(pyublk.Layer):
    pass
class Outlives(Flipped):
    outlives_below = True
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flipping.py").write_text(LAYERS)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 16))
    return tmp_path


SPEC = DiskSpec(
    target="file",
    arguments=("disk.img",),
    layers=("flipping.py:Flipped:mask=15,name=a,,b", "flipping.py:Flipped"),
)


def test_layers_lie_over_the_target_in_order(folder: Path) -> None:
    made = SPEC.make_target()
    kinds = [type(one).__name__ for one in stack(made)]
    assert kinds == ["Flipped", "Flipped", "File"]
    assert [cast(Any, one).mask for one in stack(made)[:2]] == [255, 15]
    assert cast(Any, stack(made)[1]).label == "a,b"
    with Disk(made) as disk:
        assert disk.pread(512, 0) == bytes([255 ^ 15]) * 512
        disk.pwrite(b"\xff" * 512, 0)
    assert (folder / "disk.img").read_bytes()[:512] == bytes([15]) * 512


def test_toml_has_them_as_texts(folder: Path) -> None:
    text = (
        'target = "file"\narguments = ["disk.img"]\n'
        'layers = ["flipping.py:Flipped:mask=15,name=a,,b", "flipping.py:Flipped"]\n'
    )
    assert DiskSpec.from_toml(text) == SPEC
    for wrong in ('"cache"', "[1]", "{}"):
        with pytest.raises(ValueError, match=r"line 2: layers must be a list of texts such as"):
            DiskSpec.from_toml(f'target = "ram"\nlayers = {wrong}\n')
    with pytest.raises(ValueError, match=r"no key 'layer' \(did you mean 'layers'\?\)"):
        DiskSpec.from_toml('target = "ram"\nlayer = []\n')


def test_they_are_recorded_and_handed_on(folder: Path) -> None:
    assert DiskSpec.from_fields(json.loads(json.dumps(asdict(SPEC)))) == SPEC
    asked = json.loads(json.dumps(to_request(SPEC, TakeOver(3, served=True))))
    assert of_request(asked) == (SPEC, TakeOver(3, served=True))
    # What older versions wrote has none, and their servers are not asked for what they lack.
    plain = replace(SPEC, layers=())
    older = {name: value for name, value in asdict(plain).items() if name != "layers"}
    assert DiskSpec.from_fields(older) == plain
    assert "layers" not in to_request(plain, None)["spec"]


def test_another_list_of_layers_is_another_disk(folder: Path) -> None:
    spec = replace(SPEC, name="images", file="/etc/pyublk/disks.toml")
    record = SimpleNamespace(id=0, plan=spec, server_name=None)
    for layers, action in ((spec.layers, Action.KEEP), (spec.layers[:1], Action.RECREATE)):
        wanted = definitions.Definition(spec=replace(spec, layers=layers))
        (step,) = definitions.steps([wanted], [], [cast(Any, record)])
        assert step.action is action
    assert step.differences == (
        'layers from ["flipping.py:Flipped:mask=15,name=a,,b", "flipping.py:Flipped"] to '
        '["flipping.py:Flipped:mask=15,name=a,,b"]',
    )


def test_a_stack_keeps_data_when_each_of_it_does(folder: Path) -> None:
    def made(*names: str, target: str = "file") -> pyublk.Target:
        arguments = ("disk.img",) if target == "file" else ()
        options = {} if target == "file" else {"size": "64K"}
        texts = tuple(f"flipping.py:{name}" for name in names)
        return DiskSpec(
            target=target, arguments=arguments, options=options, layers=texts
        ).make_target()

    assert keeps_data(made("Flipped", "Flipped"))
    forgets = first_that_forgets(made("Forgetful", "Flipped"))
    assert type(forgets).__name__ == "Forgetful"
    assert not keeps_data(made("Flipped", target="ram"))
    assert keeps_data(made("Outlives", target="ram"))
    assert not keeps_data(made("Outlives", "Forgetful", target="ram"))
    spec = replace(SPEC, layers=("flipping.py:Forgetful",))
    with pytest.raises(pyublk.InvalidTarget, match="Forgetful does not say that it keeps what"):
        spec.device(TakeOver(5))


# ---- on the command line ----


def test_the_command_line_gives_them_in_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[DiskSpec] = []
    monkeypatch.setattr("pyublk.cli.adding.open_controller", lambda: SimpleNamespace(close=int))
    monkeypatch.setattr("pyublk.cli.adding.daemon.start", lambda spec, **_: given.append(spec))
    layers = [f"--layer={text}" for text in SPEC.layers]
    add.main(["file", "disk.img", *layers], standalone_mode=False)
    assert given == [SPEC]
    (folder / "disk.toml").write_text(
        'target = "file"\narguments = ["disk.img"]\nlayers = ["flipping.py:Forgetful"]\n'
    )
    add.main(["--spec", "disk.toml"], standalone_mode=False)
    assert given[-1].layers == ("flipping.py:Forgetful",)
    add.main(["--spec", "disk.toml", *layers], standalone_mode=False)
    assert given[-1].layers == SPEC.layers


def test_layers_are_for_a_target_that_is_named() -> None:
    with pytest.raises(click.UsageError, match="--layer is for another TARGET"):
        recover_.main(["0", "--layer", "x.py:X"], standalone_mode=False)


def test_layers_and_their_options_are_completed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pyublk.layers.BUILT_IN, "overlay", pyublk.Layer)

    def completed(text: str) -> set[str]:
        return {item.value for item in layer_texts(text)}

    assert completed("over") == {"overlay"}
    assert completed("flipping.py:F") == {"flipping.py:Flipped", "flipping.py:Forgetful"}
    place = "flipping.py:Flipped:"
    assert completed(place) == {f"{place}mask=", f"{place}name="}
    assert completed(f"{place}mask=1,n") == {f"{place}mask=1,name="}
    assert [item.type for item in layer_texts("flip")] == ["file"]


# ---- what is shown ----


def served(spec: DiskSpec, target: pyublk.Target) -> ServedDisk:
    disk = SimpleNamespace(device=SimpleNamespace(target=target), record=SimpleNamespace(plan=spec))
    return cast(ServedDisk, disk)


def test_the_channel_tells_of_each_of_a_stack(folder: Path) -> None:
    made = SPEC.make_target()
    with Disk(made) as disk:
        disk.pread(4096, 0)
        told = json.loads(json.dumps(_statuses(served(SPEC, made))))
    assert told == {
        "target_status": None,
        "stack": [
            {"class": "Flipped", "status": {"reads": 1}},
            {"class": "Flipped", "status": {"reads": 1}},
            {"class": "File", "status": None},
        ],
    }
    plain = Null(size=4096)
    spec = DiskSpec(target="null")
    assert _statuses(served(spec, plain)) == {"target_status": None, "stack": None}


def test_a_mirror_below_layers_tells_of_its_legs(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).write_bytes(bytes(1 << 16))
    mirror = Mirror(Path("a"), Path("b"), size=1 << 16)
    layer = pyublk.Layer(mirror)
    spec = DiskSpec(target="mirror", layers=("some:Layer",))
    with Disk(layer):
        told = _statuses(served(spec, layer))
        assert own_status(layer) is None
    assert [Path(leg["path"]).name for leg in told["target_status"]["legs"]] == ["a", "b"]
    assert [one["class"] for one in told["stack"]] == ["Layer", "Mirror"]
    assert told["stack"][0]["status"] is None
    assert len(told["stack"][1]["status"]["legs"]) == 2


def test_each_layer_of_a_stack_has_counters_of_its_own(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"b" * (1 << 20))
    overlay = Overlay(File(base), tmp_path / "overlay", granularity=8192)
    cache = Cache(overlay, tmp_path / "cache", readahead=0)
    spec = DiskSpec(target="file", layers=("overlay:file=overlay", "cache:file=cache"))
    with Disk(cache) as disk:
        for _ in range(3):
            assert disk.pread(4096, 0) == b"b" * 4096
        disk.pwrite(b"w" * 512, 0)
        told = _statuses(served(spec, cache))
    assert [one["class"] for one in told["stack"]] == ["Cache", "Source", "Overlay", "File"]
    above, below = told["stack"][0]["status"], told["stack"][2]["status"]
    # It fetches once; the write finds its block, and passes on.
    assert (above["hits"], above["misses"], above["copy_ups"]) == (3, 1, 0)
    assert above["fetched_bytes"] == 64 << 10
    # What is fetched is in the base; of the block that is written to, the rest is copied up.
    assert (below["hits"], below["misses"], below["copy_ups"]) == (0, 2, 1)
    shown = [words for _, words in _stack_lines(told["stack"])]
    assert {"   hits: 3", "         hits: 0", "         copy_ups: 1"} <= set(shown)


def test_overlays_and_caches_keep_their_size(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(1 << 20))
    overlay = Overlay(File(base), tmp_path / "overlay")
    cache = Cache(overlay, tmp_path / "cache")
    top = pyublk.Layer(cache)
    asked: list[int] = []
    with Disk(top):
        with pytest.raises(ValueError, match="a cache has the size of its source: stop the disk"):
            top.resize(2 << 20, asked.append)
        with pytest.raises(ValueError, match=r"is of one size: .* --base overlay:.*/over"):
            overlay.resize(2 << 20, asked.append)
    assert asked == []
    assert base.stat().st_size == 1 << 20


def test_options_of_a_layer_are_changed_by_its_name() -> None:
    texts = ["cache:file=a,,b,limit=1G", "some:Layer", "x.py:Layer:a=1"]
    assert changed(texts, []) == tuple(texts)
    assert changed(texts, ["cache:limit=2G,mode=write-back", "some:Layer:k=v"]) == (
        "cache:file=a,,b,limit=2G,mode=write-back",
        "some:Layer:k=v",
        "x.py:Layer:a=1",
    )
    assert changed(texts, ["x.py:Layer:a=2", "x.py:Layer:b=,,"])[2] == "x.py:Layer:a=2,b=,,"


@pytest.mark.parametrize(
    ("texts", "change", "words"),
    [
        ([], "cache:limit=2G", "no layer 'cache'.*its layers are none"),
        (["overlay:file=a"], "cache:limit=2G", "its layers are overlay$"),
        (["cache:file=a", "cache:file=b"], "cache:limit=2G", "2 layers 'cache'"),
        (["cache:file=a"], "cache", "no option to change: write NAME:KEY=VALUE"),
        (["cache:file=a"], "cache:limit", "is not KEY=VALUE"),
    ],
)
def test_a_change_of_a_layer_that_is_refused(texts: list[str], change: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        changed(texts, [change])


def test_layers_of_all_disks_are_not_changed_together() -> None:
    with pytest.raises(click.UsageError, match="--layer is for one disk"):
        upgrade_.callback("all", {}, ("cache:limit=2G",), False)  # type: ignore[misc]


def test_the_stack_is_shown_as_a_tree() -> None:
    told = [
        {"class": "Cache", "status": {"hits": 3, "misses": 1}},
        {"class": "Overlay", "status": None},
        {"class": "Mirror", "status": {"legs": [{"path": "a"}, {"path": "b"}]}},
    ]
    assert [f"{name:<6}|{words}" for name, words in _stack_lines(told)] == [
        "stack |Cache",
        "      |   hits: 3",
        "      |   misses: 1",
        "      |└─ Overlay",
        "      |   └─ Mirror",
        "      |         legs: path a",
        "      |         legs: path b",
    ]


def test_what_is_called_below_but_is_no_target_ends_the_stack() -> None:
    class Odd(Null):
        below = 3

    odd = Odd(size=4096)
    assert stack(odd) == [odd]
    assert stack(pyublk.Layer(File("x")))[1].__class__ is File
