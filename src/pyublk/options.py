# SPDX-License-Identifier: MIT
"""The options of a disk: each once, with its type, default, bounds, unit and help.

`Device`, `DiskSpec`, TOML and `pyublk add` derive their parameters, checks, defaults, help and
completion from here. The definition is a TypedDict, not a dataclass, because that is what
`**options: Unpack[DeviceOptions]` takes: type checkers and editors know each keyword argument of
`Device` by it, without a second list of them.
"""

import difflib
import inspect
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypedDict, TypeVar, cast

from pyublk.arguments import DEFAULT_DEPTH, DEFAULT_MAX_IO_SIZE, seconds, whole
from pyublk.paths import DataPath
from pyublk.recovery import Recovery
from pyublk.scheduling import Affinity, checked_affinity, parse_affinity
from pyublk.sizes import format_size, parse_size
from pyublk.uapi import MAX_DEVICES, MAX_QUEUE_DEPTH, MAX_QUEUES

C = TypeVar("C", bound=type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of a disk.

    Args:
        help: a sentence for the command's help; Python's has it too, and `more` after it.
        default: what it is when nobody asks. `default_text` says what None means then.
        unit: of a number: "bytes" may be written as 1G or 512MiB, "seconds" as a fraction.
        least, most, step: bounds of a number, and what it is a multiple of.
        words: texts for values that are no numbers, such as None, in TOML and on the command line.
        choices: the only texts allowed.
        metavar: what stands for the value in the command's help.
        lasting: it is the kernel's device's, for as long as that is there: whoever takes it over
            gets it with the device.
        name, kind, nullable, literals: of the definition: the key, its type, whether it may be
            None, and the texts that Python callers may pass beside the type.
    """

    help: str
    more: str = ""
    default: Any = None
    default_text: str = ""
    unit: Literal["", "bytes", "seconds"] = ""
    least: int | None = None
    most: int | None = None
    step: int = 1
    words: Mapping[str, object] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    metavar: str = "N"
    lasting: bool = False
    name: str = ""
    kind: type = object
    nullable: bool = False
    literals: tuple[object, ...] = ()

    # ---- checks ----

    def check(self, value: object) -> Any:
        """The value that a Python caller passed. Raises ValueError: what it must be."""
        others = [repr(one) for one in self.literals] + (["None"] if self.nullable else [])
        return self._checked(value, others)

    def parse(self, text: str) -> Any:
        """The value that a text on the command line stands for. Raises ValueError."""
        if text in self.words:
            return self.words[text]
        try:
            value = self._read(text)
        except ValueError:
            raise ValueError(self._sentence(list(self.words), text)) from None
        return self.load(value)

    def load(self, value: object) -> Any:
        """The value that stands in a TOML file. Raises ValueError."""
        if isinstance(value, str) and self._reads(value):
            return self.parse(value)
        try:
            return self._checked(value, list(self.words))
        except ValueError:
            raise ValueError(self._sentence(list(self.words), value)) from None

    def _reads(self, text: str) -> bool:
        """Whether a text in TOML means more than itself: a size, a word, or CPUs."""
        return text in self.words or self.unit == "bytes" or self.kind is object

    def _read(self, text: str) -> object:
        if self.unit == "bytes":
            return parse_size(text)
        if self.kind is int:
            return int(text)
        if self.kind is float:
            return float(text)
        return parse_affinity(text) if self.kind is object else text

    def _checked(self, value: object, others: list[str]) -> object:
        if (value is None and self.nullable) or (isinstance(value, str) and value in self.literals):
            return value
        if self.kind is object:
            sets = checked_affinity(cast(Affinity, value), None)
            return sets if sets is None or sets == "auto" else [sorted(cpus) for cpus in sets]
        try:
            fits = self._fitting(value)
        except ValueError:
            if self.kind is int and not others:
                raise
            fits = None
        if fits is None:
            raise ValueError(self._sentence(others, value))
        return fits

    def _fitting(self, value: object) -> object:
        """The value, or None for one that is out of bounds."""
        if self.kind is int:
            number = whole(self.name, value)
            least = number if self.least is None else self.least
            most = number if self.most is None else self.most
            return number if least <= number <= most and number % self.step == 0 else None
        if self.kind is float:
            return seconds(self.name, value, zero=self.least == 0)
        if self.kind is str:
            allowed = not self.choices or value in self.choices
            return value if isinstance(value, str) and allowed else None
        return value if isinstance(value, bool) else None

    def _sentence(self, others: list[str], value: object) -> str:
        allowed = self.allowed() if self.kind is not object else "sets of CPUs such as 0-3:4-7"
        return f"{self.name} must be {' or '.join([allowed, *others])}, not {value!r}"

    def allowed(self) -> str:
        """What a value must be, in words."""
        if self.kind is int:
            said = "a size such as 1G or 512MiB" if self.unit == "bytes" else "a whole number"
            if self.least is not None:
                said = f"at least {self.least}"
            if self.most is not None:
                said = f"{self.least} to {self.most}"
                if self.step > 1:
                    said = f"a multiple of {self.step} from {said}"
            return said
        if self.kind is float:
            return (
                "a number of seconds, 0 or more"
                if self.least == 0
                else "a number of seconds above 0"
            )
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return "a text" if self.kind is str else "true or false"

    # ---- for help ----

    @property
    def flag(self) -> str:
        """As on the command line."""
        return f"--{self.name.replace('_', '-')}"

    def texts(self) -> list[str]:
        """What can be completed."""
        return [*self.words, *self.choices]

    def about_value(self) -> str:
        """Default and bounds, as they stand at the end of the command's help."""
        default = self.default_text
        if not default and self.default is not None and self.default is not False:
            default = self._shown(self.default)
        bounds = ""
        if self.least is not None and self.kind is int and self.unit != "bytes":
            bounds = self.allowed()
        said = [f"default: {default}"] if default else []
        return "; ".join([*said, bounds] if bounds else said)

    def paragraph(self) -> str:
        """As it stands under `Args` in a docstring."""
        said = f"{self.name}: {self.help} {self.more}".rstrip()
        return textwrap.fill(said, 100, initial_indent=" " * 8, subsequent_indent=" " * 12) + "\n"

    def _shown(self, value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int) and self.unit == "bytes":
            return format_size(value)
        return f"{value:g}" if isinstance(value, float) else str(value)


class DeviceOptions(TypedDict, total=False):
    """What `Device` takes besides the target."""

    queues: Annotated[
        int | Literal["max"],
        Option(
            help="Hardware queues, a thread each; max: one for each CPU.",
            more="More than CPUs are refused, unless `clamp_queues` is set.",
            default=1,
            least=1,
            most=MAX_QUEUES,
            words={"max": "max"},
            lasting=True,
        ),
    ]
    clamp_queues: Annotated[
        bool,
        Option(
            help="Make one queue for each CPU when more are asked for.",
            more="Without it, the start is refused.",
            default=False,
            lasting=True,
        ),
    ]
    depth: Annotated[
        int,
        Option(
            help="Requests in flight for each queue.",
            default=DEFAULT_DEPTH,
            least=1,
            most=MAX_QUEUE_DEPTH,
            lasting=True,
        ),
    ]
    id: Annotated[
        int | None,
        Option(
            help="The N of /dev/ublkbN.",
            default_text="the lowest free",
            least=0,
            most=MAX_DEVICES - 1,
            lasting=True,
        ),
    ]
    max_io_size: Annotated[
        int,
        Option(
            help="Size of the largest request, and of each request's buffer.",
            more="A multiple of 4096 bytes up to 32 MiB. Kernels before 6.18 split requests at "
            "1280 KiB whatever is asked for, later ones at 4 MiB.",
            default=DEFAULT_MAX_IO_SIZE,
            unit="bytes",
            least=4096,
            most=32 << 20,
            step=4096,
            metavar="SIZE",
            lasting=True,
        ),
    ]
    workers: Annotated[
        int | None,
        Option(
            help="Threads for a parallel target whose methods block.",
            more="They run the handlers of a target with plain methods; 0: the queues' threads do. "
            "None: as many as the target's attribute `workers` says, which mostly is 0.",
            default_text="as many as the target says",
            least=0,
        ),
    ]
    path: Annotated[
        DataPath | str,
        Option(
            help="Data path: auto, copy, user-copy, zero-copy, auto-buffer; get-data for "
            "compatibility.",
            more='A `pyublk.DataPath`; "auto" takes the best that target and kernel support. '
            "One that the kernel lacks is refused (FeatureMissing). "
            '"get-data" gains nothing: its writes are slower than those of "copy".',
            default="auto",
            choices=("auto", *DataPath),
            metavar="NAME",
            lasting=True,
        ),
    ]
    batch: Annotated[
        bool | None,
        Option(
            help="Batch I/O: one command for many requests (Linux 7.0).",
            default_text="where the kernel has it",
            lasting=True,
        ),
    ]
    threads: Annotated[
        int,
        Option(
            help="Threads for each queue (Linux 6.16).",
            more="There for compatibility with other servers: with batch I/O one thread may take "
            "all requests, and for methods that wait `workers` gain more. Calls of a `serial` or "
            "`per_queue` target still take turns.",
            default=1,
            least=1,
            most=MAX_QUEUE_DEPTH,
        ),
    ]
    trim_after: Annotated[
        float | None,
        Option(
            help="Idle time after which a queue gives back the memory of its buffers, or never.",
            more="It may take up to twice as long, since the queue checks once in that time. None: "
            "never. It has no effect with several `threads`. A server that had 64 reads of 1 MiB "
            "at once took 18 MiB with it, and 145 without (2026-11-28, Linux 7.3.4, "
            "`python -m benchmarks.memory --vm`).",
            default=60.0,
            unit="seconds",
            words={"never": None},
            metavar="SECONDS",
        ),
    ]
    partition_scan: Annotated[
        bool,
        Option(
            help="Look for partitions when the disk starts.",
            more="False (Linux 7.0) keeps the kernel from reading the partition table of an image "
            "that you do not trust; BLKRRPART (`blockdev --rereadpt`) reads it later.",
            default=True,
            lasting=True,
        ),
    ]
    shared_memory: Annotated[
        bool,
        Option(
            help="Allow memory to be shared with clients (Linux 7.1).",
            more="`Device.share` shares it.",
            default=False,
            lasting=True,
        ),
    ]
    affinity: Annotated[
        Affinity,
        Option(
            help="CPUs of the queues' threads: 0-3 for one queue, 0-3:4-7 for two; any: all CPUs.",
            more='"auto" keeps each thread on the CPUs whose requests it gets: the kernel '
            "allocates its buffers on their NUMA node, on first use. In Python a sequence of sets "
            "of CPUs, one for each queue, or None, which leaves the choice to the scheduler.",
            default="auto",
            default_text="auto: the CPUs whose requests the queue gets",
            words={"auto": "auto", "any": None},
            metavar="LIST",
        ),
    ]
    preempt: Annotated[
        bool,
        Option(
            help="Let the queues' threads preempt clients; otherwise requests gather until a "
            "client pauses.",
            more="Without it, threads run under SCHED_BATCH, unless the process has a policy of "
            "its own.",
            default=False,
        ),
    ]
    io_scheduler: Annotated[
        str | None,
        Option(
            help="The disk's I/O scheduler; auto: none, except for zoned disks; default: "
            "the kernel's choice.",
            more="In Python, None is the kernel's choice.",
            default="auto",
            words={"default": None},
            metavar="NAME",
            lasting=True,
        ),
    ]
    stop_timeout: Annotated[
        float,
        Option(
            help="How long a handler may hang before a stop gives it up.",
            more="Seconds without progress; at least the target's `max_stall`.",
            default=10.0,
            unit="seconds",
            least=0,
            metavar="SECONDS",
        ),
    ]
    recovery: Annotated[
        Recovery | str,
        Option(
            help="What becomes of the disk if its server dies: none (it is deleted), resend "
            "(requests wait for the next server), fail (they fail until then; Linux 6.13).",
            more="A `pyublk.Recovery`. The next server is started with `Device.take_over`; until "
            'then the disk waits, or is deleted by hand. With "resend", `Device.swap` exchanges '
            "the target while the disk is in use.",
            default="none",
            choices=tuple(Recovery),
            metavar="MODE",
            lasting=True,
        ),
    ]
    deadline: Annotated[
        float,
        Option(
            help="How long each control command may take.",
            default=30.0,
            unit="seconds",
            metavar="SECONDS",
        ),
    ]


class TargetOptions(TypedDict, total=False):
    """What goes to the target's class, whatever the target."""

    size: Annotated[
        int | None,
        Option(help="Size of the disk, such as 1G or 512MiB.", unit="bytes", metavar="SIZE"),
    ]
    block_size: Annotated[
        int | None,
        Option(
            help="Smallest unit of I/O.",
            default_text="the target's",
            unit="bytes",
            metavar="SIZE",
        ),
    ]
    read_only: Annotated[
        bool | None,
        Option(help="Refuse writes.", default_text="the target's"),
    ]


class DiskOptions(TargetOptions, DeviceOptions, total=False):
    """The options of a disk, besides its target's class and that class's own parameters."""

    user: Annotated[
        str | None,
        Option(
            help="User that the server becomes once the disk is there, without any capability.",
            default_text="whoever starts it",
            metavar="NAME",
        ),
    ]
    shared_memory_size: Annotated[
        int,
        Option(
            help="With --shared-memory: how much; `pyublk info` shows where clients find it.",
            default=16 << 20,
            unit="bytes",
            least=4096,
            most=4 << 30,
            step=4096,
            metavar="SIZE",
        ),
    ]
    restart: Annotated[
        bool | None,
        Option(
            help="Start the server again when it is killed or crashes; the disk then has "
            "recovery resend, if no other is given.",
            default_text="where target and kernel allow it",
        ),
    ]
    fault: Annotated[
        str | None,
        Option(
            help="Rules for its requests, such as fail:op=write,nth=3 or profile:NAME, with "
            "semicolons between them (see `pyublk fault`).",
            default_text="none",
            metavar="RULES",
        ),
    ]
    limit: Annotated[
        str | None,
        Option(
            help="Requests and bytes a second, such as iops=100,burst=1 or bandwidth=10M.",
            default_text="none",
            metavar="LIMIT",
        ),
    ]
    root_storage: Annotated[
        bool,
        Option(
            help="The machine's root file system is on the disk: systemd lets its server live "
            "until the machine is off.",
            default=False,
        ),
    ]
    hang_timeout: Annotated[
        float | None,
        Option(
            help="Kill and restart a server that answers nothing for so long, or never.",
            default_text="never",
            unit="seconds",
            words={"never": None},
            metavar="SECONDS",
        ),
    ]


def options_of(definition: type) -> dict[str, Option]:
    """The options that a TypedDict defines, by name."""
    return {
        name: _option(name, hint)
        for name, hint in typing.get_type_hints(definition, include_extras=True).items()
    }


def _option(name: str, hint: Any) -> Option:
    kind: Any
    option: Option
    kind, option = typing.get_args(hint)
    parts = typing.get_args(kind) or (kind,)
    plain = [one for one in parts if one in (int, float, bool, str)]
    return replace(
        option,
        name=name,
        kind=plain[0] if plain else object,
        nullable=types.NoneType in parts,
        literals=tuple(
            word
            for one in parts
            if typing.get_origin(one) is Literal
            for word in typing.get_args(one)
        ),
    )


#: By name: what `Device` takes, and what a disk that is described takes.
DEVICE = options_of(DeviceOptions)
DISK = options_of(DiskOptions)


def complete(asked: DeviceOptions) -> DeviceOptions:
    """What was asked of a `Device`, checked, with the defaults for the rest.

    Raises ValueError for a value that is not allowed, TypeError for a name that there is not.
    """
    for name in asked.keys() - DEVICE.keys():
        raise TypeError(f"Device takes no option {name!r}{near(name, DEVICE)}")
    given = cast("dict[str, Any]", asked)
    found = {
        name: option.check(given[name]) if name in given else option.default
        for name, option in DEVICE.items()
    }
    return cast(DeviceOptions, found)


def complete_for(device: str, asked: DeviceOptions) -> DeviceOptions:
    """As `complete`, for who takes over a `device`, which has its own values of lasting options."""
    for name in asked.keys() & {name for name, option in DEVICE.items() if option.lasting}:
        raise TypeError(f"{name} is {device}'s, and stays as it is: leave it out")
    return complete(asked)


def number_of_queues(options: DeviceOptions) -> int:
    """How many queues are asked for, on this machine."""
    queues, cpus = options["queues"], os.cpu_count() or 1
    if queues == "max":
        return cpus
    return min(queues, cpus) if options["clamp_queues"] else queues


def near(name: str, choices: typing.Iterable[str]) -> str:
    """A question that suggests what was meant, if anything is near it."""
    close = difflib.get_close_matches(name, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def documented(options: Mapping[str, Option]) -> Callable[[C], C]:
    """Shows the options in the signature and the documentation of a class whose constructor takes
    them as `**options`."""

    def decorate(cls: C) -> C:
        init: Any = vars(cls)["__init__"]
        signature = inspect.signature(init)
        parameters = list(signature.parameters.values())[:-1]
        hints = typing.get_type_hints(DiskOptions)
        for option in options.values():
            parameters.append(
                inspect.Parameter(
                    option.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=option.default,
                    annotation=hints.get(option.name, option.kind),
                )
            )
        init.__signature__ = signature.replace(parameters=parameters)
        if cls.__doc__ is not None:  # as it is under -OO
            paragraphs = "".join(option.paragraph() for option in options.values())
            cls.__doc__ = re.sub(r" *\*\*options: .*\n", lambda _: paragraphs, cls.__doc__)
        return cls

    return decorate
