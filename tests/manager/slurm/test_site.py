"""What is peculiar to a cluster: options, variables, the table of comboio.toml and its profiles."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from manager.slurm.site import KEYS, Site, resolve_site
from proto.errors import UsageError

TOML = """
[slurm]
partition = "everyday"
account = "bio42"
venv = "/scratch/venv"
sbatch-flags = ["--exclusive"]

[slurm.profiles.santos-dumont]
partition = "sequana_gpu"
gpus-per-node = 4
modules = ["gcc/14", "cuda/12.6"]

[slurm.profiles.conda]
conda_env = "llm"
"""


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "comboio.toml"
    file.write_text(TOML)
    return {"COMBOIO_CONFIG": str(file)}


def resolve(settings, profile=None, **typed) -> Site:
    return resolve_site(dict.fromkeys(KEYS) | typed, profile, environ=settings)


def test_without_anything_slurm_decides():
    assert resolve({}).flags() == []


def test_the_table_is_read(settings):
    site = resolve(settings)
    assert site.flags() == ["--partition=everyday", "--account=bio42", "--exclusive"]
    assert site.venv == Path("/scratch/venv")


def test_a_profile_stands_above_the_table(settings):
    site = resolve(settings, "santos-dumont")
    assert site.flags() == [
        "--partition=sequana_gpu",
        "--account=bio42",
        "--gpus-per-node=4",
        "--exclusive",
    ]
    assert site.environment()["COMBOIO_MODULES"] == "gcc/14 cuda/12.6"


def test_the_table_may_name_its_usual_profile(settings, tmp_path):
    file = tmp_path / "comboio.toml"
    file.write_text(TOML.replace("[slurm]\n", '[slurm]\nprofile = "santos-dumont"\n'))
    assert resolve(settings).partition == "sequana_gpu"
    assert resolve(settings, "conda").partition == "everyday"


def test_a_variable_stands_above_the_profile_and_an_option_above_all(settings):
    environ = {**settings, "COMBOIO_PARTITION": "night"}
    assert resolve(environ, "santos-dumont").partition == "night"
    assert resolve(environ, "santos-dumont", partition="typed").partition == "typed"


def test_a_typed_environment_replaces_one_of_the_other_kind(settings):
    site = resolve(settings, conda_env="llm")
    assert (site.conda_env, site.venv) == ("llm", None)


def test_so_does_a_profiles(settings):
    assert resolve(settings, "conda").environment()["COMBOIO_CONDA_ENV"] == "llm"


def test_two_environments_from_the_same_place_are_refused(settings):
    with pytest.raises(UsageError, match="--venv a and --conda-env b"):
        resolve(settings, venv="a", conda_env="b")


def test_the_environment_that_runs_now_is_the_jobs_own_unless_another_is_named():
    assert resolve({}).environment()["COMBOIO_VENV"] == sys.prefix
    assert "COMBOIO_VENV" not in Site(conda_env="llm").environment()


@pytest.mark.parametrize(
    ("profile", "content", "words"),
    [
        ("santos", TOML, ["santos", "did you mean 'santos-dumont'"]),
        ("x", "[slurm]\n", ["x", "slurm.profiles.x"]),
        (None, '[slurm]\npartitoin = "a"\n', ["partitoin", "did you mean 'partition'"]),
        (None, "[slurm]\nmodules = [1]\n", ["modules", "[1]", "list of texts"]),
        (None, "[slurm]\npartition = true\n", ["partition", "True"]),
        ("p", "[slurm.profiles.p]\nnodes = 3\n", ["nodes", "slurm.profiles.p"]),
        (None, '[slurm]\nsbatch-flags = ["exclusive"]\n', ["exclusive", "no flag"]),
        (None, '[slurm]\nmodules = ["a b"]\n', ["a b", "--module"]),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(tmp_path, profile, content, words):
    file = tmp_path / "comboio.toml"
    file.write_text(content)
    with pytest.raises(UsageError) as refused:
        resolve({"COMBOIO_CONFIG": str(file)}, profile)
    sentence = str(refused.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence
