"""What a llama-server says of the model that it holds: /props and /v1/models, read.

Pure: decoded JSON in, values out; who asks for it stands in `manager.llama_server.client`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from proto.errors import UsageError

FILE_SUFFIX: Final = ".gguf"
ROUTER: Final = "router"  # what /props calls a server that starts others, one a model

# What two servers with the same model agree on, wherever its file lies and however large the
# context is that they were started with.
FINGERPRINT_PROPS: Final = ("model_ftype", "chat_template", "bos_token", "eos_token")
FINGERPRINT_META: Final = ("n_params", "size", "n_vocab", "n_embd", "n_ctx_train", "ftype")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model, as its server describes it. None stands for what it does not say."""

    id: str  # what requests call it
    name: str  # for people: without the folder that it lies in
    path: str | None  # on the server's machine
    file_type: str | None  # such as "Q8_0"
    num_parameters: int | None
    num_bytes: int | None
    context: int  # tokens of one request, prompt and answer together
    num_slots: int  # requests that run at the same time; others wait
    build: str  # of llama.cpp
    fingerprint: str


def choose_model(models: Sequence[Mapping[str, Any]], wanted: str | None, url: str) -> str:
    """The id of the model to ask for.

    Args:
        models: what /v1/models lists.
        wanted: its id, an alias, or its file's name; None: the only one there is.
    Raises:
        UsageError: there is no such model, or none was named among several.
    """
    ids = [str(model.get("id", "")) for model in models]
    held = ", ".join(map(short_name, ids)) or "no model"
    if wanted is None:
        if len(ids) != 1:
            raise UsageError(
                f"the llama-server at {url} holds {held}: say which of them with --model NAME."
            )
        return ids[0]
    for model, model_id in zip(models, ids, strict=True):
        names = {model_id, short_name(model_id), *map(str, model.get("aliases") or ())}
        if wanted in names or short_name(wanted) == short_name(model_id):
            return model_id
    raise UsageError(
        f"the llama-server at {url} holds {held}, not {wanted}: leave --model out, or name "
        "another --server."
    )


def read_model(model_id: str, props: Mapping[str, Any], meta: Mapping[str, Any]) -> ServedModel:
    """Put together what /props says, and /v1/models in the model's `meta`."""
    path = props.get("model_path")
    file_type = props.get("model_ftype") or meta.get("ftype")
    return ServedModel(
        id=model_id,
        name=short_name(model_id),
        path=None if path is None else str(path),
        file_type=None if file_type is None else str(file_type),
        num_parameters=_whole(meta.get("n_params")),
        num_bytes=_whole(meta.get("size")),
        context=_whole(props["default_generation_settings"].get("n_ctx")) or 0,
        num_slots=_whole(props.get("total_slots")) or 1,
        build=str(props.get("build_info") or "unknown"),
        fingerprint=_fingerprint(props, meta),
    )


def is_props(answer: object) -> bool:
    """Whether this is what a llama-server says at /props."""
    return isinstance(answer, dict) and isinstance(answer.get("default_generation_settings"), dict)


def short_name(name: str) -> str:
    """A file without the folders that it lies in; any other name as it is."""
    return name.replace("\\", "/").rpartition("/")[2] if name.endswith(FILE_SUFFIX) else name


def _fingerprint(props: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    known = {
        **{name: props.get(name) for name in FINGERPRINT_PROPS},
        **{name: meta.get(name) for name in FINGERPRINT_META},
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
