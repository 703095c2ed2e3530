"""What a worker does about adapters: at its start, and when managers ask over a link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from proto.errors import WorkerLost
from proto.link import Link
from proto.messages import (
    MAX_ADAPTERS,
    AdapterDone,
    AdapterRefused,
    Adapters,
    AdaptersRequest,
    AddAdapter,
    DropAdapter,
    HoldSection,
    KeepAdapter,
    Message,
    ReleaseAdapter,
    Role,
    Sampling,
    SectionLoading,
    SectionRefused,
    Status,
    StatusRequest,
    UseAdapter,
)
from tests.support.adapters import adapted, logits_of
from tests.support.models import tiny_model
from tests.support.processes import WorkerProcess, run_worker
from tests.support.wire import Chain, Part, closed, open_link, take_lease, told

Make = Callable[..., Part]
SECRET = "a secret of more than sixteen bytes"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the workers' model, and one of another."""
    folder = tmp_path_factory.mktemp("adapters")
    adapted(tiny_model("llama"), folder / "one", seed=1)
    adapted(tiny_model("llama"), folder / "two", seed=2, target_modules=["q_proj", "lm_head"])
    adapted(tiny_model("llama", hidden_size=64), folder / "wide", target_modules=["v_proj"])
    return {name: folder / name for name in ("one", "two", "wide")}


