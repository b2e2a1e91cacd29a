# SPDX-License-Identifier: MIT
"""A plugin that was written in Python for nbdkit, as a disk."""

import errno
import logging
import mmap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyublk.errors import InvalidTarget
from pyublk.profile import MAX_DISCARD
from pyublk.target import Target
from pyublk.targets import nbdkit_api as api

log = logging.getLogger("pyublk.nbdkit")

#: What a plugin must define, as nbdkit has it.
REQUIRED = ("open", "get_size", "pread")
#: Bytes that are written at once where the plugin does not make zeroes itself.
PIECE = 1 << 20
#: Threads for a plugin that may be called by many at once: nbdkit has as many.
WORKERS = 16
#: What a plugin says that has no largest request.
UNLIMITED = 0xFFFFFFFF


class Plugin:
    """A script with the functions that nbdkit calls, and how these are called."""

    def __init__(self, script: Path, parameters: list[tuple[str, str]], export: str | None) -> None:
        self.script = script
        self.export = export or ""
        self.ended: str | None = None
        self._load()
        self.version = self._version()
        for key, value in parameters:
            if not self.has("config"):
                raise ValueError(f"{script} takes no parameters, and was given {key}={value}")
            self._configure(f"{key}={value}", "config", key, value)
        self._configure("its parameters", "config_complete")
        self.thread_model = self._configure("its parameters", "thread_model")
        if self.thread_model is None:
            self.thread_model = api.SERIALIZE_ALL_REQUESTS
        if self.thread_model not in range(len(api.THREAD_MODELS)):
            raise InvalidTarget(
                f"thread_model of {script} returned {self.thread_model!r}: it must be one of "
                f"nbdkit.{', nbdkit.'.join(api.THREAD_MODELS)}"
            )

    def _load(self) -> None:
        api.install()
        try:
            source = self.script.read_bytes()
        except OSError as error:
            raise OSError(
                error.errno, f"the plugin {self.script} cannot be read: {error.strerror}"
            ) from None
        # nbdkit runs a script, not a module: some define their functions only there.
        module = types.ModuleType("__main__")
        module.__file__ = str(self.script)
        exec(compile(source, str(self.script), "exec"), vars(module))
        self._names = vars(module)
        if missing := [name for name in REQUIRED if not self.has(name)]:
            raise InvalidTarget(
                f"{self.script} is not a plugin for nbdkit: it does not define "
                f"{' and '.join(missing)}"
            )

    def _version(self) -> int:
        version = self._names.get("API_VERSION", 1)
        if version not in (1, 2):
            raise InvalidTarget(
                f"{self.script} has API_VERSION {version!r}: versions 1 and 2 can be run"
            )
        return int(version)

    def has(self, name: str) -> bool:
        """Whether it defines that function."""
        return callable(self._names.get(name))

    def _configure(self, given: str, name: str, *arguments: str) -> Any:
        """Calls a function about parameters, if there is one: what it raises is a wrong one."""
        try:
            return self.call(name, *arguments) if self.has(name) else None
        except Exception as error:
            raise ValueError(f"{self.script} refuses {given}: {error or repr(error)}") from error

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls the function. Raises OSError with what it gave to `nbdkit.set_error`, or else what
        it raised."""
        if self.ended is not None:
            raise OSError(errno.ESHUTDOWN, f"{self.script} has ended: {self.ended}")
        state = api.call
        state.error, state.export, state.shut_down = 0, self.export, self._end
        try:
            return self._names[name](*arguments)
        except Exception as error:
            if state.error:
                raise OSError(state.error, f"{self.script}: {name}: {error}") from error
            raise
        finally:
            state.shut_down = None

    def begin(self, name: str, *arguments: Any) -> Any:
        """Calls one of those by which a disk begins. Raises OSError that names it."""
        try:
            return self.call(name, *arguments)
        except Exception as error:
            number = (isinstance(error, OSError) and error.errno) or errno.EIO
            what = error.strerror if isinstance(error, OSError) and error.strerror else error
            told = OSError(number, f"{name} of {self.script} failed: {what or repr(error)}")
            raise told from error

    def _end(self, why: str) -> None:
        if self.ended is None:
            self.ended = why
            log.error("%s has ended: %s; stop its disk", self.script, why)

    def says(self, name: str, handle: object, *, by_default: bool = False) -> bool:
        """What one of its `can_...` functions answers: only True is yes."""
        if not self.has(name):
            return by_default
        return self.begin(name, handle) is True


class NBDKit(Target):
    """Runs `script`, a plugin written in Python for nbdkit, as nbdkit does, but in this process.

    Args:
        arguments: the plugin's script, then its parameters as nbdkit takes them, each `key=value`.
        export_name: what the plugin gets from `nbdkit.export_name`; by default, what its
            `default_export` returns.
        block_size: the disk's logical block size in bytes; at least what the plugin demands.
        read_only: have the plugin open for reading, and make the disk read-only.
        parameters: more of the plugin's parameters, which come after `arguments`.
    """

    def __init__(
        self,
        *arguments: str,
        export_name: str | None = None,
        block_size: int = 512,
        read_only: bool = False,
        **parameters: str,
    ) -> None:
        if not arguments:
            raise ValueError("nbdkit needs the plugin's script, such as plugin.py")
        super().__init__(size=0, block_size=block_size, read_only=read_only)
        self._script = Path(arguments[0])
        self._parameters = [_split(one) for one in arguments[1:]]
        self._parameters += [(key, str(value)) for key, value in parameters.items()]
        self._wanted = (block_size, read_only)
        self._export = export_name
        self._largest = UNLIMITED
        self._can: dict[str, bool] = {}
        self._handle: Any = None
        self._loaded: Plugin | None = self._load()
        self._plugin = self._loaded
        self._define()

    def _load(self) -> Plugin:
        return Plugin(self._script, self._parameters, self._export)

    def _define(self) -> None:
        """The methods are those that the plugin has functions for."""
        plugin = self.plugin
        self.concurrency = "parallel" if plugin.thread_model == api.PARALLEL else "serial"  # type: ignore[misc]
        methods: dict[str, tuple[str, Callable[..., None]]] = {
            "write": ("pwrite", self._write),
            "flush": ("flush", self._flush),
            "discard": ("trim", self._discard),
            "write_zeroes": ("zero", self._write_zeroes),
            "write_fua": ("pwrite", self._write_fua),
        }
        for method, (function, own) in methods.items():
            if plugin.has(function) and (method != "write_fua" or plugin.has("can_fua")):
                setattr(self, method, own)
        self.read_only = self._wanted[1] or not plugin.has("pwrite")
        self.workers = WORKERS if plugin.thread_model == api.PARALLEL else 0

    @property
    def plugin(self) -> Plugin:
        """The plugin as it was loaded."""
        assert self._plugin is not None
        return self._plugin

    # ---- begin and end ----

    def open(self) -> None:
        # Each disk has a plugin of its own: nbdkit's are not made to begin twice.
        self._plugin, self._loaded = self._loaded or self._load(), None
        plugin = self.plugin
        try:
            for step in ("get_ready", "after_fork"):
                if plugin.has(step):
                    plugin.begin(step)
            read_only = self._wanted[1]
            if self._export is None and plugin.has("default_export"):
                plugin.export = str(plugin.begin("default_export", read_only, False))
            if plugin.has("preconnect"):
                plugin.begin("preconnect", read_only)
            self._handle = plugin.begin("open", read_only)
        except BaseException:
            self._clean_up()
            raise
        try:
            self._ask()
        except BaseException:
            self.close()
            raise

    def _ask(self) -> None:
        plugin, handle = self.plugin, self._handle
        self.size = int(plugin.begin("get_size", handle))
        self.rotational = plugin.says("is_rotational", handle)
        may = {
            "write": not self._wanted[1]
            and plugin.says("can_write", handle, by_default=plugin.has("pwrite")),
            "flush": plugin.says("can_flush", handle, by_default=True),
            "discard": plugin.says("can_trim", handle, by_default=True),
            "write_zeroes": plugin.says("can_zero", handle, by_default=True),
            "write_fua": plugin.has("can_fua")
            and plugin.begin("can_fua", handle) == api.FUA_NATIVE,
        }
        self._can = {name: can and may["write"] for name, can in may.items()}
        self.read_only = not may["write"]
        self._ask_for_blocks()
        if self.size <= 0 or self.size % self.block_size:
            raise ValueError(
                f"{self._script} has {self.size} bytes: a disk needs a positive multiple of its "
                f"block size, {self.block_size}"
            )

    def _ask_for_blocks(self) -> None:
        self.block_size = self._wanted[0]
        self._largest, self.io_opt = UNLIMITED, None
        if not self.plugin.has("block_size"):
            return
        told = self.plugin.begin("block_size", self._handle)
        try:
            least, preferred, largest = (int(one) for one in told)
        except (TypeError, ValueError):
            raise InvalidTarget(
                f"block_size of {self._script} returned {told!r}, and not three numbers"
            ) from None
        if least > mmap.PAGESIZE:
            raise InvalidTarget(
                f"{self._script} takes blocks of {least} bytes at least: a disk's blocks have "
                f"{mmap.PAGESIZE} at most"
            )
        self.block_size = max(self.block_size, least)
        if preferred > self.block_size and not preferred & (preferred - 1):
            self.io_opt = preferred
        self._largest = max(self.block_size, largest or UNLIMITED)
        self._largest -= self._largest % self.block_size

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if self.plugin.has("close"):
            try:
                self.plugin.call("close", handle)
            except Exception:
                log.exception("close of %s failed", self._script)
        self._clean_up()

    def _clean_up(self) -> None:
        if self.plugin.has("cleanup"):
            try:
                self.plugin.call("cleanup")
            except Exception:
                log.exception("cleanup of %s failed", self._script)

    def announces(self, method: str) -> bool:
        return super().announces(method) and self._can.get(method, True)

    def status(self) -> dict[str, Any]:
        plugin = self.plugin
        return {
            "plugin": str(self._script),
            "api_version": plugin.version,
            "thread_model": api.THREAD_MODELS[plugin.thread_model],
            "export": plugin.export,
            "ended": plugin.ended,
        }

    # ---- requests ----

    def _pieces(self, length: int, largest: int) -> Iterator[tuple[int, int]]:
        """A request's parts, as begin and end, of which each is small enough for the plugin."""
        step = min(largest, self._largest)
        for at in range(0, length, step):
            yield at, min(at + step, length)

    def read(self, offset: int, buffer: memoryview) -> None:
        """Reads."""
        plugin = self.plugin
        for begin, end in self._pieces(len(buffer), UNLIMITED):
            piece = buffer[begin:end]
            if plugin.version == 2:
                plugin.call("pread", self._handle, piece, offset + begin, 0)
                continue
            found = memoryview(plugin.call("pread", self._handle, len(piece), offset + begin))
            found = found.cast("B")
            if len(found) < len(piece):
                raise OSError(
                    errno.EIO, f"pread of {self._script} returned {len(found)} of {len(piece)}"
                )
            piece[:] = found[: len(piece)]

    def _write(self, offset: int, data: memoryview, flags: int = 0) -> None:
        for begin, end in self._pieces(len(data), UNLIMITED):
            self._call("pwrite", data[begin:end], offset + begin, flags)

    def _write_fua(self, offset: int, data: memoryview) -> None:
        self._write(offset, data, api.FUA)

    def _flush(self) -> None:
        self._call("flush", 0)

    def _discard(self, offset: int, length: int) -> None:
        for begin, end in self._pieces(length, MAX_DISCARD):
            self._call("trim", end - begin, offset + begin, 0)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        for begin, end in self._pieces(length, MAX_DISCARD):
            if not self._zero(end - begin, offset + begin, unmap):
                self._write_pieces_of_zeroes(offset + begin, end - begin)

    def _zero(self, length: int, offset: int, unmap: bool) -> bool:
        """False: zeroes are to be written instead, which a plugin says by an errno, whether it
        raises or returns."""
        plugin = self.plugin
        how = unmap if plugin.version == 1 else api.MAY_TRIM * unmap
        try:
            plugin.call("zero", self._handle, length, offset, how)
        except OSError:
            if api.call.error not in api.NOT_SUPPORTED:
                raise
        return api.call.error not in api.NOT_SUPPORTED

    def _write_pieces_of_zeroes(self, offset: int, length: int) -> None:
        zeroes = memoryview(bytes(min(length, PIECE)))
        for begin, end in self._pieces(length, PIECE):
            self._write(offset + begin, zeroes[: end - begin])

    def _call(self, name: str, *arguments: Any) -> None:
        """Calls a function whose last argument, the flags, version 1 of the API does not have."""
        plugin = self.plugin
        plugin.call(name, self._handle, *(arguments if plugin.version == 2 else arguments[:-1]))


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r} is no parameter of a plugin: write key=value")
    return key, value
