"""What a power cut leaves of a note, at each moment and in each order of the disk's writes.

`pytest` runs it, in a virtual machine where there is no ublk.
"""

import notes
import pytest

from pyublk.testing import PowerCutFailed


def save_twice(power_cut):
    """Returns the disk on which "plan" was saved as A, and then as B."""
    cut, fs = power_cut("ext4", "8M")
    notes.save(fs.path, "plan", "A")
    with cut.record():
        cut.mark("A")
        notes.save(fs.path, "plan", "B")
        cut.mark("B")
    fs.unmount()
    return cut


def whole(crash):
    """The note is there, as it was saved last or was just being saved."""
    allowed = crash.allowed({"A": ["A", "B"], "B": ["B"]}, before=["A"])
    with crash.extracted() as path:
        text = notes.load(path, "plan")
    assert text in allowed, f"it says {text!r}, which should be one of {allowed}"


def test_a_saved_note_survives(power_cut):
    assert save_twice(power_cut).check(whole, limit=6) > 1


def test_the_check_finds_a_directory_that_is_not_synced(power_cut, monkeypatch):
    """Keeps the test above honest: it must fail for the mistake that it is there to find."""
    monkeypatch.setattr(notes, "_sync_directory", lambda directory: None)
    with pytest.raises(PowerCutFailed, match="No such file"):
        save_twice(power_cut).check(whole, limit=6)
