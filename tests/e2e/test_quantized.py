"""A model in 4 bits over real workers: cut in two it says the same as whole, and how it is held."""

from __future__ import annotations

import json

from tests.support.chains import manager, sections_of


def test_four_bits_give_the_same_tokens_over_one_worker_and_two(call, start, tiny):
    words = ("--json", "--ignore-eos", "--max-new-tokens", "24")
    spawned = manager(
        *("generate", "fox", "--quantize", "int4", "--spawn", "2", "--model", str(tiny.folder)),
        *words,
    )
    assert spawned.returncode == 0, spawned.stderr
    whole = start(*sections_of(tiny.folder, 1, "--quantize", "int4", "--kv-memory", "16MB"))
    alone = call("generate", "fox", "--workers", whole.option, *words)
    assert alone.returncode == 0, alone.stderr
    two, one = json.loads(spawned.stdout), json.loads(alone.stdout)
    assert (len(two["workers"]), len(one["workers"])) == (2, 1)
    assert len(one["token_ids"]) == 24
    assert two["token_ids"] == one["token_ids"]

    [facts] = json.loads(call("workers", "--workers", whole.option, "--json").stdout)
    assert facts["facts"]["quantize"] == "int4"
    titles, row = call("workers", "--workers", whole.option).stdout.splitlines()
    assert "DTYPE" in titles
    assert f"{facts['facts']['dtype']} int4" in row
