"""From names on a command line to rows: filters, splits, counts, and what is refused."""

from __future__ import annotations

import pytest

from engine.jobs.data_places import NAMED_SETS
from engine.jobs.dataset import prepare
from engine.jobs.rows import DataError
from engine.jobs.settings import DataSettings
from proto.errors import UsageError
from tests.support.finetuning import write_jsonl
from tests.support.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer(chat=True)
KERNELS = [
    {"problem statement": "Add two vectors.", "solution": "a[i] + b[i]", "language": "Cuda"},
    {"problem statement": "Sort.", "solution": "sort(a)", "language": "C"},
    {"problem statement": "Scale.", "solution": "s * a[i]", "language": "cuda"},
    {"problem statement": "Nothing.", "solution": " ", "language": "Cuda"},
]


def made(*train, seed=0, context=64, **settings):
    return prepare(
        DataSettings(train=tuple(map(str, train)), **settings),
        tokenizer=TOKENIZER, model_name="tiny", vocab_size=1000, max_context=context, seed=seed,
    )  # fmt: skip


def text_of(rows, index):
    return TOKENIZER.decode(rows[index].input_ids.tolist())


def lines(path, count, words="the fox"):
    path.write_text("".join(f"{words} {number}\n" for number in range(count)))
    return path


def test_a_language_filter_keeps_the_wanted_and_counts_the_others(tmp_path):
    data = made(write_jsonl(tmp_path / "hpc.jsonl", KERNELS), filter_language="Cuda")
    summary = data.summary
    assert summary.sources[0]["shape"] == "hpc-instruct" and summary.sources[0]["samples"] == 2
    assert dict(summary.languages) == {"Cuda": 2, "C": 1, "cuda": 1}
    assert dict(summary.dropped) == {"another language than Cuda": 1, "nothing in it": 1}
    assert f"dropped 1: nothing in it ({tmp_path}/hpc.jsonl:4)" in summary.sentences()
    assert summary.template == "chat"


def test_a_filter_that_leaves_nothing_says_which_languages_there_are(tmp_path):
    path = write_jsonl(tmp_path / "hpc.jsonl", KERNELS)
    with pytest.raises(
        DataError, match=r"--filter-language Rust leaves no sample of .*Cuda \(2\), C \(1\), cuda"
    ):
        made(path, filter_language="Rust")


def test_a_filter_on_data_without_languages_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"a\.txt:1: --filter-language Cuda: there is no 'language'"
    ):
        made(lines(tmp_path / "a.txt", 3), filter_language="Cuda")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The guides' sets in a hub cache, two samples each."""
    import datasets
    import huggingface_hub

    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    samples = {
        "hpc-instruct": KERNELS[:2],
        "evol-instruct": [{"instruction": f"i{at}", "output": "o"} for at in range(2)],
        "magicoder": [{"problem": f"p{at}", "solution": "s", "lang": "cpp"} for at in range(2)],
    }
    for name, rows in samples.items():
        repo = cache / f"datasets--{NAMED_SETS[name].replace('/', '--')}"
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        write_jsonl(repo / "snapshots" / commit / "data.jsonl", rows)


def test_the_guides_sets_are_added_by_flags_and_not_filtered(hub):
    data = made(filter_language="Cuda", use_evol_instruct=True, use_magicoder=True)
    shapes = [(it["shape"], it["samples"]) for it in data.summary.sources]
    assert shapes == [("hpc-instruct", 1), ("evol-instruct", 2), ("magicoder", 2)]
    assert "no --train-path: hpcgroup/hpc-instruct is read, as in the guide" in data.summary.notes


def test_samples_held_out_are_not_trained_on_and_stay_the_same(tmp_path):
    path = lines(tmp_path / "a.txt", 20)
    for holdout, count in ((0.1, 2), (5, 5)):
        data, again = (made(path, holdout=holdout) for _ in range(2))
        assert data.validation is not None
        assert (len(data.train), len(data.validation)) == (20 - count, count)
        apart = {text_of(data.validation, at) for at in range(count)}
        assert apart.isdisjoint(text_of(data.train, at) for at in range(20 - count))
        assert again.validation is not None
        assert (data.train.digest, data.validation.digest) == (
            again.train.digest,
            again.validation.digest,
        )
    assert made(path, holdout=5, seed=1).train.digest != data.train.digest


