"""What a worker says of itself: log lines, progress, memory."""

from __future__ import annotations

import json
import logging

import pytest

from proto.errors import UsageError
from proto.free_memory import free_cpu_bytes
from worker import logs
from worker.loading import Loading, LoadingAborted
from worker.memory import count_kv_blocks, is_out_of_memory, peak_rss_bytes


def record(**values: object) -> logging.LogRecord:
    made = logging.LogRecord("comboio.worker", logging.INFO, "", 0, "lease opened", None, None)
    made.__dict__.update(logs.fields(**values))
    return made


def test_a_line_is_one_event_then_its_keys() -> None:
    logs.set_up("info", "text")
    (handler,) = logging.getLogger(logs.ROOT).handlers
    line = handler.format(record(lease="1f0c", blocks=64, reason="it said: no"))
    assert line.endswith(' info lease opened lease=1f0c blocks=64 reason="it said: no"')


def test_a_peer_s_words_in_a_line_cannot_play_with_the_terminal() -> None:
    logs.set_up("info", "text")
    (handler,) = logging.getLogger(logs.ROOT).handlers
    line = handler.format(record(agent="\x1b[2J\x9b2J", reason="a\nb", name="São"))
    assert line.endswith(r' agent="\u001b[2J\u009b2J" reason="a\nb" name=São')


def test_a_json_line_has_the_same_keys() -> None:
    logs.set_up("info", "json")
    (handler,) = logging.getLogger(logs.ROOT).handlers
    line = json.loads(handler.format(record(blocks=64)))
    assert (line["event"], line["level"], line["blocks"]) == ("lease opened", "info", 64)


def test_an_error_is_on_the_same_line() -> None:
    logs.set_up("info", "text")
    (handler,) = logging.getLogger(logs.ROOT).handlers
    made = record()
    made.exc_info = (ValueError, ValueError("bad"), None)
    assert handler.format(made).endswith('error="ValueError: bad"')


def test_progress_counts_in_percent_and_is_logged_when_stderr_is_no_terminal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger(logs.ROOT).propagate = True
    loading = Loading()
    with caplog.at_level(logging.INFO, logger=logs.ROOT):
        loading.update(50, 200)
        assert loading.percent == 25
        loading.update(200, 200)
    loading.close()
    assert [entry.getMessage() for entry in caplog.records][-1] == "loading"
    assert loading.percent == 100


def test_loading_that_was_given_up_stops_at_its_next_bytes() -> None:
    loading = Loading()
    loading.is_aborted = True
    with pytest.raises(LoadingAborted):
        loading.update(1, 2)


def test_a_memory_that_holds_no_block_is_refused_with_the_numbers() -> None:
    assert count_kv_blocks(1000, 100, "cpu") == 10
    assert count_kv_blocks(2**40, 1, "cpu") == 2**31 - 1  # what a block table can name
    with pytest.raises(UsageError) as refused:
        count_kv_blocks(99, 100, "cpu")
    assert "--kv-memory of 99 bytes" in str(refused.value)
    assert "100 bytes" in str(refused.value)


def test_without_a_size_kv_gets_a_share_of_what_is_free() -> None:
    assert 0 < count_kv_blocks(None, 1, "cpu") < free_cpu_bytes()
    assert peak_rss_bytes() > 10**6


def test_workers_on_one_machine_divide_that_share_but_not_what_was_asked_for() -> None:
    assert count_kv_blocks(None, 2**20, "cpu", 8) < count_kv_blocks(None, 2**20, "cpu")
    assert count_kv_blocks(1000, 100, "cpu", 2) == 10


def test_every_way_to_run_out_of_memory_is_known() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch's is called."""

    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OutOfMemoryError("CUDA"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes"))
