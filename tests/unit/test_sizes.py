import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyublk.targets import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("4k", 4096),
        ("64K", 65536),
        ("512MiB", 512 << 20),
        ("1G", 1 << 30),
        ("1.5G", 3 << 29),
        (" 2 TiB ", 2 << 40),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1GG", "1e3", "one"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size: write bytes, or a number with a unit"):
        parse_size(text)


def test_fractions_of_a_byte_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'0\.0001K' is not a whole number of bytes"):
        parse_size("0.0001K")


@given(st.integers(0, 1 << 62))
def test_formatted_sizes_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_sizes_are_short() -> None:
    assert [format_size(size) for size in (0, 512, 4096, 3 << 29)] == [
        "0",
        "512",
        "4KiB",
        "1536MiB",
    ]