def test_a_text_that_takes_several_rows_is_held_out_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join("abcdefgh"[at] * 200 + "\n" for at in range(8)))
    data = made(path, holdout=2)
    assert data.validation is not None and data.summary.cut == 8
    letters = [
        {text_of(rows, at)[0] for at in range(len(rows))} for rows in (data.train, data.validation)
    ]
    letters = [{it for it in found if it in "abcdefgh"} for found in letters]
    assert len(letters[1]) == 2 and letters[0].isdisjoint(letters[1])


def test_a_folder_brings_its_own_validation_split(tmp_path):
    lines(tmp_path / "train.txt", 4)
    lines(tmp_path / "val.txt", 3)
    lines(tmp_path / "test.txt", 2)
    data = made(tmp_path)
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (4, 3)
    assert data.summary.ignored == [str(tmp_path / "test.txt")]
    # Held-out samples come out of the training data, and the folder's own are left.
    held = made(tmp_path, holdout=1)
    assert held.validation is not None and (len(held.train), len(held.validation)) == (3, 1)


def test_several_paths_of_several_shapes_are_one_data_set(tmp_path):
    first = lines(tmp_path / "a.txt", 2)
    second = write_jsonl(tmp_path / "b.jsonl", KERNELS[:1])
    third = write_jsonl(tmp_path / "c.jsonl", [{"input_ids": [5, 6, 7]}])
    data = made(first, second, third)
    assert [it["shape"] for it in data.summary.sources] == ["text", "hpc-instruct", "tokens"]
    assert len(data.train) == 4


def test_max_samples_takes_the_first_of_the_training_data(tmp_path):
    data = made(lines(tmp_path / "a.txt", 2000), max_samples=3)
    assert [text_of(data.train, at) for at in range(3)] == [
        f"the fox {at}<|end|>" for at in range(3)
    ]
    assert len(data.train) == 3 and data.summary.sources[0]["samples"] == 3


def test_lengths_and_learnt_tokens_are_counted(tmp_path):
    rows = [{"input_ids": list(range(5, 5 + length))} for length in range(2, 22)]
    summary = made(write_jsonl(tmp_path / "a.jsonl", rows)).summary
    lengths = summary.train.lengths
    assert (lengths.p50, lengths.p95, lengths.max) == (12, 21, 21)
    assert summary.train.tokens == sum(range(2, 22))
    assert summary.train.learnt_tokens == sum(range(2, 22)) - 20
    packed = made(tmp_path / "a.jsonl", packing=True).summary.train
    assert packed.rows == 4 and packed.fill == pytest.approx(230 / (4 * 64))


def test_empty_data_is_refused_with_what_was_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match=r"a\.jsonl has no sample to train on: it is empty"):
        made(path)
    write_jsonl(path, [{"text": ""}] * 3)
    with pytest.raises(DataError, match=r"no sample to train on \(3 with nothing in it\)"):
        made(path)
    good = lines(tmp_path / "a.txt", 3)
    with pytest.raises(DataError, match="the validation data has no sample left"):
        made(good, validation=(str(path),))
    with pytest.raises(DataError, match="there is no data to train on: pass --train-path"):
        made()


def test_a_held_out_part_must_leave_something_on_both_sides(tmp_path):
    path = lines(tmp_path / "a.txt", 4)
    for holdout in (0.01, 4, 9):
        with pytest.raises(DataError, match=f"--validation {holdout} would hold .* of 4 samples"):
            made(path, holdout=holdout)


def test_rows_longer_than_the_model_takes_are_refused(tmp_path):
    path = lines(tmp_path / "a.txt", 4)
    with pytest.raises(DataError, match="--max-length 65: tiny takes 64 tokens at most"):
        made(path, max_length=65)
    assert made(path).summary.max_length == 64
    assert made(path, context=8000).summary.max_length == 1024


@pytest.mark.parametrize(
    "settings",
    [
        {"holdout": 0},
        {"holdout": 0.1, "validation": ("x",)},
        {"prompt_column": "x"},
        {"text_column": "x", "prompt_column": "y", "completion_column": "z"},
        {"max_length": 1},
        {"template": "none"},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UsageError):
        DataSettings(**settings)
