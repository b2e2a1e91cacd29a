# SPDX-License-Identifier: MIT
"""The targets that ship, and how a name and options become a target."""

from typing import TYPE_CHECKING, Any

from pyublk.named import Registry, build
from pyublk.sizes import format_size, parse_size
from pyublk.target import Target
from pyublk.targets.file import File
from pyublk.targets.integrity import IntegrityFile
from pyublk.targets.linear import Linear
from pyublk.targets.mirror import Mirror
from pyublk.targets.null import Null
from pyublk.targets.ram import Ram
from pyublk.targets.slice import Slice
from pyublk.targets.stripe import Stripe
from pyublk.targets.zoned import Zoned

__all__ = [
    "File",
    "IntegrityFile",
    "Linear",
    "Mirror",
    "NBDKit",
    "Null",
    "Ram",
    "Slice",
    "Stripe",
    "Zoned",
    "build",
    "format_size",
    "names",
    "parse_size",
    "resolve",
]

#: Classes by short name, or their places, "module:Class", which are imported when they are asked
#: for: those of targets that few disks need, or that need other packages.
BUILT_IN: dict[str, type[Target] | str] = {
    "cache": "pyublk.targets.cache:CachedSource",
    "file": File,
    "image": "pyublk.targets.image:Image",
    "integrity": IntegrityFile,
    "linear": Linear,
    "mirror": Mirror,
    "nbd": "pyublk.targets.nbd:Nbd",
    "nbdkit": "pyublk.targets.nbdkit:NBDKit",
    "nbds": "pyublk.targets.nbd:NbdOverTls",
    "null": Null,
    "overlay": "pyublk.targets.overlay:OverlayFile",
    "ram": Ram,
    "rbd": "pyublk.targets.rbd:Rbd",
    "s3": "pyublk.targets.s3:S3",
    "slice": Slice,
    "stripe": Stripe,
    "http": "pyublk.targets.url:Url",
    "https": "pyublk.targets.url:Url",
    "url": "pyublk.targets.url:Url",
    "zoned": Zoned,
}

REGISTRY = Registry("target", Target, "pyublk.targets", BUILT_IN)
names = REGISTRY.names
resolve = REGISTRY.resolve

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The classes of BUILT_IN that are imported when they are asked for."""
        for short, place in BUILT_IN.items():
            if isinstance(place, str) and place.rpartition(":")[2] == name:
                return resolve(short)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
