"""What a worker says, checked before anybody reckons with it or shows it.

Workers are known by the secret or a certificate, and may be out of order all the same. Pure.
"""

from __future__ import annotations

from typing import Final, NoReturn

from msgspec.structs import replace

from proto.errors import RemoteProtocolError
from proto.messages import (
    AdapterRefused,
    LinkLost,
    Message,
    Refused,
    SectionHeld,
    SectionRefused,
    StepDone,
    WorkerFacts,
)
from proto.printable import printable

_COUNTS: Final = ("hidden_size", "vocab_size", "max_context", "block_tokens", "max_step_tokens")
_TEXTS: Final = (
    *("host", "model", "model_path", "fingerprint", "dtype", "device"),
    *("quantize", "kv_quantize"),
)


def check_facts(facts: WorkerFacts, worker: str) -> None:
    """Refuse a worker that says of itself what cannot be.

    Args:
        worker: HOST:PORT, for the sentence.
    Raises:
        RemoteProtocolError: names the field and its value.
    """
    for name in _COUNTS:
        if getattr(facts, name) < 1:
            _refuse(worker, f"{name} {getattr(facts, name)}")
    if not 0 <= facts.start_layer < facts.end_layer <= facts.num_layers:
        _refuse(worker, f"layers {facts.start_layer}:{facts.end_layer} of {facts.num_layers}")
    for name in ("listen", *_TEXTS):
        text = getattr(facts, name)
        if not text.isprintable():
            _refuse(worker, f"{name} {text!r}")


def _refuse(worker: str, what: str) -> NoReturn:
    raise RemoteProtocolError(
        f"worker {worker} says of itself what cannot be ({what}): run the same version of comboio "
        "there"
    )


def checked(message: Message, worker: str) -> Message:
    """The same, with reasons that can be shown on one line of a terminal.

    Raises:
        RemoteProtocolError: as `check_facts`.
    """
    match message:
        case SectionHeld(worker=facts):
            check_facts(facts, worker)
        case StepDone(faults=faults) if faults:
            shown = [
                replace(it, worker=printable(it.worker), reason=printable(it.reason))
                for it in faults
            ]
            return replace(message, faults=shown)
        case LinkLost():
            return replace(message, next=printable(message.next), reason=printable(message.reason))
        case Refused() | AdapterRefused() | SectionRefused():
            return replace(message, reason=printable(message.reason))
    return message
