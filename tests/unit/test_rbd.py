"""The target rbd, as far as it goes without a cluster; `./run ceph` has one."""

import importlib.util
from pathlib import Path

import pytest

from pyublk import targets
from pyublk.errors import FeatureMissing
from pyublk.targets.rbd import Rbd
from pyublk.testing import Disk


@pytest.mark.parametrize("name", ["", "img", "/img", "pool/", "a/b/c/d", "pool/img@", "a@b/c"])
def test_a_wrong_name(name: str) -> None:
    with pytest.raises(ValueError, match="names no image of Ceph's: write POOL/IMAGE"):
        Rbd(name)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="exclusive is for who writes"):
        Rbd("pool/img@snapshot", exclusive=True)
    with pytest.raises(ValueError, match="timeout"):
        Rbd("pool/img", timeout=-1)
    with pytest.raises(ValueError, match="rbd resize"):
        Rbd("pool/img").resize(1 << 20, lambda size: None)


def test_what_the_name_says() -> None:
    made = targets.build(targets.resolve("rbd"), {"user": "me"}, ["pool/space/img@then"])
    assert isinstance(made, Rbd)
    assert made.read_only
    assert made.status()["image"] == "pool/space/img@then"


@pytest.mark.skipif(importlib.util.find_spec("rbd") is not None, reason="python3-rbd is there")
def test_without_cephs_binding() -> None:
    with pytest.raises(FeatureMissing, match="install the package python3-rbd, and make the virt"):
        Disk(Rbd("pool/img")).open()


@pytest.mark.skipif(importlib.util.find_spec("rbd") is None, reason="python3-rbd is missing")
def test_without_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no configuration or key of a Ceph cluster"):
        Disk(Rbd("pool/img", conf=tmp_path / "none.conf")).open()
