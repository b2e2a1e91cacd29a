# SPDX-License-Identifier: MIT
"""Disks in an object store: made, opened, listed, kept as snapshots, cloned, removed."""

import errno
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pyublk.targets.objects.codec import Codec
from pyublk.targets.objects.failures import Changed, Exists, Failure, Missing
from pyublk.targets.objects.manifest import (
    DEFAULT_CHUNK,
    Manifest,
    entries_of,
    load_page,
    manifest_path,
    own_numbers,
)
from pyublk.targets.objects.store import Objects, Version, log

#: How deep below a prefix disks are looked for.
_DEPTH = 4
#: How often a snapshot is tried that a clean-up comes across.
_TRIES = 5


def create(
    objects: Objects,
    name: str,
    *,
    size: int,
    chunk_size: int = DEFAULT_CHUNK,
    compression: str = "none",
) -> Manifest:
    """Makes an empty disk. Raises ValueError for sizes that cannot be, Exists, and Failure for a
    store that ignores conditions."""
    manifest = Manifest.new(name, size=size, chunk_size=chunk_size, compression=compression)
    Codec(compression, chunk_size)
    objects.check_conditions(f"{name}/probe")
    _put_new(objects, name, manifest)
    return manifest


def _put_new(objects: Objects, name: str, manifest: Manifest) -> None:
    path = manifest_path(name)
    try:
        objects.put_new(path, manifest.dump())
    except Exists:
        found, _ = load(objects, name)
        if found.id != manifest.id:  # else an attempt's answer was lost
            raise Exists(errno.EEXIST, f"{objects.retrying.place} exists already") from None


def load(objects: Objects, name: str, snapshot: str | None = None) -> tuple[Manifest, Version]:
    """A disk's state as it was flushed last, or was kept as a snapshot. Raises Missing."""
    path = manifest_path(name, snapshot)
    try:
        data, version = objects.get_version(path)
    except Missing:
        what = (
            f"{name!r} has no snapshot {snapshot!r}" if snapshot else f"there is no disk {name!r}"
        )
        raise Missing(errno.ENOENT, f"{objects.retrying.place}: {what}") from None
    return Manifest.load(data, path), version


def open_for_writing(objects: Objects, name: str) -> tuple[Manifest, Version]:
    """The state of a disk that is this process's from now on: whoever had it is fenced.

    Raises Missing, and Failure for a store that ignores conditions.
    """
    found, version = load(objects, name)
    objects.check_conditions(f"{name}/probe")
    session = secrets.token_hex(8)
    while True:
        manifest = found.opened_by(session)
        try:
            version = objects.swap(manifest_path(name), manifest.dump(), version)
        except (Changed, Exists):
            found, version = load(objects, name)
            if found.session == session:
                return found, version  # an attempt whose answer was lost
            continue  # another writer was faster, or flushed: it is fenced by the next attempt
        if found.writer is not None:
            log.warning(
                "%s was not closed by %s: that one is fenced, if it still runs, and what it had "
                "not flushed is lost", objects.retrying.place, found.writer
            )  # fmt: skip
        return manifest, version


# ---- snapshots and clones ----


@contextmanager
def _without_clean_up(objects: Objects, name: str, made: str) -> Iterator[None]:
    """Removes the object `made` that was made in it, and raises Changed, if a clean-up was under
    way: it may not have known of that."""
    before = _clean_up_of(objects, name)
    if before.get("since"):
        raise Changed(
            errno.EBUSY,
            f"{objects.retrying.place} is being cleaned up since {before['since']}: try again "
            "later (or end a clean-up that was killed: pyublk s3 gc --force)",
        )
    yield
    if _clean_up_of(objects, name) != before:
        objects.delete([made])
        raise Changed(errno.EBUSY, f"{objects.retrying.place} was cleaned up meanwhile: try again")


