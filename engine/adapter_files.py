"""One adapter's folder, as peft saves it: its config, and where each of its tensors lies.

Opened without reading a tensor. Which module of a model each of them belongs to is said by
`engine.adapter_places`. Nothing is unpickled, and every size is checked against the file before
memory is taken for it. Imports no peft: boards that only serve do not have it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from engine.adapter_config import CONFIG_FILE, MERGE, AdapterConfig, parse_config
from engine.checkpoint_source import check_link
from engine.copying import unreadable
from engine.json_file import parse_object
from engine.safetensors_file import TensorEntry, read_header, read_tensor
from proto.errors import AdapterError, ModelError

WEIGHTS_FILE: Final = "adapter_model.safetensors"
PICKLED_FILE: Final = "adapter_model.bin"
TRAINED_FOLDER: Final = "lora_adapters"  # within the folder of a run of ours

FIRST: Final = "first matrix"  # (rank, in_features); peft's lora_A
SECOND: Final = "second matrix"  # (out_features, rank); peft's lora_B
BIAS: Final = "bias"  # (out_features,), of the second
MAGNITUDE: Final = "magnitude"  # (out_features,), DoRA's

_MAX_CONFIG_BYTES: Final = 4 * 2**20
_MAX_TENSORS: Final = 200_000
_PREFIX: Final = "base_model.model."
_KEY: Final = re.compile(
    rf"{re.escape(_PREFIX)}(?P<path>.+)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?)"
)
_PARTS: Final = {
    "lora_A.weight": FIRST,
    "lora_B.weight": SECOND,
    "lora_B.bias": BIAS,
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
}
# Of every tensor so many bytes from its middle tell one training from another, without reading
# the sections of others as a whole.
_SAMPLE_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of an adapter, and the name it has in the file."""

    key: str
    entry: TensorEntry


