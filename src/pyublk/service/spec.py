# SPDX-License-Identifier: MIT
"""What to serve and how, in a form that can be written down and given to another process."""

import inspect
import json
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

from pyublk import targets
from pyublk.device import Device
from pyublk.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpec:
    """A disk that is yet to be made.

    `target` is a name that `pyublk.targets.resolve` knows; `arguments` and `options` are the texts
    for its class's parameters. `size`, `block_size` and `read_only` go to the class as well, None
    leaves them to it. The rest goes to `Device`. Sizes are bytes.
    """

    target: str
    arguments: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    size: int | None = None
    block_size: int | None = None
    read_only: bool | None = None
    queues: int = 1
    depth: int = 128
    id: int | None = None
    max_io_size: int = 512 * 1024
    workers: int = 0
    path: str = "auto"
    batch: bool | None = None
    threads: int = 1
    partition_scan: bool = True
    affinity: list[list[int]] | Literal["auto"] | None = "auto"
    preempt: bool = False
    io_scheduler: str | None = "auto"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        fields["arguments"] = tuple(fields["arguments"])
        return cls(**fields)

    def device(self) -> Device:
        """Loads the target's class, makes a target and a Device for it, not started yet.

        Raises what `pyublk.targets`, the class and `Device` raise.
        """
        target = self._target()
        return Device(
            target,
            queues=self.queues,
            depth=self.depth,
            id=self.id,
            max_io_size=self.max_io_size,
            workers=self.workers,
            path=self.path,
            batch=self.batch,
            threads=self.threads,
            partition_scan=self.partition_scan,
            affinity=self.affinity,
            preempt=self.preempt,
            io_scheduler=self.io_scheduler,
        )

    def _target(self) -> Target:
        made = targets.resolve(self.target)
        parameters = inspect.signature(made).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        # A class need not know of these two to be served so.
        wishes = {"block_size": self.block_size, "read_only": self.read_only}
        given = {n: v for n, v in wishes.items() if n in parameters or open_ended}
        target = targets.build(made, self.options, self.arguments, size=self.size, **given)
        for name, wish in wishes.items():
            if name not in given and wish is not None:
                setattr(target, name, wish)
        return target
