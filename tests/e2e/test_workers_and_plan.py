"""`manager workers` and `manager plan`: what they say is what the workers are and do."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from proto.errors import WorkerLoading
from proto.link import listen
from proto.messages import Hello, Welcome
from tests.support.chains import sections_of


def test_the_table_has_a_row_for_every_worker_in_the_order_of_layers(call, workers):
    shuffled = ",".join(reversed(workers.addresses))
    answer = call("workers", "--workers", shuffled)
    assert answer.returncode == 0, answer.stderr
    titles, *rows = answer.stdout.splitlines()
    assert titles.split()[:4] == ["ADDRESS", "HOST", "SECTION", "LAYERS"]
    assert [row.split()[0] for row in rows] == workers.addresses
    assert ["0/2" in rows[0], "1/2" in rows[1]] == [True, True]


def test_json_has_facts_and_status(call, workers):
    said = json.loads(call("workers", "--workers", workers.option, "--json").stdout)
    assert [it["address"] for it in said] == workers.addresses
    for it in said:
        assert it["facts"]["num_layers"] == 4
        assert it["status"]["rss_bytes"] > 0
        assert it["rtt_s"] > 0


def test_half_a_chain_is_shown_and_remarked_upon(call, workers):
    answer = call("workers", "--workers", workers.addresses[0])
    assert answer.returncode == 0
    assert workers.addresses[0] in answer.stdout
    assert "missing" in answer.stderr


def test_a_worker_that_does_not_answer_hides_no_other(call, workers):
    answer = call("workers", "--workers", f"{workers.addresses[0]},127.0.0.1:9")
    assert answer.returncode == 1
    assert workers.addresses[0] in answer.stdout
    assert answer.stderr.startswith("manager: no worker answers at 127.0.0.1:9")


def test_the_plan_is_what_the_workers_do(call, workers, tiny):
    answer = call("plan", "--model", str(tiny.folder), "--sections", "2", "--json")
    planned = json.loads(answer.stdout)["sections"]
    said = json.loads(call("workers", "--workers", workers.option, "--json").stdout)
    for section, it in zip(planned, said, strict=True):
        facts = it["facts"]
        assert section["start_layer"] == facts["start_layer"]
        assert section["end_layer"] == facts["end_layer"]
        assert section["weights_bytes"] == facts["stage_bytes"]
        tokens = json.loads(answer.stdout)["context"]
        assert section["kv_bytes"] == tokens * facts["block_bytes"] // facts["block_tokens"]


def test_the_commands_of_a_plan_start_a_whole_chain(call, tiny, start):
    plan = call("plan", "--model", str(tiny.folder), "--sections", "3", "--json")
    commands = [it["command"].split() for it in json.loads(plan.stdout)["sections"]]
    assert [tuple(words[1:]) for words in commands] == [
        ("--sections", "3", "--index", str(index), "--model", str(tiny.folder))
        for index in range(3)
    ]
    chain = start(*(tuple(words[1:]) for words in commands))
    answer = call("generate", "fox", "--workers", chain.option, "--max-new-tokens", "4")
    assert answer.returncode == 0, answer.stderr


def test_a_plan_for_people_names_sections_memory_and_commands(call, tiny):
    answer = call("plan", "--model", str(tiny.folder), "--sections", "2", "--context", "100")
    assert answer.returncode == 0, answer.stderr
    assert "KV is for 100 tokens" in answer.stdout
    for words in sections_of(tiny.folder, 2):
        assert f"--index {words[5]}" in answer.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sections", "9"], "cannot split 8 layers over 9 sections"),
        (["--sections", "0"], "0 sections"),
        ([], "--sections"),
        (["--sections", "2", "--model", "/nowhere"], "/nowhere"),
        (["--sections", "2", "--dtype", "float7"], "float7"),
        (["--sections", "2", "--context", "0"], "--context 0"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(call, words, said):
    answer = call("plan", *words)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert said in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_a_worker_that_loads_has_a_row_and_is_no_error(call):
    def refuse(_hello: Hello) -> Welcome:
        raise WorkerLoading("somewhere", 40)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    listener = run(listen("127.0.0.1:0", welcome=refuse, on_link=lambda link: None))
    try:
        answer = call("workers", "--workers", listener.address)
        told = call("workers", "--workers", listener.address, "--json")
    finally:
        run(listener.close("done"))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert (answer.returncode, told.returncode) == (0, 0)
    assert listener.address in answer.stdout and "loading 40 %" in answer.stdout
    assert json.loads(told.stdout) == [
        {"address": listener.address, "state": "loading", "percent": 40}
    ]
