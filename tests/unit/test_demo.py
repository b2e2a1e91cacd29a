"""The demonstration's own parts: what it needs, its ten-line disk, and that it notices a lie."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import pyublk
from pyublk import demo
from pyublk.testing import Disk

PAGE = Path(__file__).parents[2] / "docs" / "install.md"


def test_a_missing_program_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(demo, "PROGRAMS", {"no-such-program": "some-package"})
    assert demo.main([]) == 1
    assert capsys.readouterr().err == (
        "the demonstration failed: no-such-program is not installed: apt-get install some-package\n"
    )


def test_rot13_keeps_what_it_shows_turned() -> None:
    target = demo.Rot13(1 << 20)
    with Disk(target) as disk:
        assert disk.pread(512, 0) == bytes(512)
        disk.pwrite(b"Uryyb!..".ljust(512, b"\xff"), 4096)
        assert disk.pread(512, 4096) == b"Uryyb!..".ljust(512, b"\xff")
    assert bytes(target.data[4096:4104]) == bytes(byte + 13 for byte in b"Uryyb!..")


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    files = {"a/one": b"1", "two": b"2"}
    demo._copy(files, tmp_path)
    demo._compare(files, tmp_path)
    (tmp_path / "two").write_bytes(b"3")
    with pytest.raises(demo.Failed, match="two is not what was written"):
        demo._compare(files, tmp_path)


def test_real_files_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "FILES", 200)
    files = demo._collect_files()
    assert len(files) == 200
    assert all(0 < len(content) <= demo.LARGEST_FILE for content in files.values())
    assert not any(name.startswith("/") for name in files)


def test_the_readme_quotes_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the numbers: what the demonstration says where nothing goes wrong, in order."""
    counted = SimpleNamespace(errors=0, requests=1, bytes_read=1, bytes_written=1)
    disk = SimpleNamespace(path="/dev/ublkb0", stats=lambda: SimpleNamespace(total=counted))
    monkeypatch.setattr(pyublk, "Device", lambda *_, **__: nullcontext(disk))
    monkeypatch.setattr(demo, "DISK_SIZE", 1 << 20)
    monkeypatch.setattr(demo, "_collect_files", lambda: dict.fromkeys(map(str, range(demo.FILES))))
    monkeypatch.setattr(demo, "_verify_with_fio", lambda _: 1.0)
    monkeypatch.setattr(demo, "_mounted", lambda *_: nullcontext())
    monkeypatch.setattr(demo, "_is_emulated", lambda: True)
    for step in ("_run", "_copy", "_compare"):
        monkeypatch.setattr(demo, step, lambda *_: None)
    demo._run_here()
    said = capsys.readouterr().out

    quoted = re.search(r"\$ \./run demo\n\.\.\.\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert quoted is not None
    assert without_numbers(quoted[1]) == without_numbers(said)


def without_numbers(text: str) -> str:
    return re.sub(r"[\d.]+", "N", re.sub(r"(?m)^kernel [^,]+", "kernel R", text))
