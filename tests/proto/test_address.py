from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.address import Address, parse_address
from proto.errors import UsageError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7710", Address("127.0.0.1", 7710)),
        ("board-2.local:0", Address("board-2.local", 0)),
        ("[::1]:65535", Address("::1", 65535)),
        (" localhost:80 ", Address("localhost", 80)),
    ],
)
def test_a_host_and_a_port_are_read(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        ":7710",
        "::1",
        "::1:7710",
        "a:b:7710",
        "[::1]",
        "[host]:7710",
        "[::1:7710",
        "a b:7710",
        "host:port:7710",
    ],
)
def test_what_is_no_address_is_refused_with_the_form_of_one(text):
    with pytest.raises(UsageError, match="write HOST:PORT") as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("port", ["65536", "-1", "", "http", "7710x", "1" * 5000, "٣"])
def test_a_bad_port_is_refused_with_its_range(port):
    with pytest.raises(UsageError, match="not a number from 0 to 65535"):
        parse_address(f"host:{port}")


@given(
    host=st.sampled_from(["127.0.0.1", "::1", "fe80::1%eth0", "worker-1"]),
    port=st.integers(0, 65535),
)
def test_an_address_is_written_as_it_is_read(host, port):
    assert parse_address(str(Address(host, port))) == Address(host, port)
