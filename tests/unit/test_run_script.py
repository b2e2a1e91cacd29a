"""The script `run`: its help is there from anywhere, and wrong words are told."""

import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "run"


def call(place: str, directory: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [place, *words], cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help_from_another_directory_and_by_a_link(word: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(RUN)
    for place in (str(RUN), f"{tmp_path}/link", "./link"):
        done = call(place, tmp_path, word)
        assert done.returncode == 0
        assert "./run test" in done.stdout
        assert done.stderr == ""


@pytest.mark.parametrize(("words", "told"), [([], ""), (["tets"], "run: there is no tets\n")])
def test_nothing_and_unknown_words_are_wrong_usage(
    words: list[str], told: str, tmp_path: Path
) -> None:
    done = call(str(RUN), tmp_path, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(told + "Sets up")
