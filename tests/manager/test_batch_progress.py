"""What a batch says of its progress."""

from __future__ import annotations

import pytest

from manager.batch_progress import BatchProgress, duration
from manager.output import Notices


def test_time_left_counts_what_running_rows_have_of_theirs():
    progress = BatchProgress(4, Notices())
    assert progress.words(elapsed_s=10) == "0.0 tokens/s"
    progress.tokens_came(row=0, count=8, max_new_tokens=8)
    progress.row_done(0)
    progress.tokens_came(row=1, count=4, max_new_tokens=8)
    progress.tokens_came(row=2, count=4, max_new_tokens=8)
    assert progress.words(elapsed_s=10) == "1.6 tokens/s, about 10 s left"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3570, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_are_as_short_as_they_can_be(seconds, said):
    assert duration(seconds) == said
