"""Say something on a link that may be gone by now."""

from __future__ import annotations

from proto.errors import LocalProtocolError, PeerLost
from proto.framing import Buffer
from proto.link import Link
from proto.messages import Message


def answer(link: Link, message: Message, *payload: Buffer, epoch: int = 0) -> None:
    """Send one message, unless the link is gone: its `on_closed` deals with that."""
    try:
        link.send(message, *payload, epoch=epoch)
    except PeerLost:
        pass
    except LocalProtocolError as exc:
        link.fail(exc)  # nothing waits for ever for what could not be said