def _clean_up_of(objects: Objects, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(objects.get_version(f"{name}/gc")[0])
    except Missing:
        return {}
    return found


def take_snapshot(objects: Objects, name: str, snapshot: str) -> Manifest:
    """Keeps the disk as it was flushed last. Raises Exists, Missing."""
    return _keep(objects, name, None, manifest_path(name, snapshot))


def _keep(objects: Objects, name: str, snapshot: str | None, path: str) -> Manifest:
    """Keeps a state of a disk in one more object, for whose sake nothing of it is cleaned up."""
    attempt = secrets.token_hex(8)
    with _without_clean_up(objects, name, path):
        found, _ = load(objects, name, snapshot)
        kept = replace(found, attempt=attempt, writer=None)
        try:
            objects.put_new(path, kept.dump())
        except Exists:
            there = Manifest.load(objects.get_version(path)[0], path)
            if there.attempt != attempt:
                place = objects.retrying.place
                raise Exists(errno.EEXIST, f"{place}: {path} exists already") from None
    return found


def clone(objects: Objects, name: str, snapshot: str | None, to: str) -> Manifest:
    """Makes a disk that begins as another one is, or was; no data is copied. Raises Exists."""
    objects.check_conditions(f"{to}/probe")
    unique = secrets.token_hex(8)
    kept = f"{name}/clones/{unique}"
    found = _keep(objects, name, snapshot, kept)
    manifest = replace(
        found,
        id=unique,
        sources=(*found.sources, f"{to}/{unique}"),
        epoch=0,
        seq=0,
        flushes=0,
        session="",
        attempt="",
        writer=None,
        parent=name,
    )
    try:
        _put_new(objects, to, manifest)
    except Exists:
        objects.delete([kept])
        raise Exists(errno.EEXIST, f"there is a disk {to!r} already") from None
    return manifest


# ---- what there is ----


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskInfo:
    """What a disk is, and has. `chunks` are those that are not all zeroes."""

    name: str
    size: int
    chunk_size: int
    compression: str
    epoch: int
    flushes: int
    writer: str | None
    parent: str | None
    chunks: int
    snapshots: list[str]
    clones: int


def info(objects: Objects, name: str, snapshot: str | None = None) -> DiskInfo:
    """Raises Missing."""
    manifest, _ = load(objects, name, snapshot)
    chunks = sum(1 for _ in _objects_of(objects, manifest, pages=False))
    return DiskInfo(
        name=name,
        size=manifest.size,
        chunk_size=manifest.chunk_size,
        compression=manifest.compression,
        epoch=manifest.epoch,
        flushes=manifest.flushes,
        writer=manifest.writer,
        parent=manifest.parent,
        chunks=chunks,
        snapshots=snapshots_of(objects, name),
        clones=len(_clones_of(objects, name)),
    )


def snapshots_of(objects: Objects, name: str) -> list[str]:
    """Their names."""
    return sorted(path.rpartition("/")[2] for path in objects.paths(f"{name}/snapshots/"))


def _clones_of(objects: Objects, name: str) -> list[str]:
    """The objects that are kept for clones."""
    return list(objects.paths(f"{name}/clones/"))


def names_below(objects: Objects, prefix: str | None, depth: int = _DEPTH) -> Iterator[str]:
    """The disks below a prefix, whose names may have several parts."""
    for folder in objects.folders(prefix):
        try:
            objects.get_version(manifest_path(folder))
        except Missing:
            if depth > 1:
                yield from names_below(objects, folder, depth - 1)
        else:
            yield folder


def _objects_of(objects: Objects, manifest: Manifest, *, pages: bool = True) -> Iterator[str]:
    """The paths of the chunks that a state consists of, and of its pages."""
    for number, entry in manifest.pages.items():
        path = manifest.page_path(number, entry)
        if pages:
            yield path
        for index, chunk in entries_of(load_page(objects, path), number):
            yield manifest.chunk_path(index, chunk)


# ---- removal ----


def clean_up(objects: Objects, name: str, *, force: bool = False) -> int:
    """Deletes the objects of a disk that neither it needs, nor its snapshots, nor its clones; the
    disk may be in use. Returns how many.

    Raises Changed if it is being cleaned up already, unless `force` says that this one was killed.
    """
    mark = f"{name}/gc"
    load(objects, name)
    before = _clean_up_of(objects, name)
    if before.get("since") and not force:
        raise Changed(
            errno.EBUSY,
            f"{objects.retrying.place} is being cleaned up since {before['since']}: if that was "
            "killed, use --force",
        )
    nonce = secrets.token_hex(8)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    # From here on no snapshot is made that is not seen below: see _without_clean_up.
    objects.put(mark, json.dumps({"nonce": nonce, "since": since}).encode())
    try:
        garbage = _garbage(objects, name)
        objects.delete(garbage)
    finally:
        objects.put(mark, json.dumps({"nonce": nonce, "since": None}).encode())
    return len(garbage)


def _garbage(objects: Objects, name: str) -> list[str]:
    # First all that there is: what is written after that is no candidate.
    manifest, _ = load(objects, name)
    own = manifest.sources[manifest.own]
    there = list(objects.paths(f"{own}/"))
    manifest, _ = load(objects, name)
    needed = set(_objects_of(objects, manifest))
    for path in (*objects.paths(f"{name}/snapshots/"), *_clones_of(objects, name)):
        kept = Manifest.load(objects.get_version(path)[0], path)
        needed.update(_objects_of(objects, kept))
    found = []
    for path in there:
        try:
            numbers = own_numbers(path)
        except ValueError:
            continue
        # Later ones may belong to the next flush.
        if path not in needed and numbers <= (manifest.epoch, manifest.seq):
            found.append(path)
    return found


def remove(
    objects: Objects, name: str, snapshot: str | None = None, *, force: bool = False
) -> None:
    """Deletes a disk with all that it has, or one of its snapshots.

    Raises Missing; and Failure (EBUSY) for a disk that is open, or has snapshots, unless `force`,
    and for one that has clones.
    """
    manifest, _ = load(objects, name, snapshot)
    if snapshot is not None:
        objects.delete([manifest_path(name, snapshot)])
        return
    place = objects.retrying.place
    if clones := _clones_of(objects, name):
        raise Failure(errno.EBUSY, f"{place} has {len(clones)} clone(s): remove these first")
    kept = snapshots_of(objects, name)
    if kept and not force:
        raise Failure(
            errno.EBUSY, f"{place} has the snapshots {', '.join(kept)}: --force removes them too"
        )
    if manifest.writer is not None and not force:
        raise Failure(
            errno.EBUSY,
            f"{place} was opened for writing by {manifest.writer}, and not closed: --force removes "
            "it even so",
        )
    objects.delete([manifest_path(name)])  # first: from now on there is no disk
    objects.delete(list(objects.paths(f"{name}/{manifest.id}/")))
    rest = [f"{name}/probe", f"{name}/gc", *objects.paths(f"{name}/snapshots/")]
    objects.delete(rest)
    if manifest.parent is not None:
        objects.delete([f"{manifest.parent}/clones/{manifest.id}"])
