"""The demonstration's own parts: what it needs, its ten-line disk, and that it notices a lie."""

from pathlib import Path

import pytest

from pyublk import demo
from pyublk.testing import Disk


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
