"""docs/protocol.md says what the code does."""

from __future__ import annotations

import re

import msgspec
import pytest

from proto.framing import HEADER_BYTES, MAGIC, encode_frame
from proto.messages import PROTOCOL_VERSION, Step
from tests.proto.protocol_tables import DOCUMENT, PARTS, TABLES, renew
from tests.proto.wire_examples import EXAMPLES, KINDS

TEXT = DOCUMENT.read_text(encoding="utf-8")


def test_its_tables_are_those_of_the_code():
    assert renew(TEXT) == TEXT, "run `python tests/proto/protocol_tables.py`"


@pytest.mark.parametrize("name", TABLES)
def test_each_table_has_its_place(name):
    assert len(TABLES[name]()) > 2


@pytest.mark.parametrize("struct", [*KINDS, *PARTS], ids=lambda struct: struct.__name__)
def test_every_message_is_there_with_every_field(struct):
    title = f"**`{struct.__name__}`**"
    if struct in KINDS:
        title = f"**`{struct.__name__}` (type {struct.TAG})**"
        assert f"| {struct.TAG} | `{struct.__name__}` |" in TEXT
    section = TEXT.split(title)[1].split("**`")[0]
    for number, field in enumerate(msgspec.structs.fields(struct)):
        assert re.search(rf"^\| {number} \| `{field.name}` \| \S", section, re.MULTILINE)


def test_the_header_is_laid_out_as_its_table_says():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([a-z][^|]*) \|", TEXT, re.MULTILINE)
    fields = {name: (int(offset), int(length)) for offset, length, name in rows}
    assert sum(length for _, length in fields.values()) == HEADER_BYTES
    example = EXAMPLES[Step]
    frame = b"".join(encode_frame(example.message, [example.payload], epoch=example.epoch))

    def value(name: str) -> int:
        offset, length = fields[name]
        return int.from_bytes(frame[offset : offset + length], "big")

    assert value("magic") == int.from_bytes(MAGIC, "big")
    assert value("type") == Step.TAG
    assert value("epoch") == example.epoch
    assert value("payload length") == len(example.payload)
    assert value("metadata length") == len(frame) - HEADER_BYTES - len(example.payload)


def test_it_names_the_version_that_the_code_speaks():
    assert f"version {PROTOCOL_VERSION}." in " ".join(TEXT.split())
