"""Damaged frames against the reader and the session: what may happen is a frame or a refusal.

Run by hand for as long as you like: `python -m tests.fuzz.frames --minutes 60`. The seed of a case
is its number, so a case that fails is found again with `--first N --count 1`.
"""

from __future__ import annotations

import argparse
import random
import time
from zlib import crc32

from proto.errors import ProtocolError
from proto.framing import CHECKSUM, HEADER, HEADER_BYTES, FrameReader, Limits, encode_frame
from proto.messages import PROTOCOL_VERSION, Hello, Role
from proto.session import LISTENER, LISTENER_HANDSHAKE_BYTES, OPENER, Session
from tests.proto.wire_examples import EXAMPLES, WELCOME

LIMITS = Limits(metadata_bytes=64 * 1024, payload_bytes=64 * 1024)
SECRET = b"correct horse battery staple"
# One buffer holds metadata and payload, and at most so much between them.
ROOM_BYTES = LIMITS.metadata_bytes + LIMITS.payload_bytes + 64

WHOLE = [
    b"".join(encode_frame(example.message, [example.payload] if example.payload else []))
    for example in EXAMPLES.values()
]
# Bytes that mean something to msgpack: lengths, types, ends of ranges.
TELLING = bytes([0, 1, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xC0, 0xC4, 0xC6, 0xCB, 0xCF, 0xD3])
TELLING += bytes([0xD9, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xE0, 0xFF])


def fuzz(first: int, count: int) -> dict[str, int]:
    """So many cases; returns how many were read as frames and how many were refused."""
    told = {"cases": 0, "frames": 0, "refused": 0}
    for number in range(first, first + count):
        dice = random.Random(number)
        data = mutate(dice, dice.choice(WHOLE))
        taker = dice.choice((_reader, _reader, _stranger, _friend))(dice)
        told["cases"] += 1
        try:
            told["frames"] += _feed(dice, taker, data)
        except ProtocolError:
            told["refused"] += 1
        except BaseException as exc:
            raise AssertionError(f"case {number}: {data!r}") from exc
    return told


def mutate(dice: random.Random, whole: bytes) -> bytes:
    """The same with some damage; in most cases with checksums that fit, so that it is parsed."""
    data = bytearray(whole)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        _damage(dice, data)
    if dice.random() < 0.75 and len(data) >= HEADER_BYTES:
        _mend(dice, data)
    return bytes(data)


def _damage(dice: random.Random, data: bytearray) -> None:
    at = dice.randrange(len(data) + 1)
    way = dice.randrange(7)
    if way == 0 and at < len(data):
        data[at] ^= 1 << dice.randrange(8)
    elif way == 1 and at < len(data):
        data[at] = dice.choice(TELLING)
    elif way == 2:
        data[at:at] = dice.randbytes(dice.choice((1, 2, 4, 9)))
    elif way == 3:
        del data[at : at + dice.choice((1, 2, 4, 40))]
    elif way == 4:
        data[at:at] = data[dice.randrange(len(data) + 1) :][: dice.choice((4, 16, 64))]
    elif way == 5:
        data[at:] = dice.choice(WHOLE)[at:]
    elif len(data) > 24:
        field, size = dice.choice(((5, 1), (8, 4), (12, 4), (16, 8)))
        value = dice.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1)) % 256**size
        data[field : field + size] = value.to_bytes(size, "big")


def _mend(dice: random.Random, data: bytearray) -> None:
    body = data[HEADER_BYTES:]
    magic, version, tag, reserved, epoch, metadata, payload, _ = HEADER.unpack_from(data)
    if dice.random() < 0.8:
        metadata = min(metadata, len(body))
        payload = len(body) - metadata
        if dice.random() < 0.5:
            metadata, payload = len(body), 0
    header = HEADER.pack(magic, version, tag, reserved, epoch, metadata, payload, crc32(body))
    data[:HEADER_BYTES] = header + CHECKSUM.pack(crc32(header))


def _reader(_dice: random.Random) -> FrameReader:
    return FrameReader(LIMITS)


def _stranger(dice: random.Random) -> Session:
    secret = dice.choice((None, SECRET))
    return Session(LISTENER, secret=secret, nonce=secret and bytes(32), limits=LIMITS)


def _friend(dice: random.Random) -> Session:
    """A link that is open: the peer is proven, and may say all that its role allows."""
    hello = Hello(
        version=PROTOCOL_VERSION, role=dice.choice(list(Role)), agent="fuzz", lease=bytes(16)
    )
    ends = {
        OPENER: Session(OPENER, hello=hello, limits=LIMITS),
        LISTENER: Session(LISTENER, limits=LIMITS),
    }
    for data in ends[OPENER].outgoing():
        ends[LISTENER].receive(data)
    ends[LISTENER].send(WELCOME)
    for data in ends[LISTENER].outgoing():
        ends[OPENER].receive(data)
    return ends[dice.choice((OPENER, LISTENER))]


def _feed(dice: random.Random, taker: FrameReader | Session, data: bytes) -> int:
    is_stranger = isinstance(taker, Session) and taker.state.value in ("unproven", "ungreeted")
    frames, rest = 0, memoryview(data)
    while rest:
        space = taker.get_buffer()
        assert 0 < len(space) <= (LISTENER_HANDSHAKE_BYTES if is_stranger else ROOM_BYTES)
        taken = min(len(space), len(rest), dice.choice((1, 7, 2**20)))
        space[:taken] = rest[:taken]
        rest = rest[taken:]
        frame = taker.advance(taken)
        frames += frame is not None
    return frames


def main() -> None:
    """Fuzz for a number of cases or minutes, and say how many there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=0.0)
    asked = parser.parse_args()
    end_s = time.monotonic() + 60 * asked.minutes
    told = fuzz(asked.first, asked.count)
    while time.monotonic() < end_s:
        more = fuzz(asked.first + told["cases"], 10_000)
        told = {name: told[name] + more[name] for name in told}
        if told["cases"] % 1_000_000 < 10_000:
            _tell(told)
    _tell(told)


def _tell(told: dict[str, int]) -> None:
    print(", ".join(f"{number} {name}" for name, number in told.items()), flush=True)


if __name__ == "__main__":
    main()
