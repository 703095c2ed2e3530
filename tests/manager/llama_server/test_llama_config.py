"""What a configuration may say, where it comes from, and the sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from manager.llama_server.config import LlamaServerConfig, load_config
from manager.llama_server.options import FLAGS, JOB_KEYS, KEYS, REPEATED
from proto.errors import UsageError
from tests.support.processes import ROOT

AS_BEFORE = {
    "job_name": "llama",
    "output_log": "logs/job.log",
    "result_file": "result.txt",
    "dir_llama_script": "/opt/llama.cpp/build/bin",
    "model": "models/m.gguf",
    "port_rpc": 50052,
    "port_server": 8080,
    "venv_dir": "venv",
    "prompt_dir": "prompts",
    "nodes": 3,
    "ntasks": 3,
    "time": "00:30:00",
    "sbatch_script": "job.sbatch",
}


def write(folder: Path, content: object, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refused(path: Path | None, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(path, options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_the_keys_of_before_are_read_as_they_are(tmp_path):
    config = load_config(write(tmp_path, AS_BEFORE), {})
    assert config.model == tmp_path / "models/m.gguf"
    assert config.prompt_dir == tmp_path / "prompts"
    assert config.dir_llama_script == Path("/opt/llama.cpp/build/bin")
    assert (config.port_rpc, config.port_server, config.nodes) == (50052, 8080, 3)
    assert (config.time, config.job_name) == ("00:30:00", "llama")


def test_toml_has_them_at_its_top_or_in_its_table(tmp_path):
    top = write(tmp_path, 'model = "m.gguf"\nport-rpc = 5000\ntime = 01:00:00\n', "top.toml")
    table = write(
        tmp_path,
        '[other]\nx = 1\n[llama-server]\nmodel = "m.gguf"\nport_rpc = 5000\n',
        "table.toml",
    )
    for path in (top, table):
        config = load_config(path, {})
        assert (config.model, config.port_rpc) == (tmp_path / "m.gguf", 5000)
    assert load_config(top, {}).time == "01:00:00"


def test_a_typed_option_wins_over_the_file_and_the_file_over_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    path = write(folder, {"model": "m.gguf", "nodes": 2, "temperature": 0.5})
    settings = {"temperature": ("0.9", "COMBOIO_TEMPERATURE"), "top_k": (4, "COMBOIO_TOP_K")}
    config = load_config(path, {"nodes": "4", "result_file": "r.txt"}, settings=settings)
    assert (config.nodes, config.temperature, config.top_k) == (4, 0.5, 4)
    assert config.result_file == tmp_path / "r.txt"
    assert config.model == folder / "m.gguf"


def test_a_typed_prompt_replaces_the_prompt_folder_of_the_file(tmp_path):
    path = write(tmp_path, {"model": "m.gguf", "prompt_dir": "prompts"})
    config = load_config(path, {"prompt": "hi"})
    assert (config.prompt, config.prompt_dir) == ("hi", None)


def test_home_and_variables_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", "/models")
    path = write(tmp_path, {"model": "$MODELS/m.gguf", "output_log": "~/log.txt"})
    config = load_config(path, {})
    assert (config.model, config.output_log) == (Path("/models/m.gguf"), tmp_path / "log.txt")


def test_blank_and_null_count_as_not_set(tmp_path):
    path = write(tmp_path, {"model": "m.gguf", "venv_dir": "", "ntasks": None, "time": ""})
    config = load_config(path, {})
    assert (config.venv_dir, config.ntasks, config.time) == (None, None, None)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("00:30:00", "00:30:00"),
        ("1:00:00", "01:00:00"),
        ("30:00:00", "1-06:00:00"),
        ("2-12", "2-12:00:00"),
        ("1-00:30:00", "1-00:30:00"),
        (90, "01:30:00"),
        ("90", "01:30:00"),
        ("infinite", "UNLIMITED"),
    ],
)
def test_times_are_read_as_people_write_them(tmp_path, written, read):
    assert load_config(write(tmp_path, {"model": "m", "time": written}), {}).time == read


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("port_rpc", "50052x", "it takes a port from 1 to 65535"),
        ("port_rpc", 65536, "it takes a port from 1 to 65535"),
        ("port_server", 0, "it takes a port from 1 to 65535"),
        ("port_server", True, "it takes a port from 1 to 65535"),
        ("nodes", 0, "it takes a number of nodes from 1 to 100000"),
        ("nodes", 1.5, "it takes a number of nodes from 1 to 100000"),
        ("model", 7, "it takes a path"),
        ("job_name", ["a"], "it takes a text"),
        ("keep", "yes", "it takes true or false"),
        ("time", "30:00", "that may be hours and minutes, or minutes and seconds"),
        ("time", "soon", "it takes a time as 00:30:00 or 2-00:00:00, or a number of minutes"),
        ("time", "00:99:00", "its minutes and seconds go to 59"),
        ("time", 0, "it takes a time longer than nothing"),
        ("temperature", "hot", "it takes a number from 0 to 1000"),
        ("tensor_split", "3;1", 'it takes numbers with commas, a share for each, as "3,1"'),
        ("tensor_split", "0,0", 'it takes numbers with commas, a share for each, as "3,1"'),
        ("n_gpu_layers", "many", 'it takes a number of layers, "auto" or "all"'),
        ("split_mode", "rows", "it takes one of none, layer, row, tensor"),
        ("server_args", [1], "it takes a list of words"),
        ("server_args", "--a 'b", "it takes a list of words (No closing quotation)"),
        ("stop", [""], "it takes a text, or a list of texts"),
    ],
)
def test_a_wrong_value_names_its_key_its_file_and_what_it_takes(tmp_path, key, value, why):
    path = write(tmp_path, {"model": "m.gguf", key: value})
    sentence = refused(path)
    assert sentence.startswith(f"{key} in {path} is {json.dumps(value)}: {why}")


def test_a_wrong_option_is_named_as_it_was_typed():
    assert refused(None, model="m.gguf", port_rpc="x").startswith('--port-rpc is "x": it takes')


def test_an_unknown_key_is_told_with_the_one_that_was_meant(tmp_path):
    path = write(tmp_path, {"model": "m.gguf", "port-rcp": 5000})
    assert refused(path) == f"unknown key 'port_rcp' in {path}: did you mean 'port_rpc'?"
    far = refused(write(tmp_path, {"model": "m.gguf", "zzz": 1}))
    assert "unknown key 'zzz'" in far and "known are job_name, output_log" in far


def test_a_missing_model_is_told(tmp_path):
    path = write(tmp_path, {"nodes": 1})
    assert refused(path) == (
        f"model is missing in {path}: set it to the .gguf file to run, or pass --model."
    )


def test_several_mistakes_are_counted(tmp_path):
    sentence = refused(write(tmp_path, {"model": 1, "nodes": 0, "port_rpc": "x"}))
    assert sentence.endswith("(2 more mistakes beside this one.)")


@pytest.mark.parametrize("ntasks", [1, 6])
def test_tasks_that_are_not_nodes_are_refused_with_both_numbers(tmp_path, ntasks):
    path = write(tmp_path, {"model": "m.gguf", "nodes": 3, "ntasks": ntasks})
    sentence = refused(path)
    assert f"ntasks is {ntasks} and nodes is 3" in sentence
    assert sentence.endswith("Leave ntasks out, or set it to 3.")


def test_what_is_asked_in_two_ways_is_refused(tmp_path):
    path = write(tmp_path, {"model": "m.gguf", "prompt_dir": "p", "prompts": "a.txt"})
    assert "prompt_dir and prompts both say what to ask: keep one of them" in refused(path)
    path = write(tmp_path, {"model": "m.gguf", "prompt": "p", "output": "a.jsonl"})
    assert "output is for the results of prompts, and there are none" in refused(path)


def test_options_of_the_text_are_checked_as_everywhere(tmp_path):
    path = write(tmp_path, {"model": "m.gguf", "top_p": 0})
    assert refused(path) == (f"top_p in {path}: top_p is 0.0; it takes a number above 0 to 1.")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (
            "c.json",
            '{"model": "m",\n "nodes": }',
            "is not valid JSON: line 2, column 11: Expecting",
        ),
        ("c.json", "[1]", "must be one JSON object, {...} with keys; it is [1]."),
        ("c.json", '{"nodes": 1, "nodes": 2}', "sets 'nodes' twice: remove one of them."),
        ("c.json", '{"port-rpc": 1, "port_rpc": 2}', "sets 'port_rpc' twice, with _ and with -"),
        ("c.json", "[" * 100_000, "nests too deeply"),
        ("c.toml", "model = ", "is not valid TOML: "),
        (
            "c.toml",
            "nodes = 1\n[llama-server]\n",
            "stands outside of [llama-server]: put it below.",
        ),
        ("c.toml", "llama-server = 1\n", "it is a table, [llama-server]."),
        ("c.yaml", "", "its name must end in .json or .toml."),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence_with_its_name(tmp_path, name, content, why):
    path = write(tmp_path, content, name)
    sentence = refused(path)
    assert why in sentence
    assert str(path) in sentence


def test_a_file_that_is_not_there_or_not_text_is_one_sentence(tmp_path):
    assert "there is no such file" in refused(tmp_path / "no.json")
    (tmp_path / "folder.json").mkdir()
    assert "is a folder" in refused(tmp_path / "folder.json")
    (tmp_path / "latin.json").write_bytes(b'{"model": "\xe9"}')
    assert "is not UTF-8 (byte 11): save it as UTF-8" in refused(tmp_path / "latin.json")


def test_a_variable_that_is_not_set_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    path = write(tmp_path, {"model": "${NOWHERE}/m.gguf"})
    assert refused(path).endswith("${NOWHERE} is not set in the environment.")


def test_every_key_is_an_option_too():
    assert {*KEYS, *JOB_KEYS, *REPEATED, *FLAGS} == set(LlamaServerConfig.model_fields)
    assert not {"config", "debug"} & set(LlamaServerConfig.model_fields)


def test_the_help_page_loads_neither_pydantic_nor_openai():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "manager", "llama-server", "run", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert done.returncode == 0
    assert "--dir-llama-script" in done.stdout
    assert loaded & {"pydantic", "openai", "torch", "transformers", "numpy", "gguf"} == set()
