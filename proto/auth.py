"""Challenge and response: each end of a link shows that it knows the secret, without saying it.

Pure: nonces come in, MACs go out. A MAC covers who made it, the protocol version and both
nonces, so that an answer cannot be sent back to who gave it, nor used on a later link. It proves
knowledge at the start of a link; it does not encrypt, and only TLS stops somebody who can change
the stream after it.
"""

from __future__ import annotations

import hmac
from typing import Final

from proto.messages import PROTOCOL_VERSION

NONCE_BYTES: Final = 32
OPENER: Final = b"opener"
LISTENER: Final = b"listener"


def prove(secret: bytes, prover: bytes, *, opener_nonce: bytes, listener_nonce: bytes) -> bytes:
    """The MAC that `prover` (OPENER or LISTENER) sends.

    HMAC-SHA256 (RFC 2104) over "comboio link", the protocol version as two bytes, the prover and
    both nonces; all but the prover are of fixed length, so no two inputs read the same.
    """
    assert len(opener_nonce) == len(listener_nonce) == NONCE_BYTES
    version = PROTOCOL_VERSION.to_bytes(2, "big")
    text = b"".join((b"comboio link", version, opener_nonce, listener_nonce, prover))
    return hmac.digest(secret, text, "sha256")


def holds(
    mac: bytes, secret: bytes, prover: bytes, *, opener_nonce: bytes, listener_nonce: bytes
) -> bool:
    """Whether `mac` is what `prover` sends for these nonces; takes the same time either way."""
    expected = prove(secret, prover, opener_nonce=opener_nonce, listener_nonce=listener_nonce)
    return hmac.compare_digest(mac, expected)
