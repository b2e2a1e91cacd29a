# SPDX-License-Identifier: MIT
"""How requests reach a target: an engine for each kind of target.

`engine_for` is the only place that tells the kinds apart. Real disks (`pyublk.session`) and those
without a kernel (`pyublk.testing.Disk`) are served by the same engines, and layers call what lies
below them by theirs.
"""

from pyublk.engines.base import Engine
from pyublk.engines.checks import dispatch_of
from pyublk.engines.mapped import MappedEngine
from pyublk.engines.methods import MethodsEngine
from pyublk.engines.native import NativeEngine
from pyublk.target import Target

__all__ = ["Engine", "dispatch_of", "engine_for"]


def engine_for(target: Target) -> Engine:
    """The engine of the target's kind; raises InvalidTarget for one that cannot be served."""
    kind = dispatch_of(target)
    if kind == "async":
        # Event loops are for disks that need one: asyncio is half of an import's cost.
        from pyublk.engines.coroutines import CoroutinesEngine

        return CoroutinesEngine(target)
    if kind == "connected":
        from pyublk.engines.connected import ConnectedEngine

        return ConnectedEngine(target)
    engines: dict[str, type[Engine]] = {
        "native": NativeEngine,
        "mapped": MappedEngine,
        "sync": MethodsEngine,
    }
    return engines[kind](target)
