"""How people write where a llama-server is."""

from __future__ import annotations

import pytest

from manager.llama_server.server_url import parse_server
from proto.errors import UsageError


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://node7:8080", "http://node7:8080"),
        ("http://node7:8080/", "http://node7:8080"),
        ("http://node7:8080/v1", "http://node7:8080"),
        ("http://node7:8080/v1/", "http://node7:8080"),
        ("https://host/llama/v1", "https://host/llama"),
        ("[::1]:8080/v1", "http://[::1]:8080"),
        (" node7:8080 ", "http://node7:8080"),
    ],
)
def test_an_address_is_read_with_and_without_what_clients_put_around_it(written, read):
    assert parse_server(written) == read


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("", "names no host"),
        ("node7", "names no port"),
        ("node7:0", "names no port"),
        ("node7:port", "Port could not be cast"),
        ("node7:99999", "Port out of range"),
        ("http://", "names no host"),
        ("node 7:8080", "names no host"),
        ("unix://node7:8080", "not by unix"),
        ("http://node7:8080/?key=1", "goes on after the path"),
    ],
)
def test_what_is_no_address_is_refused_with_the_reason(written, why):
    with pytest.raises(UsageError, match="no llama-server's address") as refused:
        parse_server(written)
    assert why in str(refused.value)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(UsageError, match="--api-key-file") as refused:
        parse_server("http://me:hidden@node7:8080")
    assert "hidden" not in str(refused.value)
