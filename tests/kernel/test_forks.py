# SPDX-License-Identifier: MIT
"""Forks of a process that serves a disk: whatever the child does, the disk is its parent's."""

import os
import signal

import pytest
from servers import Server, device_is_gone, run_program

import pyublk

pytestmark = pytest.mark.timeout(120)

#: A disk, a client's check of it, and children that must end as told.
PARENT = """
import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from blocks import Blocks
from pyublk.targets import Ram

def forked(child, code=0, fork=os.fork):
    pid = fork()
    if pid == 0:
        child()
        sys.exit(code)
    waited(pid, code)

def waited(pid, code=0):
    until = time.monotonic() + 30
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == code, status

def works(disk):
    assert disk.info().status.name == "LIVE"
    with Blocks(disk.path) as client:
        client.write(b"w" * 4096, 8192)
        assert client.read(4096, 8192) == b"w" * 4096
"""


def test_children_that_end_in_every_way() -> None:
    program = (
        PARENT
        + """
disk = pyublk.Device(Ram(size=MIB))
disk.start()
controller, ring = pyublk.Controller(), pyublk.Ring(8)

def drops():
    global disk, controller, ring
    del disk, controller, ring
    gc.collect()

def leaves(scope):
    with scope:
        sys.exit(5)

def refused(call):
    try:
        call()
    except pyublk.DeviceClosed as error:
        assert f"made in process {os.getppid()}, from which this one ({os.getpid()})" in str(error)
    else:
        os._exit(1)

def calls():
    for call in (disk.stop, disk.wait, disk.info, disk.stats, disk.start, controller.features):
        refused(call)
    refused(lambda: disk.resize(2 * MIB))
    refused(lambda: disk.share(4096))
    controller.close()
    ring.close()
    assert str(disk.state) == "live" and disk.path in repr(disk)

def has_its_own():
    with pyublk.Device(Memory(MIB)) as own:
        assert own.path != disk.path
        works(own)

def in_a_thread(act):
    def act_apart():
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
    return act_apart

forked(lambda: None)
forked(lambda: None, 3)
forked(drops)
forked(calls)
forked(in_a_thread(calls))
forked(has_its_own)
forked(lambda: None, fork=ctypes.CDLL(None).fork)  # of which Python is not told
works(disk)
for scope in (disk, controller, ring):
    forked(lambda: leaves(scope), 5) if scope is not disk else None
class Scope(pyublk.Device):
    pass
with Scope(Memory(MIB)) as inside:
    pid = os.fork()
    if pid == 0:
        sys.exit(4)  # leaves this scope
    waited(pid, 4)
    works(inside)
apart = threading.Thread(target=forked, args=(drops,))
apart.start()
apart.join()
for method in ("fork", "forkserver", "spawn"):
    child = multiprocessing.get_context(method).Process(target=os.getpid)
    child.start()
    child.join(60)
    assert child.exitcode == 0, method
import subprocess
subprocess.run(["true"], preexec_fn=gc.collect, check=True)
works(disk)
disk.stop()
tell("stopped")
"""
    )
    assert run_program(program).endswith("stopped\n")


def test_handlers_that_fork() -> None:
    program = (
        PARENT
        + """
context = multiprocessing.get_context("fork")

def doubled(number):
    return 2 * number

class Forks(Memory):
    concurrency = "parallel"
    pool = None
    seen = None
    def read(self, offset, buffer):
        if offset == 0:
            super().read(offset, buffer)
        elif offset == 65536:  # raises in the child
            pid = os.fork()
            if pid == 0:
                sys.exit(7)
            waited(pid, 7)
        elif offset == 2 * 65536:
            child = context.Process(target=doubled, args=(1,))
            child.start()
            child.join()
            assert child.exitcode == 0
        elif offset == 3 * 65536:
            if self.pool is None:
                self.pool = ProcessPoolExecutor(1, mp_context=context)
            self.seen = self.pool.submit(doubled, 4).result(30)
        super().read(offset, buffer)

for options in ({}, {"workers": 2}):
    target = Forks(MIB)
    with pyublk.Device(target, partition_scan=True, **options) as disk:
        with Blocks(disk.path) as client:
            for place in range(1, 4):
                assert client.read(4096, place * 65536) == bytes(4096)
        assert target.seen == 8
        works(disk)
        assert disk.stats().total.errors == 0
        target.pool.shutdown()  # its process has the client's descriptor
    tell("served")
"""
    )
    assert run_program(program) == "served\nserved\n"


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.CDLL(None).fork"])
def test_a_child_does_not_keep_a_dead_servers_disk(
    controller: pyublk.Controller, fork: str
) -> None:
    program = f"""
import ctypes
from pyublk.targets import Ram
disk = pyublk.Device(Ram(size=MIB))
disk.start()
child = {fork}()
if child == 0:
    while True:
        time.sleep(60)
tell(disk.id, child)
sys.stdin.read()
"""
    with Server(program) as server:
        device, child = map(int, server.line().split())
        try:
            server.send(signal.SIGKILL)
            server.ended()
            from servers import until

            until(lambda: device_is_gone(controller, device), what="the device goes")
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_program_that_becomes_a_daemon_too_late(controller: pyublk.Controller) -> None:
    """The disk ends with the process that started it, and the other one is told."""
    program = """
disk = pyublk.Device(Memory(MIB))
disk.start()
number = disk.id
if os.fork():
    os._exit(0)
os.setsid()
try:
    disk.wait()
except pyublk.DeviceClosed as error:
    tell(number, error)
"""
    number, said = run_program(program).split(" ", 1)
    assert "make a new one here" in said
    from servers import until

    until(lambda: device_is_gone(controller, int(number)), what="the device goes")
