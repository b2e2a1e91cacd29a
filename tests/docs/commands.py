"""The commands that the documentation shows: lines to type, and names in the text."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
_FILE = re.compile(r"# (/\S+)\n")
_SPAN = re.compile(r"`(pyublk [^`]+)`")
_ASSIGNMENT = re.compile(r"\w+=")
_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")


@dataclass(frozen=True, slots=True)
class File:
    """A block that says in its first line, `# /etc/...`, which file it is."""

    path: Path
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A line of shell, by root or by a user, and what the page says that it prints, if anything."""

    by_root: bool
    line: str
    output: str


def steps(page: Path) -> Iterator[File | Command]:
    """What a reader does who follows a page from top to bottom: files to write, commands to run."""
    for kind, body in _FENCE.findall(page.read_text()):
        if kind == "console":
            for typed in re.split(r"^(?=[#$] )", body, flags=re.M)[1:]:
                line, _, output = typed[2:].partition("\n")
                yield Command(typed[0] == "#", line, output.strip())
        elif name := _FILE.match(body):
            yield File(Path(name[1]), body)


def shown(page: Path) -> Iterator[list[str]]:
    """The arguments of each `pyublk` that a page says to type: in console blocks behind a prompt,
    in help texts, and in paragraphs set in by four spaces."""
    text = page.read_text()
    lines = []
    for kind, body in _FENCE.findall(text):
        start = {"console": r"[#$] ", "text": r"  (?=pyublk )"}.get(kind)
        if start:
            lines += re.findall(rf"^{start}(.*)", body, re.M)
    lines += re.findall(r"^    (.*\bpyublk .*)", _FENCE.sub("", text), re.M)
    for line in lines:
        yield from arguments(line)


def named(page: Path) -> Iterator[list[str]]:
    """The arguments of each `pyublk ...` in a sentence, which may leave out what is needed."""
    for span in _SPAN.findall(_FENCE.sub("", page.read_text())):
        yield from arguments(re.sub(r"\s+", " ", span))


def arguments(line: str) -> Iterator[list[str]]:
    """The arguments of each `pyublk` in a line of shell, that of `eval "$(pyublk ...)"` too."""
    for inner in _SUBSTITUTION.findall(line):
        yield from arguments(inner)
    words = shlex.shlex(_SUBSTITUTION.sub("it", line), posix=True, punctuation_chars=True)
    words.commenters = "#"
    words.whitespace_split = True
    simple: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("();<>|&"):
            simple.append([])
        else:
            simple[-1].append(word)
    for command in simple:
        while command and _ASSIGNMENT.match(command[0]):
            command.pop(0)
        if command and command[0] == "pyublk":
            yield command[1:]