class AdapterFiles:
    """An adapter in a folder of this machine."""

    def __init__(self, folder: str | Path) -> None:
        """Look at the config and at the list of tensors.

        Raises:
            AdapterError: there is no adapter there, it cannot be read, or it is of a kind that
                cannot be served; in one sentence that names the file.
        """
        self.folder = Path(folder).expanduser()
        self._weights = self.folder / WEIGHTS_FILE
        self.read_bytes = 0  # of tensors, so far
        self._check_files()
        said = self._read_config()
        self.config: AdapterConfig = parse_config(said, str(self.folder / CONFIG_FILE))
        header = self._header()
        # Path of a module in the model that was trained -> its tensors, by part.
        self.modules: Mapping[str, Mapping[str, StoredTensor]] = self._by_module(header)
        self.fingerprint = self._fingerprint(said, header)

    def read(self, tensor: StoredTensor) -> Tensor:
        """Read one tensor, and nothing else.

        Raises:
            AdapterError: the file cannot be read, or is not what it was.
        """
        try:
            read = read_tensor(self._weights, tensor.key, tensor.entry)
        except ModelError as exc:
            raise AdapterError(f"{exc}.") from exc
        self.read_bytes += tensor.entry.num_bytes
        return read

    def _check_files(self) -> None:
        folder = self.folder
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "is not there"
            raise AdapterError(
                f"the adapter {folder} {what}: name a folder that holds {CONFIG_FILE} and "
                f"{WEIGHTS_FILE}."
            )
        if (folder / CONFIG_FILE).is_file() and self._weights.is_file():
            try:
                check_link(folder / CONFIG_FILE)
                check_link(self._weights)
            except ModelError as exc:
                raise AdapterError(f"{exc}.") from exc
            return
        if (folder / PICKLED_FILE).is_file() and not self._weights.is_file():
            raise AdapterError(
                f"{folder} holds {PICKLED_FILE} but no {WEIGHTS_FILE}: pickled weights are never "
                "loaded; convert them where you trust them, with peft: "
                "PeftModel.from_pretrained(BASE, DIR).save_pretrained(NEW_DIR)."
            )
        missing = WEIGHTS_FILE if (folder / CONFIG_FILE).is_file() else CONFIG_FILE
        hint = ""
        if (folder / TRAINED_FOLDER / CONFIG_FILE).is_file():
            hint = f"; the adapter of this run lies in {folder / TRAINED_FOLDER}"
        raise AdapterError(f"{folder} holds no {missing}: it is no adapter that peft saved{hint}.")

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / CONFIG_FILE
        try:
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                raise AdapterError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes.")
            return parse_object(path.read_bytes())
        except OSError as exc:
            raise AdapterError(f"{path} cannot be read: {exc.strerror}.") from exc
        except ValueError as exc:
            raise AdapterError(f"{path} is not valid JSON ({exc}): save it again.") from exc

    def _header(self) -> dict[str, TensorEntry]:
        try:
            header = read_header(self._weights, WEIGHTS_FILE)
        except ModelError as exc:
            raise AdapterError(f"{exc}.") from exc
        if not header:
            raise AdapterError(f"{self._weights} holds no tensor: save the adapter again.")
        if len(header) > _MAX_TENSORS:
            raise AdapterError(
                f"{self._weights} holds {len(header)} tensors: no adapter has those."
            )
        self._check_size(header)
        return header

    def _check_size(self, header: Mapping[str, TensorEntry]) -> None:
        """See that the file is as long as its header says."""
        try:
            size = self._weights.stat().st_size
        except OSError as exc:
            raise AdapterError(f"{unreadable(self._weights, exc)}.") from exc
        key = max(header, key=lambda it: header[it].offset + header[it].num_bytes)
        end = header[key].offset + header[key].num_bytes
        if end > size:
            raise AdapterError(
                f"{self._weights} is truncated: tensor {key!r} ends at byte {end}, the file has "
                f"{size}; copy it again."
            )

    def _by_module(self, header: Mapping[str, TensorEntry]) -> dict[str, dict[str, StoredTensor]]:
        modules: dict[str, dict[str, StoredTensor]] = {}
        for key, entry in header.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise AdapterError(f"{self._weights}: {_why_not(key)}.")
            path, part = match["path"], _PARTS[match["part"]]
            modules.setdefault(path, {})[part] = StoredTensor(key, entry)
        for path, parts in modules.items():
            self._check_parts(path, set(parts))
        return modules

    def _check_parts(self, path: str, parts: set[str]) -> None:
        """See that a module has the tensors that the config speaks of, and no others."""
        wanted = {FIRST, SECOND}
        if self.config.is_dora:
            wanted.add(MAGNITUDE)
        if self.config.has_bias:
            wanted.add(BIAS)
        if parts != wanted:
            missing, surplus = sorted(wanted - parts), sorted(parts - wanted)
            what = f"lacks the {missing[0]}" if missing else f"has a {surplus[0]} too many"
            raise AdapterError(
                f"{self._weights} {what} of {path}, going by {CONFIG_FILE}: save the adapter again."
            )

    def _fingerprint(self, said: Mapping[str, Any], header: Mapping[str, TensorEntry]) -> str:
        """Of the config, the list of tensors, and a sample of each tensor."""
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        try:
            with self._weights.open("rb", buffering=0) as file:
                for key in sorted(header):
                    entry = header[key]
                    digest.update(f"\n{key} {entry.dtype} {entry.shape} ".encode())
                    count = min(_SAMPLE_BYTES, entry.num_bytes)
                    file.seek(entry.offset + (entry.num_bytes - count) // 2)
                    digest.update(file.read(count))
        except OSError as exc:
            raise AdapterError(f"{unreadable(self._weights, exc)}.") from exc
        return digest.hexdigest()[:32]


def _why_not(key: str) -> str:
    """What to say of a tensor that is no part of a LoRA layer."""
    name = key.removeprefix(_PREFIX)
    if "lora_embedding_" in name:
        path = name.partition(".lora_embedding_")[0]
        return f"it adapts the embedding {path}, which the manager holds; {MERGE}"
    if "lora_" not in name:
        return f"it holds {name}, a whole tensor of the model, beside its matrices; {MERGE}"
    return f"{key!r} is no name that peft gives a tensor of a LoRA adapter: save it with peft"