@pytest.fixture(scope="module")
def peft_models(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same adapters on the same model, in this process."""
    folder = tmp_path_factory.mktemp("again")
    return {
        "one": adapted(tiny_model("llama"), folder / "one", seed=1),
        "two": adapted(
            tiny_model("llama"), folder / "two", seed=2, target_modules=["q_proj", "lm_head"]
        ),
    }


@pytest.fixture(scope="module")
def pair(checkpoint: Path, folders: dict[str, Path]) -> Iterator[list[WorkerProcess]]:
    """Two workers that hold adapter `one`."""
    words = ("--model", str(checkpoint), "--sections", "2", "--kv-memory", "1MiB")
    held = ("--adapter", f"one={folders['one']}")
    with (
        WorkerProcess(*words, "--index", "0", *held, wait=False) as first,
        WorkerProcess(*words, "--index", "1", *held, wait=False) as last,
    ):
        for worker in (first, last):
            worker.wait_until_ready()
        yield [first, last]


def in_loop(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def asked(link: Link, message: Message) -> Any:
    """The next message, which answers this one."""
    link.send(message)
    return (await link.receive(30.0)).message


async def names(link: Link) -> list[str]:
    said = await asked(link, AdaptersRequest())
    assert isinstance(said, Adapters)
    return [it.name for it in said.adapters]


async def until_only_one_is_held(link: Link) -> None:
    """Who closed its link is heard of soon, not at once."""
    async with asyncio.timeout(30):
        while True:
            if (await asked(link, StatusRequest())).adapters == 1:
                return
            await asyncio.sleep(0.01)


# --- at the start ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("one", "--adapter: 'one' is not NAME=DIR"),
        ("=/x", "cannot be an adapter's name"),
        ("a/b=/x", "cannot be an adapter's name"),
        ("one=", "is not NAME=DIR"),
        ("one=/nowhere", "--adapter one: the adapter /nowhere is not there"),
        ("wide={wide}", "from 64 to 32 features, and the model's own goes from 32 to 16"),
    ],
)
def test_a_worker_refuses_to_start_with_what_is_no_adapter_of_its_model(
    adapter, said, folders, checkpoint
):
    ended = run_worker("--model", str(checkpoint), "--adapter", adapter.format(**folders))
    assert (ended.returncode, ended.stdout) == (2, "")
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("worker: ") and said in last


def test_one_name_for_two_adapters_is_refused(folders, checkpoint):
    words = [f"--adapter=mine={folders[name]}" for name in ("one", "two")]
    ended = run_worker("--model", str(checkpoint), *words)
    assert ended.returncode == 2 and "mine is given twice" in ended.stderr


@pytest.mark.parametrize("place", ["variable", "file", "list"])
def test_adapters_can_stand_in_settings(place, folders, checkpoint, tmp_path):
    both = [f"{name}={folders[name]}" for name in ("one", "two")]
    settings = tmp_path / "comboio.toml"
    values = {"file": repr(",".join(both)), "list": repr(both)}
    settings.write_text(f"[worker]\nadapter = {values[place]}\n" if place in values else "")
    env = {"COMBOIO_CONFIG": str(settings)}
    if place == "variable":
        env["COMBOIO_ADAPTER"] = ",".join(both)
    with WorkerProcess("--model", str(checkpoint), "--kv-memory", "1MiB", env=env) as worker:

        async def check() -> None:
            link = await open_link(worker.address, Role.OBSERVER)
            said = await asked(link, AdaptersRequest())
            assert [(it.name, it.path) for it in said.adapters] == [
                ("one", str(folders["one"])),
                ("two", str(folders["two"])),
            ]
            status = await asked(link, StatusRequest())
            assert isinstance(status, Status)
            assert status.adapters == 2
            assert status.adapter_bytes == sum(it.num_bytes for it in said.adapters)
            await link.close()

        in_loop(check())


# --- steps -----------------------------------------------------------------------------------


async def announce(chain: Chain, number: int, name: str) -> None:
    for link in chain.links:
        done = await asked(link, UseAdapter(lease=chain.lease, number=number, name=name))
        assert isinstance(done, AdapterDone), done


def test_a_run_is_computed_with_the_adapter_of_its_number(pair, part, peft_models, model):
    async def check() -> None:
        chain = await Chain.open([it.address for it in pair])
        await announce(chain, 7, "one")
        tokens = [3, 1, 4, 1, 5]
        sampling = Sampling(logprobs=5)
        done = await chain.step(
            part(1, tokens, blocks=[0], sampling=sampling, adapter=7),
            part(2, tokens, blocks=[1], sampling=sampling),
        )
        for drawn, whole in zip(done.drawn, (peft_models["one"], model), strict=True):
            expected = logits_of(whole, tokens)[-1]
            assert drawn.token == int(expected.argmax())
            logprobs = torch.log_softmax(expected.double(), -1)
            assert drawn.logprob == pytest.approx(float(logprobs[drawn.token]), abs=1e-4)
        await chain.close()

    in_loop(check())


def test_a_number_that_is_not_in_use_is_a_fault_of_its_sequence_alone(pair, part):
    async def check() -> None:
        chain = await Chain.open([it.address for it in pair])
        await announce(chain, 1, "one")
        other = await Chain.open([it.address for it in pair], blocks=2)
        for run_of in (other, chain):
            number = 1 if run_of is other else 2
            done = await run_of.step(
                part(1, [1, 2], blocks=[0], adapter=number), part(2, [3], blocks=[1])
            )
            (fault,) = done.faults
            assert (fault.sequence, fault.worker) == (1, pair[0].address)
            assert f"its adapter (number {number}) is not in use" in fault.reason
            assert [drawn.sequence for drawn in done.drawn] == [2]
        for link in chain.links:
            link.send(ReleaseAdapter(lease=chain.lease, number=1))
        done = await chain.step(part(1, [1, 2], blocks=[0], adapter=1))
        assert [fault.sequence for fault in done.faults] == [1]
        await chain.close()
        await other.close()

    in_loop(check())


def test_a_number_means_one_adapter_only(pair):
    async def check() -> None:
        chain = await Chain.open([pair[0].address, pair[1].address])
        await announce(chain, 1, "one")
        use = UseAdapter(lease=chain.lease, number=1, name="one")
        refused = await asked(chain.links[0], use)
        assert isinstance(refused, AdapterRefused)
        assert "number 1 means another adapter" in refused.reason
        await chain.close()

    in_loop(check())


# --- adding and dropping ---------------------------------------------------------------------


def test_what_a_link_added_and_did_not_keep_is_its_own_and_goes_with_it(pair, folders):
    async def check() -> None:
        link = await open_link(pair[0].address)
        done = await asked(link, AddAdapter(name="two", path=str(folders["two"])))
        assert isinstance(done, AdapterDone) and done.adapter.num_modules == 2
        lease = await take_lease(link)
        use = UseAdapter(lease=lease.lease, number=1, name="two")
        assert (await asked(link, use)).adapter.leases == 1
        other = await open_link(pair[0].address)
        assert await names(other) == ["one"]
        theirs = await take_lease(other)
        refused = await asked(other, UseAdapter(lease=theirs.lease, number=1, name="two"))
        assert "there is no adapter two here (held: one)" in refused.reason
        assert (await asked(other, StatusRequest())).adapters == 2
        await link.close()
        await until_only_one_is_held(other)
        await other.close()

    in_loop(check())


def test_what_was_kept_is_everybody_s_until_it_is_dropped(pair, folders):
    async def check() -> None:
        link, other = await open_link(pair[1].address), await open_link(pair[1].address)
        await asked(link, AddAdapter(name="two", path=str(folders["two"])))
        assert isinstance(await asked(link, KeepAdapter(name="two")), AdapterDone)
        await link.close()
        assert await names(other) == ["one", "two"]
        lease = await take_lease(other)
        await asked(other, UseAdapter(lease=lease.lease, number=5, name="two"))
        dropped = await asked(other, DropAdapter(name="two"))
        assert dropped.adapter.leases == 1
        assert await names(other) == ["one"]
        assert (await asked(other, StatusRequest())).adapters == 2
        other.send(ReleaseAdapter(lease=lease.lease, number=5))
        assert (await asked(other, StatusRequest())).adapters == 1
        await other.close()

    in_loop(check())


def test_two_who_add_the_same_name_do_not_get_in_each_other_s_way(pair, folders):
    async def check() -> None:
        links = [await open_link(pair[0].address) for _ in range(2)]
        for link in links:
            added = await asked(link, AddAdapter(name="two", path=str(folders["two"])))
            assert isinstance(added, AdapterDone)
        assert isinstance(await asked(links[0], KeepAdapter(name="two")), AdapterDone)
        late = await asked(links[1], KeepAdapter(name="two"))
        assert isinstance(late, AdapterRefused) and "is here already" in late.reason
        # The one who came too late gives back its own, not the other's.
        assert isinstance(await asked(links[1], DropAdapter(name="two")), AdapterDone)
        assert await names(links[0]) == ["one", "two"]
        assert isinstance(await asked(links[0], DropAdapter(name="two")), AdapterDone)
        for link in links:
            await link.close()

    in_loop(check())


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (AddAdapter(name="one", path="/x"), "an adapter one is here already"),
        (AddAdapter(name="mine", path="x/y"), "x/y is not an absolute path"),
        (AddAdapter(name="mine", path="~no-such-user/x"), "is not an absolute path"),
        (AddAdapter(name="mine", path="/nowhere"), "the adapter /nowhere is not there"),
        (AddAdapter(name="mine", path="/dev/null"), "/dev/null is no folder"),
        (AddAdapter(name="mine", path="/\0"), "characters that no path should have"),
        (AddAdapter(name="mine", path="/a\nb"), "characters that no path should have"),
        (AddAdapter(name="a b", path="/x"), "cannot be an adapter's name"),
        (AddAdapter(name="../one", path="/x"), "cannot be an adapter's name"),
        (KeepAdapter(name="mine"), "this link has added no adapter mine"),
        (KeepAdapter(name="one"), "this link has added no adapter one"),
        (DropAdapter(name="mine"), "there is no adapter mine here"),
    ],
)
def test_a_refusal_names_the_adapter_and_leaves_the_link_open(message, said, pair):
    async def check() -> None:
        link = await open_link(pair[0].address)
        refused = await asked(link, message)
        assert isinstance(refused, AdapterRefused) and refused.name == message.name
        assert said in refused.reason and "\n" not in refused.reason
        assert await names(link) == ["one"]
        await link.close()

    in_loop(check())


def test_a_second_add_while_the_first_is_loading_is_refused(pair, folders):
    async def check() -> None:
        link = await open_link(pair[0].address)
        for _ in range(2):
            link.send(AddAdapter(name="two", path=str(folders["two"])))
        first, second = await told(link, AdapterRefused), await told(link, AdapterDone)
        assert "is adding an adapter two already" in first.reason
        assert second.adapter.name == "two"
        await link.close()

    in_loop(check())


def test_adapters_can_be_added_after_a_change_of_layers_was_refused(pair, folders, checkpoint):
    async def check() -> None:
        link = await open_link(pair[0].address)
        assert link.welcome is not None
        facts = link.welcome.worker
        for name in ("two", "again"):  # files are read before, too
            assert isinstance(
                await asked(link, AddAdapter(name=name, path=str(folders["two"]))), AdapterDone
            )
            config = checkpoint / "config.json"
            away = config.rename(checkpoint / "config.away")
            try:
                link.send(HoldSection(fingerprint=facts.fingerprint, start_layer=0, end_layer=3))
                said = (await link.receive(60)).message
                while isinstance(said, SectionLoading):
                    said = (await link.receive(60)).message
            finally:
                away.rename(config)
            assert isinstance(said, SectionRefused)
        await link.close()

    in_loop(check())


def test_a_link_that_closes_while_its_adapter_loads_leaves_nothing(pair, folders):
    async def check() -> None:
        link = await open_link(pair[0].address)
        link.send(AddAdapter(name="two", path=str(folders["two"])))
        await link.close()
        other = await open_link(pair[0].address)
        added = await asked(other, AddAdapter(name="after", path=str(folders["two"])))
        assert isinstance(added, AdapterDone)  # the thread for files has come to it
        assert (await asked(other, StatusRequest())).adapters == 2
        await other.close()

    in_loop(check())


def test_there_is_a_limit_to_how_many_a_worker_holds(pair, folders):
    async def check() -> None:
        link = await open_link(pair[0].address)
        for at in range(MAX_ADAPTERS):
            link.send(AddAdapter(name=f"a{at}", path=str(folders["two"])))
        said = [(await link.receive(60.0)).message for _ in range(MAX_ADAPTERS)]
        refused = [it for it in said if isinstance(it, AdapterRefused)]
        assert len(refused) == 1 and "no more can be" in refused[0].reason
        await link.close()
        other = await open_link(pair[0].address)
        await until_only_one_is_held(other)
        await other.close()

    in_loop(check())


# --- who may ask -----------------------------------------------------------------------------


def test_an_observer_may_look_and_not_touch(pair):
    async def check() -> None:
        link = await open_link(pair[0].address, Role.OBSERVER)
        assert await names(link) == ["one"]
        with pytest.raises(Exception, match="may not send DropAdapter"):
            link.send(DropAdapter(name="one"))
        await link.close()

    in_loop(check())


def test_a_worker_that_is_open_to_all_takes_no_adapter_from_a_link(folders, checkpoint):
    words = (
        "--model",
        str(checkpoint),
        "--kv-memory",
        "1MiB",
        "--adapter",
        f"one={folders['one']}",
    )
    with WorkerProcess(*words, "--listen", "0.0.0.0:0", "--insecure") as worker:
        address = worker.address.replace("0.0.0.0", "127.0.0.1")

        async def check() -> None:
            link = await open_link(address)
            for message in (
                AddAdapter(name="two", path=str(folders["two"])),
                DropAdapter(name="one"),
            ):
                refused = await asked(link, message)
                assert isinstance(refused, AdapterRefused)
                assert "without a secret (--insecure)" in refused.reason
            lease = await take_lease(link)
            use = UseAdapter(lease=lease.lease, number=1, name="one")
            assert isinstance(await asked(link, use), AdapterDone)
            await link.close()

        in_loop(check())


def test_with_a_secret_who_knows_it_may_add_from_anywhere(folders, checkpoint, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    words = ("--model", str(checkpoint), "--kv-memory", "1MiB", "--secret-file", str(secret))
    with WorkerProcess(*words, "--listen", "0.0.0.0:0") as worker:
        address = worker.address.replace("0.0.0.0", "127.0.0.1")

        async def check() -> None:
            link = await open_link(address, secret=SECRET.encode())
            added = await asked(link, AddAdapter(name="two", path=str(folders["two"])))
            assert isinstance(added, AdapterDone)
            await link.close()
            with pytest.raises(Exception, match="wants a secret"):
                await open_link(address)

        in_loop(check())


def test_another_manager_s_lease_cannot_be_given_an_adapter(pair):
    async def check() -> None:
        link, other = await open_link(pair[0].address), await open_link(pair[0].address)
        lease = await take_lease(link)
        with pytest.raises(WorkerLost, match="is not open on this link"):
            await asked(other, UseAdapter(lease=lease.lease, number=1, name="one"))
        await closed(other)
        await link.close()

    in_loop(check())
