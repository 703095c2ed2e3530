"""What a run asks its llama-server: one prompt, a file of them, or nothing.

Read and checked, with the places that the answers go to, before anything is started.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manager.encoding import Message
from manager.llama_server.config import LlamaServerConfig
from manager.llama_server.prompt_folder import conversation, read_prompt_folder
from manager.llama_server.result_file import TIMINGS_SUFFIX, check_result_file, is_device
from manager.prompts import PLAIN, Row, Template, read_prompts
from proto.errors import UsageError

PARALLEL: Final = 4  # prompts at once, where there may be several


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One conversation, one text to continue, several rows, or none of them."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    rows: tuple[Row, ...] = ()
    template: Template = PLAIN

    @property
    def is_single(self) -> bool:
        """Whether there is one answer, and not a file of results."""
        return bool(self.messages) or self.text is not None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return not self.is_single and not self.rows

    def parallel(self, *, keep: bool) -> int:
        """How many sequences the server should expect at once, if nobody says."""
        if keep:
            return PARALLEL
        return min(PARALLEL, len(self.rows)) or 1


def read_question(config: LlamaServerConfig) -> Question:
    """What is asked.

    Raises:
        UsageError: a file is missing or has nothing in it; or nothing is asked, and nobody else
            could ask.
    """
    if config.prompts is not None:
        template = Template(chat=bool(config.chat), system=config.system)
        return Question(
            rows=tuple(read_prompts(config.prompts, config.options, template)), template=template
        )
    if config.prompt_dir is not None:
        if config.chat is False:
            raise UsageError("prompt_dir makes a conversation: leave chat out, or use prompt.")
        messages = read_prompt_folder(config.prompt_dir)
        if config.system is not None:
            if len(messages) > 1:
                raise UsageError(
                    f"system and the system_prompt in {config.prompt_dir} both say what the model "
                    "is told first: keep one of them."
                )
            messages = conversation(messages[0]["content"], config.system)
        return Question(messages=messages)
    if config.prompt is not None:
        return _single(config, config.prompt)
    if config.system is not None:
        raise UsageError("system belongs to a prompt: pass prompt, prompts or prompt_dir as well.")
    if not config.keep:
        raise UsageError(
            "nothing to do: pass --prompt TEXT, --prompts FILE or --prompt-dir DIR to ask, or "
            "--keep to leave the server up."
        )
    return Question()


def check_places(config: LlamaServerConfig, question: Question, *, as_json: bool) -> None:
    """Refuse places that answers cannot be written to.

    Raises:
        UsageError: in one sentence.
    """
    places = {
        "result_file": None if question.rows else config.result_file,
        "output_log": config.output_log,
        "metrics": config.metrics,
    }
    for key, path in places.items():
        if path is not None and not is_device(path):
            check_result_file(key, path)
    if as_json and question.rows and results_path(config) is None:
        raise UsageError(
            "--json prints the metrics on stdout, where the results go: "
            "pass --output FILE for these."
        )
    if as_json and question.is_empty:
        raise UsageError("--json prints an answer, and nothing is asked: leave it out.")
    inputs = {"prompts": config.prompts, "model": config.model}
    _check_distinct({**inputs, **places, "output": config.output}, config.result_file)


def results_path(config: LlamaServerConfig) -> Path | None:
    """Where the results of a file of prompts go; None is stdout."""
    return config.output or config.result_file


def _single(config: LlamaServerConfig, prompt: str) -> Question:
    if not prompt.strip():
        raise UsageError("prompt is empty: write at least one character.")
    if config.chat is not False:
        return Question(messages=conversation(prompt, config.system))
    if config.system is not None:
        raise UsageError("system belongs to a conversation: leave chat out, or set it.")
    return Question(text=prompt)


def _check_distinct(places: dict[str, Path | None], result_file: Path | None) -> None:
    if result_file is not None and places["result_file"] is not None:
        places["the timings of result_file"] = result_file.with_name(
            result_file.name + TIMINGS_SUFFIX
        )
    taken: dict[Path, str] = {}
    for key, path in places.items():
        if path is None or is_device(path):
            continue
        other = taken.setdefault(Path(os.path.realpath(path)), key)
        if other != key:
            raise UsageError(f"{other} and {key} are the same file, {path}: name two.")
