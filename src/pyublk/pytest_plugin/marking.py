# SPDX-License-Identifier: MIT
"""Which tests need ublk, and what becomes of one whose machine lacks something."""

import pytest

from pyublk.device import Device
from pyublk.pytest_plugin import needs

#: A test that uses one of these needs ublk, marked or not.
FIXTURES = frozenset({"ublk_disk", "ublk_fs", "faulty_disk", "power_cut"})

#: Of a test: the disks that its fixtures have made; whether it has passed.
DISKS = pytest.StashKey[list[Device]]()
PASSED = pytest.StashKey[bool]()

#: Set by the guest: these tests are in the virtual machine already.
IN_GUEST = pytest.StashKey[bool]()


def is_marked(item: pytest.Item) -> bool:
    """Whether the test needs ublk."""
    fixtures = getattr(item, "fixturenames", ())
    return not FIXTURES.isdisjoint(fixtures) or item.get_closest_marker("ublk") is not None


def needs_of(item: pytest.Item) -> list[needs.Need]:
    """What a test that needs ublk needs, besides what its fixtures find out. Raises UsageError for
    a marker that says something impossible."""
    try:
        return needs.of_marks(item.iter_markers("ublk"))
    except (TypeError, ValueError) as error:
        # What Python says of arguments may be several sentences, the last of them a question.
        marker = needs.MARKER.partition(": ")[0] if isinstance(error, TypeError) else "ublk"
        reason = str(error).replace("_of_mark()", "ublk()")
        raise pytest.UsageError(f"{item.nodeid}: pytest.mark.{marker}: {reason}") from None


def need(item: pytest.Item, *wanted: needs.Need) -> None:
    """Skips the test where something is missing, or fails it with --ublk-require."""
    reason = needs.lacking(*wanted)
    if reason is None:
        return
    if not item.config.stash.get(IN_GUEST, False) and item.config.getoption("ublk") == "host":
        reason += " (--ublk=vm runs it in a virtual machine)"
    give_up(item.config, reason)


def give_up(config: pytest.Config, reason: str) -> None:
    """Ends a test that cannot run, for that reason."""
    if config.getoption("ublk_require"):
        pytest.fail(reason, pytrace=False)
    raise pytest.skip.Exception(reason, _use_item_location=True)
