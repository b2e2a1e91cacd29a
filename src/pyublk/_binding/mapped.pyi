"""Queues that are served from a layout's files."""

from collections.abc import Callable
from typing import Self, final

from typing_extensions import disjoint_base

from pyublk._binding.buffers import Buffers, CharDevice
from pyublk._binding.gate import Gate
from pyublk._binding.io import IO
from pyublk._binding.layout import Layout
from pyublk._binding.queue import Queue

@final
class Mapper:
    """Calls `target.map(op, offset, length)` to find out where a request's bytes are, for a
    `MappedQueue` with a `Layout.per_request`. It may return what `MappedTarget.map` may.

    `report` is called with the exception that it raised, and returns the errno of the request.
    """

    def __init__(self, target: object, report: Callable[[object, IO], int]) -> None: ...

@disjoint_base
class MappedQueue(Queue):
    """A queue that serves its requests from a layout's files, by its own ring.

    As `Queue`, but its requests are not returned: `serve_mapped` or `step` serve them. The files of
    the layout must stay open until it is closed.
    """

    def __init__(
        self,
        fd: int | CharDevice,
        queue_id: int = 0,
        *,
        layout: Layout,
        depth: int = 128,
        buffer_size: int = 524288,
        flags: int = 0,
        first_tag: int = 0,
        tag_step: int = 1,
        buffers: Buffers | None = None,
        trim_after: float | None = None,
        faults: int = 0,
        gate: Gate | None = None,
    ) -> None: ...
    @classmethod
    def loopback(  # type: ignore[override]
        cls,
        *,
        layout: Layout,
        depth: int = 128,
        buffer_size: int = 524288,
        gate: Gate | None = None,
    ) -> Self: ...
    def resolve(self, tag: int, generation: int, error: int) -> None:
        """How a request ends that was deferred, or whether one that waits may begin: 0, or an
        errno. [any thread]"""
    def serve_mapped(
        self,
        mapper: Mapper | None = None,
        leg_failed: Callable[[int, int, int], object] | None = None,
    ) -> None:
        """Serves until the device stops. `leg_failed` is called with a mirror's leg that failed,
        its errno (0: a known failure that only has to be recorded) and the generation of its file,
        before the requests that noticed it are answered."""
    def step(
        self,
        mapper: Mapper | None = None,
        leg_failed: Callable[[int, int, int], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> bool:
        """Waits for requests, at most `timeout` seconds (None: for ever), and serves those that
        have come; False when the device has been stopped. With `fileno` in a poller, one thread can
        serve several queues in this way; it must be the thread that made them."""
