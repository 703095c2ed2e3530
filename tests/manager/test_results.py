"""Where results go: resumed whatever happened in between, and whole at the end."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest

from manager.generation import GenerationOptions
from manager.prompts import Row
from manager.results import ResultsLost, open_results
from proto.errors import UsageError

MADE_BY = {"model": "demo", "max_new_tokens": 8, "stop": ()}


def rows_of(*prompts):
    return [
        Row(index=i, line=i + 1, id=f"r{i}", prompt=p, messages=None, options=GenerationOptions())
        for i, p in enumerate(prompts)
    ]


ABC = rows_of("a", "b", "c")


def result(row, text="t", error=None):
    return {"index": row.index, "id": row.id, "prompt": row.prompt, "text": text, "error": error}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def partial(tmp_path):
    return tmp_path / "out.jsonl.partial"


def begin(output, rows=ABC, made_by=MADE_BY, *, overwrite=False):
    results = open_results(output, rows, overwrite=overwrite)
    try:
        results.begin(made_by)
    except BaseException:
        results.__exit__(None, None, None)
        raise
    return results


def done_in(output, rows=ABC):
    """The rows that a batch would skip."""
    with begin(output, rows) as results:
        return results.done


def interrupted_after(output, *done, rows=ABC, made_by=MADE_BY):
    """A batch that ended when these rows were there."""
    with begin(output, rows, made_by) as results:
        for row in done:
            results.add(row, result(row))
        return results.kept


async def finish(results, *rows):
    with results:
        for row in rows:
            results.add(row, result(row))
        await results.finish()


async def test_results_are_in_input_order_however_they_came(output, partial):
    await finish(begin(output), ABC[2], ABC[0], ABC[1])
    assert [(it["index"], it["prompt"]) for it in read(output)] == [(0, "a"), (1, "b"), (2, "c")]
    assert not partial.exists()


async def test_a_row_is_on_disk_as_soon_as_it_is_added(output, partial):
    with begin(output) as results:
        results.add(ABC[1], result(ABC[1], "é\n日本"))
        assert read(partial)[1]["result"]["text"] == "é\n日本"


async def test_an_interrupted_batch_goes_on_with_the_rows_that_are_not_there(output, partial):
    kept = interrupted_after(output, ABC[2], ABC[0])
    assert kept == f"2 of 3 rows are kept in {partial}: run the same command again to go on"
    again = begin(output)
    assert again.done == {0, 2}
    await finish(again, ABC[1])
    assert [it["index"] for it in read(output)] == [0, 1, 2]


@pytest.mark.parametrize("cut", [1, 20])
async def test_a_torn_last_line_is_dropped(output, partial, cut):
    interrupted_after(output, ABC[0], ABC[1])
    os.truncate(partial, partial.stat().st_size - cut)
    again = begin(output)
    assert again.done == {0}
    await finish(again, ABC[1], ABC[2])
    assert len(read(output)) == 3


async def test_a_file_with_nothing_but_a_torn_header_begins_anew(output, partial):
    partial.write_text('{"partial": 1, "repl')
    await finish(begin(output), *ABC)
    assert len(read(output)) == 3


def test_an_interruption_before_the_first_row_leaves_nothing_behind(output, partial):
    assert interrupted_after(output) == "no row was finished"
    assert not partial.exists()
    with open_results(output, ABC, overwrite=False):
        pass
    assert not partial.exists()


def test_another_model_or_other_options_are_refused_with_both_values(output, partial):
    interrupted_after(output, ABC[0])
    with pytest.raises(UsageError) as refused:
        begin(output, rows_of("A", "B"), made_by={**MADE_BY, "max_new_tokens": 9})
    assert f"{partial} was begun with max_new_tokens 8, now it is 9" in str(refused.value)
    assert "--overwrite" in str(refused.value)
    with pytest.raises(UsageError, match='with model "demo", now it is "other"'):
        begin(output, made_by={**MADE_BY, "model": "other"})
    assert done_in(output) == {0}


async def test_rows_may_move_and_others_may_come(output):
    interrupted_after(output, ABC[0], ABC[2])
    rows = rows_of("c", "d", "a")
    again = begin(output, rows)
    assert again.done == {0, 2}
    await finish(again, rows[1])
    assert [(it["index"], it["id"], it["prompt"]) for it in read(output)] == [
        (0, "r0", "c"),
        (1, "r1", "d"),
        (2, "r2", "a"),
    ]


async def test_a_prompt_that_changed_runs_again(output):
    interrupted_after(output, ABC[0], ABC[1])
    with begin(output, rows_of("a", "B", "c")) as again:
        assert again.done == {0}
        assert again.num_changed == 1


async def test_equal_prompts_are_each_run_once(output):
    same = rows_of("a", "a", "a")
    interrupted_after(output, same[0], rows=same)
    again = begin(output, same)
    assert again.done == {0}
    await finish(again, same[1], same[2])
    assert len(read(output)) == 3


def test_failed_rows_are_counted_also_when_they_were_there_before(output):
    with begin(output) as results:
        results.add(ABC[0], result(ABC[0], error="too long"))
        results.add(ABC[1], result(ABC[1]))
        assert results.num_failed == 1
    with begin(output) as again:
        assert again.num_failed == 1


async def test_results_that_are_there_are_not_replaced_unless_asked(output, partial):
    await finish(begin(output), *ABC)
    with pytest.raises(UsageError, match="is there already: pass --overwrite"):
        open_results(output, ABC, overwrite=False)
    assert not partial.exists()
    await finish(begin(output, rows_of("z"), overwrite=True), *rows_of("z"))
    assert [it["prompt"] for it in read(output)] == ["z"]


async def test_a_replacement_that_was_interrupted_goes_on_without_overwrite(output):
    await finish(begin(output), *ABC)
    with begin(output, overwrite=True) as results:
        results.add(ABC[0], result(ABC[0], "new"))
        assert "run the same command again without --overwrite to go on" in results.kept
    assert [it["text"] for it in read(output)] == ["t", "t", "t"]  # the old ones until the end
    await finish(begin(output), *ABC[1:])
    assert [it["text"] for it in read(output)] == ["new", "t", "t"]


def test_overwrite_discards_nothing_before_the_first_row_is_about_to_run(output, partial):
    interrupted_after(output, ABC[0])
    with open_results(output, ABC, overwrite=True):
        pass  # no worker answered, say
    assert done_in(output) == {0}


def test_a_partial_file_of_somebody_else_is_refused_by_line(output, partial):
    partial.write_text('{"my": "notes"}\n')
    with pytest.raises(UsageError, match=r"partial:1 is not what a batch writes"):
        open_results(output, ABC, overwrite=False)
    assert partial.read_text() == '{"my": "notes"}\n'


def test_two_batches_do_not_write_the_same_file(output):
    with begin(output), pytest.raises(UsageError, match="another batch is writing"):
        open_results(output, ABC, overwrite=False)


@pytest.mark.parametrize("where", ["none/out.jsonl", "."])
def test_a_place_where_no_file_can_be_is_refused(tmp_path, where):
    with pytest.raises(UsageError, match=r"--output .*(no folder|is a folder)"):
        open_results(tmp_path / where, ABC, overwrite=False)


async def test_a_link_stays_a_link(tmp_path, output):
    link = tmp_path / "link.jsonl"
    link.symlink_to(output)
    await finish(begin(link), *ABC)
    assert link.is_symlink()
    assert len(read(output)) == 3


async def test_on_stdout_rows_come_in_input_order_as_soon_as_they_can(capsys):
    results = open_results(None, ABC, overwrite=False)
    results.begin(MADE_BY)
    results.add(ABC[1], result(ABC[1]))
    results.add(ABC[0], result(ABC[0]))
    await results.pause()
    assert [json.loads(it)["index"] for it in capsys.readouterr().out.splitlines()] == [0, 1]
    assert results.kept.startswith("2 of 3 rows were written to stdout")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
async def test_a_device_that_is_full_is_one_sentence():
    from pathlib import Path

    with open_results(Path("/dev/full"), ABC, overwrite=False) as results:
        results.begin(MADE_BY)
        results.add(ABC[0], result(ABC[0]))
        with pytest.raises(ResultsLost, match="results to /dev/full: No space left on device"):
            await results.finish()


async def test_what_reads_stdout_may_go_away(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    os.close(reader)
    results = open_results(None, ABC, overwrite=False)
    results.begin(MADE_BY)
    results.add(ABC[0], result(ABC[0]))
    with pytest.raises(BrokenPipeError):
        await asyncio.wait_for(results.finish(), 10)
    with pytest.raises(BrokenPipeError):
        sys.stdout.close()
