"""Notes that survive a power cut: `save` returns when the note is durable."""

import os
from pathlib import Path


def save(directory: Path, name: str, text: str) -> None:
    """Replaces the note: after a power cut it has the old text or the new one, and the new one if
    `save` had returned."""
    fresh = directory / f"{name}.new"
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(directory / name)
    _sync_directory(directory)


def load(directory: Path, name: str) -> str:
    """The note's text."""
    return (directory / name).read_text()


def _sync_directory(directory: Path) -> None:
    """Makes durable which files the directory has: fsync of a file says nothing of its name."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
