"""The binding of the C core: `Ring`, `Queue`, `IO`, control commands, native targets."""

from pyublk._binding.buffers import Buffers, CharDevice, address
from pyublk._binding.control import (
    HELPER_PROGRAM,
    Helper,
    WriteInChild,
    open_private,
    process,
    spawn_helper_for,
    spawn_helpers_by,
    write_in_child,
)
from pyublk._binding.dispatcher import Dispatcher
from pyublk._binding.gate import Gate, GateRule
from pyublk._binding.io import IO, Handlers
from pyublk._binding.layout import Layout
from pyublk._binding.mapped import MappedQueue, Mapper
from pyublk._binding.mirror import MirrorLayout
from pyublk._binding.nbd import ConnectedQueue
from pyublk._binding.presence import FileMemory, PresenceLayout
from pyublk._binding.queue import Queue
from pyublk._binding.ring import Ring
from pyublk._binding.set import QueueSet
from pyublk._binding.shared import SharedTable
from pyublk._binding.targets import NULL_HANDLER, Ram, ShardedLock
from pyublk._binding.threads import become_io_flusher, name_thread, this_thread
from pyublk._binding.trace import TraceBuffer

__all__ = [
    "HELPER_PROGRAM",
    "IO",
    "NULL_HANDLER",
    "Buffers",
    "CharDevice",
    "ConnectedQueue",
    "Dispatcher",
    "FileMemory",
    "Gate",
    "GateRule",
    "Handlers",
    "Helper",
    "Layout",
    "MappedQueue",
    "Mapper",
    "MirrorLayout",
    "PresenceLayout",
    "Queue",
    "QueueSet",
    "Ram",
    "Ring",
    "ShardedLock",
    "SharedTable",
    "TraceBuffer",
    "WriteInChild",
    "address",
    "become_io_flusher",
    "name_thread",
    "open_private",
    "process",
    "spawn_helper_for",
    "spawn_helpers_by",
    "this_thread",
    "write_in_child",
]
