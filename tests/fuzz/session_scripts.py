"""What a peer says in one session, as data: sound scripts, and damage done to them.

Pure but for its dice. A script is a list of acts on numbered links; who plays it is
`tests.fuzz.sessions`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from proto.framing import MIB
from proto.messages import (
    MESSAGES,
    AdapterDone,
    AdapterRefused,
    Adapters,
    AdaptersRequest,
    AddAdapter,
    DropAdapter,
    Fault,
    Goodbye,
    HoldSection,
    KeepAdapter,
    Lease,
    Leased,
    LinkLost,
    Message,
    Ping,
    Pong,
    Refused,
    Release,
    ReleaseAdapter,
    Role,
    Route,
    Routed,
    Run,
    Sampling,
    Scoring,
    SectionRefused,
    Status,
    StatusRequest,
    Step,
    StepDone,
    UseAdapter,
)

BLOCK_TOKENS = 16
LEASE_BLOCKS = 6
NUMBERS = (0, 1, 2, 15, 16, 17, 127, 128, 511, 512, 513, 4096, 2**16, 2**31 - 1)
ODD_NUMBERS = (*NUMBERS, -1, 2**31, 2**53, 2**63 - 1, 2**64 - 1)
ODD_FLOATS = (0.0, -0.0, 5e-324, 1e-30, 1.0, 1e12, 1e300, -1.0, float("inf"), float("nan"))
ODD_TEXTS = ("", "x", "..:1", "a\0b:7", "x" * 64 + ":7", "127.0.0.1:0", "127.0.0.1:1", "[::1%zz]:5")
ODD_TEXTS += ("~nobody-at-all/x", "/dev/zero", "../../etc", "\x1b[2J", "\ud7ff\n", "é" * 256)
ODD_TEXTS += ("y" * 1024, "z" * 5000, "/proc/self", "honest")


@dataclass(frozen=True)
class World:
    """What the peer knows of the workers."""

    addresses: tuple[str, str]  # the first and the last of a chain
    fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    adapter_path: str
    honest_lease: bytes  # of somebody else, who works beside


@dataclass(frozen=True)
class Open:
    """Make a link."""

    link: int
    worker: int
    role: Role
    lease: bytes | None = None


@dataclass(frozen=True)
class Say:
    """Send one message, and wait for what a sound one is answered with."""

    link: int
    message: Message
    payload: bytes = b""
    epoch: int = 0
    until: tuple[type[Message], ...] = ()
    until_on: int | None = None  # another link than it was said on
    cut: int | None = None  # so many bytes of the frame, and no more
    announces: int | None = None  # instead: a step that says its payload has so many bytes


@dataclass(frozen=True)
class Leave:
    """End a link, or stop reading from it."""

    link: int
    how: str  # "reset", "shut", "rest"


Act = Open | Say | Leave


# --- sound sessions ------------------------------------------------------------------------------


def sound(dice: random.Random, world: World, first_link: int = 0) -> list[Act]:
    """A session that keeps all rules, on links numbered from `first_link`."""
    make = dice.choice((_on_last, _on_last, _chain, _chain, _neighbour, _observer, _adapters))
    return make(dice, world, first_link)


def _on_last(dice: random.Random, world: World, link: int) -> list[Act]:
    """A manager of the last layers only."""
    lease, epoch = dice.randbytes(16), dice.choice((1, 2, 1000))
    acts = [Open(link, 1, Role.MANAGER), *_take_lease(dice, link, lease)]
    acts += [_route(link, lease, None, epoch)]
    acts += _steps(dice, world, lease, epoch, link, link)
    if dice.random() < 0.3:  # a recovery: the next epoch
        acts += [_route(link, lease, None, epoch + 1)]
        acts += _steps(dice, world, lease, epoch + 1, link, link)
    return [*acts, *_small_talk(dice, link), *_end(dice, link, lease)]


def _chain(dice: random.Random, world: World, link: int) -> list[Act]:
    lease, epoch, last = dice.randbytes(16), dice.choice((1, 7)), link + 1
    acts: list[Act] = [Open(link, 0, Role.MANAGER), Open(last, 1, Role.MANAGER)]
    for one in (link, last):
        acts += _take_lease(dice, one, lease)
    acts += [_route(last, lease, None, epoch), _route(link, lease, world.addresses[1], epoch)]
    acts += _steps(dice, world, lease, epoch, link, last)
    return [*acts, *_small_talk(dice, link), *_end(dice, link, lease), *_end(dice, last, lease)]


def _neighbour(dice: random.Random, world: World, link: int) -> list[Act]:
    lease, epoch, beside = dice.randbytes(16), 1, link + 1
    acts = [Open(link, 1, Role.MANAGER), *_take_lease(dice, link, lease)]
    acts += [_route(link, lease, None, epoch), Open(beside, 1, Role.NEIGHBOUR, lease)]
    acts += _steps(dice, world, lease, epoch, beside, link)
    return [*acts, Say(beside, Ping(number=1), until=(Pong,)), *_end(dice, link, lease)]


def _observer(dice: random.Random, world: World, link: int) -> list[Act]:
    acts: list[Act] = [Open(link, dice.randrange(2), Role.OBSERVER)]
    return [*acts, *_small_talk(dice, link), Say(link, Goodbye(reason="seen enough"))]


def _adapters(dice: random.Random, world: World, link: int) -> list[Act]:
    lease, name = dice.randbytes(16), f"fuzz-{dice.randrange(10**9)}"
    answered = (AdapterDone, AdapterRefused)
    add = AddAdapter(name=name, path=world.adapter_path)
    use = UseAdapter(lease=lease, number=3, name=name)
    acts = [Open(link, 1, Role.MANAGER), *_take_lease(dice, link, lease)]
    acts += [_route(link, lease, None, 1), Say(link, add, until=answered)]
    if dice.random() < 0.5:
        acts += [Say(link, KeepAdapter(name=name), until=answered)]
    acts += [Say(link, use, until=answered)]
    acts += _steps(dice, world, lease, 1, link, link, adapter=3)
    acts += [Say(link, DropAdapter(name=name), until=answered)]
    acts += _steps(dice, world, lease, 1, link, link, adapter=3)
    acts += [Say(link, ReleaseAdapter(lease=lease, number=3))]
    return [*acts, *_small_talk(dice, link), *_end(dice, link, lease)]


def _take_lease(dice: random.Random, link: int, lease: bytes) -> list[Act]:
    asked = Lease(
        lease=lease, min_blocks=LEASE_BLOCKS, want_blocks=LEASE_BLOCKS, trace=dice.random() < 0.2
    )
    return [Say(link, asked, until=(Leased, Refused))]


def _route(link: int, lease: bytes, following: str | None, epoch: int) -> Act:
    route = Route(lease=lease, next=following)
    return Say(link, route, epoch=epoch, until=(Routed, LinkLost, Refused))


def _small_talk(dice: random.Random, link: int) -> list[Act]:
    words: list[Act] = [
        Say(link, Ping(number=dice.randrange(100)), until=(Pong,)),
        Say(link, StatusRequest(), until=(Status,)),
        Say(link, AdaptersRequest(), until=(Adapters,)),
    ]
    return dice.sample(words, dice.randrange(len(words) + 1))


def _end(dice: random.Random, link: int, lease: bytes) -> list[Act]:
    end = dice.choice((Leave(link, "reset"), Leave(link, "shut"), None))
    release = [Say(link, Release(lease=lease))] if dice.random() < 0.5 else []
    return [*release, end or Say(link, Goodbye(reason="done"))]


# --- steps ---------------------------------------------------------------------------------------


def _steps(
    dice: random.Random,
    world: World,
    lease: bytes,
    epoch: int,
    link: int,
    done_on: int,
    adapter: int | None = None,
) -> list[Act]:
    """A prompt in one or two chunks, and some tokens after it; perhaps of two sequences."""
    acts: list[Act] = []
    lengths = [0] * dice.choice((1, 1, 2))
    for number in range(dice.choice((1, 2, 4))):
        sizes = [dice.choice((1, 3, 20)) if number == 0 else 1 for _ in lengths]
        runs = [
            Run(
                sequence=sequence,
                start=start,
                num_tokens=size,
                num_blocks=-(-(start + size) // BLOCK_TOKENS),
                rope_length=start + size,
                sampling=_sampling(dice, world),
                adapter=adapter,
                scoring=_scoring(dice, size),
            )
            for sequence, (start, size) in enumerate(zip(lengths, sizes, strict=True))
        ]
        lengths = [start + size for start, size in zip(lengths, sizes, strict=True)]
        step = Step(lease=lease, step=number, runs=runs)
        payload = payload_of(dice, world, step)
        acts.append(Say(link, step, payload, epoch, until=(StepDone,), until_on=done_on))
    return acts


def _sampling(dice: random.Random, world: World) -> Sampling | None:
    kind = dice.randrange(5)
    if kind == 0:
        return None
    if kind == 1:
        return Sampling(temperature=0.8, top_k=5, top_p=0.9, seed=7, logprobs=3)
    if kind == 2:
        return Sampling(repetition_penalty=1.2, num_history=2, num_offsets=2)
    if kind == 3:
        return Sampling(temperature=1.0, num_mask_words=-(-world.vocab_size // 32))
    return Sampling()


def _scoring(dice: random.Random, num_tokens: int) -> Scoring | None:
    if num_tokens < 2 or dice.random() < 0.7:
        return None
    first_row = dice.randrange(num_tokens - 1)
    if dice.random() < 0.5:
        return Scoring(first_row=first_row, num_rows=num_tokens - 1 - first_row, top=2)
    return Scoring(first_row=first_row, num_rows=num_tokens - first_row, top=0, next_token=9)


def payload_of(dice: random.Random, world: World, step: Step) -> bytes:
    """What the runs of a step announce, of sound values: each sequence has blocks of its own."""
    tokens, tables, histories, offsets, values, masks = [], [], [], [], b"", b""
    for place, run in enumerate(step.runs):
        tokens += [dice.randrange(world.vocab_size) for _ in range(run.num_tokens)]
        tables += [(place * 3 + block) % LEASE_BLOCKS for block in range(run.num_blocks)]
        sampling = run.sampling or Sampling()
        histories += dice.sample(range(world.vocab_size), sampling.num_history)
        offsets += dice.sample(range(world.vocab_size), sampling.num_offsets)
        values += floats(dice.uniform(-9, 9) for _ in range(sampling.num_offsets))
        masks += b"\xff" * (4 * sampling.num_mask_words)
    hidden = floats(dice.gauss(0, 1) for _ in range(len(tokens) * world.hidden_size))
    return integers([*tokens, *tables, *histories, *offsets]) + values + masks + hidden


def integers(numbers: Sequence[int]) -> bytes:
    """As int32."""
    import numpy as np

    return np.asarray(numbers, dtype="<i4").tobytes()


def floats(numbers: Any) -> bytes:
    """As float32."""
    import numpy as np

    return np.fromiter(numbers, dtype="<f4").tobytes()


# --- damage --------------------------------------------------------------------------------------


def damaged(dice: random.Random, world: World, script: list[Act]) -> list[Act]:
    """The same with something done to it."""
    acts = list(script)
    for _ in range(dice.choice((1, 1, 2, 4, 8))):
        dice.choice(_DAMAGES)(dice, world, acts)
    return acts


def interleaved(dice: random.Random, one: list[Act], two: list[Act]) -> list[Act]:
    """Two scripts at once; each keeps its order."""
    rest, acts = [list(one), list(two)], []
    while any(rest):
        mine = dice.choice([acts for acts in rest if acts])
        acts.append(mine.pop(0))
    return acts


def _drop(dice: random.Random, world: World, acts: list[Act]) -> None:
    if acts:
        del acts[dice.randrange(len(acts))]


def _repeat(dice: random.Random, world: World, acts: list[Act]) -> None:
    if acts:
        at = dice.randrange(len(acts))
        acts[at:at] = [acts[at]] * dice.choice((1, 1, 2, 40))


def _move(dice: random.Random, world: World, acts: list[Act]) -> None:
    if acts:
        act = acts.pop(dice.randrange(len(acts)))
        acts.insert(dice.randrange(len(acts) + 1), act)


def _stop_early(dice: random.Random, world: World, acts: list[Act]) -> None:
    del acts[dice.randrange(len(acts) + 1) :]


def _leave(dice: random.Random, world: World, acts: list[Act]) -> None:
    how = dice.choice(("reset", "shut", "rest"))
    acts.insert(dice.randrange(len(acts) + 1), Leave(dice.randrange(4), how))


def _graft(dice: random.Random, world: World, acts: list[Act]) -> None:
    """Words of another session, on a link of this one."""
    others = [act for act in sound(dice, world) if isinstance(act, Say)]
    for act in dice.sample(others, min(len(others), dice.choice((1, 3)))):
        acts.insert(dice.randrange(len(acts) + 1), replace(act, link=dice.randrange(3)))


def _hold_other_layers(dice: random.Random, world: World, acts: list[Act]) -> None:
    start, end = dice.choice(((0, 2), (2, 4), (1, 3), (0, 0), (3, 1), (0, 9), (2**31 - 1, 0)))
    fingerprint = dice.choice((world.fingerprint, world.fingerprint, "other"))
    message = HoldSection(fingerprint=fingerprint, start_layer=start, end_layer=end)
    say = Say(dice.randrange(2), message, until=(SectionRefused,))
    acts.insert(dice.randrange(len(acts) + 1), say)


def _any_message(dice: random.Random, world: World, acts: list[Act]) -> None:
    """Of any kind, also one that only a worker says, with whatever in its fields."""
    kind = dice.choice(list(MESSAGES.values()))
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    values = {field.encode_name: _odd(dice, None) for field in info.fields}
    acts.insert(dice.randrange(len(acts) + 1), Say(dice.randrange(3), kind(**values)))


def _says(dice: random.Random, acts: list[Act], kind: type[Message] = Message) -> int | None:
    places = [
        at for at, act in enumerate(acts) if isinstance(act, Say) and isinstance(act.message, kind)
    ]
    return dice.choice(places) if places else None


def _other_lease(dice: random.Random, world: World, acts: list[Act]) -> None:
    """The id of somebody else's lease, of the other link's, or of none."""
    at = _says(dice, acts)
    if at is None or not hasattr((act := acts[at]).message, "lease"):  # type: ignore[union-attr]
        return
    known = [
        it.message.lease for it in acts if isinstance(it, Say) and hasattr(it.message, "lease")
    ]
    lease = dice.choice((world.honest_lease, dice.choice(known), dice.randbytes(16)))
    acts[at] = replace(act, message=_with(act.message, lease=lease))  # type: ignore[union-attr, type-var]


def _other_epoch(dice: random.Random, world: World, acts: list[Act]) -> None:
    at = _says(dice, acts)
    if at is not None:
        act = acts[at]
        assert isinstance(act, Say)
        epoch = dice.choice((0, 1, act.epoch - 1, act.epoch + 1, 2**31, 2**32 - 1))
        acts[at] = replace(act, epoch=max(0, epoch))


def _odd_field(dice: random.Random, world: World, acts: list[Act]) -> None:
    at = _says(dice, acts)
    if at is not None:
        act = acts[at]
        assert isinstance(act, Say)
        acts[at] = replace(act, message=_changed(dice, act.message))


def _odd_run(dice: random.Random, world: World, acts: list[Act]) -> None:
    """A field of a run; in half of the cases with a payload as long as the runs announce."""
    at = _says(dice, acts, Step)
    if at is None:
        return
    act = acts[at]
    assert isinstance(act, Say) and isinstance(act.message, Step)
    said = act.message.runs
    runs = list(said) if isinstance(said, list) else []
    if not runs or not all(isinstance(run, Run) for run in runs):
        return
    way, place = dice.randrange(7), dice.randrange(len(runs))
    if way == 0:
        runs.append(runs[place])
    elif way == 1:
        sampling = runs[place].sampling
        changed = _changed(dice, sampling if isinstance(sampling, Sampling) else Sampling())
        runs[place] = _with(runs[place], sampling=changed)
    elif way == 6:
        scoring = runs[place].scoring
        known = isinstance(scoring, Scoring)
        odd = scoring if known else Scoring(first_row=0, num_rows=1, top=3, next_token=5)
        runs[place] = _with(runs[place], scoring=_changed(dice, odd))
    elif way == 2:
        runs = (runs * dice.choice((0, 50, 4097)))[:4097]
    else:
        runs[place] = _changed(dice, runs[place])
    step = _with(act.message, runs=runs)
    payload = act.payload
    if dice.random() < 0.6 and _is_small(step):
        payload = payload_of(dice, world, step)
    acts[at] = replace(act, message=step, payload=payload)


def _is_small(step: Step) -> bool:
    """Whether a payload of that much can be made here."""
    sizes: list[Any] = []
    for run in step.runs:
        sampling = getattr(run, "sampling", None) or Sampling()
        if not isinstance(run, Run) or not isinstance(sampling, Sampling):
            return False
        sizes += [run.num_tokens, run.num_blocks, sampling.num_mask_words]
        sizes += [sampling.num_history, sampling.num_offsets]
        if not _is_few(sampling.num_history) or not _is_few(sampling.num_offsets):
            return False
    return all(type(it) is int and it >= 0 for it in sizes) and sum(sizes) < 20_000


def _is_few(count: Any) -> bool:
    return type(count) is int and 0 <= count <= 100


def _odd_faults(dice: random.Random, world: World, acts: list[Act]) -> None:
    """As if the workers before had many sorrows, or had been very many."""
    at = _says(dice, acts, Step)
    if at is None:
        return
    act = acts[at]
    assert isinstance(act, Say) and isinstance(act.message, Step)
    sequences = dice.choice((range(1), range(7, 8), range(100, 4196), range(100, 4195)))
    reason = "x" * dice.choice((1, 100, 4096)) if len(sequences) < 9 else "x" * 200
    faults = [Fault(sequence=it, worker="w", reason=reason) for it in sequences]
    compute_s = [0.5] * dice.choice((0, 1023, 1024, 1025))
    acts[at] = replace(act, message=_with(act.message, faults=faults, compute_s=compute_s))


def _odd_payload(dice: random.Random, world: World, acts: list[Act]) -> None:
    at = _says(dice, acts, Step)
    if at is None:
        return
    act = acts[at]
    assert isinstance(act, Say)
    payload = bytearray(act.payload)
    way = dice.randrange(4)
    if way == 0:
        del payload[dice.randrange(len(payload) + 1) :]
    elif way == 1:
        payload += dice.randbytes(dice.choice((1, 4, 4096)))
    else:  # a number of the tables, or one of the hidden states
        end = min(len(payload), 160) if way == 2 else len(payload)
        for _ in range(dice.choice((1, 3, 30)) if end >= 4 else 0):
            place = dice.randrange(end // 4) * 4
            odd = dice.choice((-1, 2**31 - 1, -(2**31), 6, 128, 0x7FC00000, 0x7F800000, 0x7F7FFFFF))
            payload[place : place + 4] = odd.to_bytes(4, "little", signed=True)
    acts[at] = replace(act, payload=bytes(payload))


def _odd_place(dice: random.Random, world: World, acts: list[Act]) -> None:
    """An address to dial, or a folder to read, that is none."""
    kind = dice.choice((Route, Route, AddAdapter))
    at = _says(dice, acts, kind)
    if at is not None:
        act = acts[at]
        assert isinstance(act, Say)
        name = "next" if kind is Route else "path"
        acts[at] = replace(act, message=_with(act.message, **{name: dice.choice(ODD_TEXTS)}))


def _announce(dice: random.Random, world: World, acts: list[Act]) -> None:
    """A frame that begins, and is said to be as long as may be, or longer."""
    at = dice.randrange(len(acts) + 1)
    num_bytes = dice.choice((MIB, 40 * MIB, 257 * MIB, 2**32 - 1))
    acts.insert(at, Say(dice.randrange(2), Ping(number=0), announces=num_bytes))


def _cut(dice: random.Random, world: World, acts: list[Act]) -> None:
    """The first bytes of a frame, and then nothing, or the next frame."""
    at = _says(dice, acts)
    if at is not None:
        act = acts[at]
        assert isinstance(act, Say)
        acts[at] = replace(act, cut=dice.choice((1, 31, 32, 33, 60, 200)))
        if dice.random() < 0.7:
            acts.insert(at + 1, Leave(act.link, dice.choice(("reset", "shut"))))


_DAMAGES = (_drop, _repeat, _move, _move, _stop_early, _leave, _graft, _hold_other_layers)
_DAMAGES += (_any_message, _other_lease, _other_lease, _other_epoch, _other_epoch, _odd_field)
_DAMAGES += (
    _odd_field,
    _odd_run,
    _odd_run,
    _odd_run,
    _odd_faults,
    _odd_payload,
    _odd_payload,
    _cut,
)


def _with(struct: Any, **values: Any) -> Any:
    """A copy with other values, of whatever type."""
    own = {name: getattr(struct, name) for name in struct.__struct_fields__}
    return type(struct)(**{**own, **values})


def _changed(dice: random.Random, struct: Any) -> Any:
    """A copy with an odd value in one field."""
    if not struct.__struct_fields__:
        return struct
    name = dice.choice(struct.__struct_fields__)
    return _with(struct, **{name: _odd(dice, getattr(struct, name))})


def _odd(dice: random.Random, value: object) -> Any:
    """Mostly of the same type, at an end of its range or beyond it."""
    if value is None or dice.random() < 0.1:
        value = dice.choice((0, 0.0, "", b"", None, []))
    if isinstance(value, bool) or value is None:
        return dice.choice((None, True, False))
    if isinstance(value, int):
        return dice.choice(NUMBERS if dice.random() < 0.7 else ODD_NUMBERS)
    if isinstance(value, float):
        return dice.choice(ODD_FLOATS)
    if isinstance(value, str):
        return dice.choice(ODD_TEXTS)
    if isinstance(value, bytes):
        return dice.randbytes(dice.choice((0, 15, 16, 16, 17)))
    return dice.choice(([], [None], [0] * 5000))
