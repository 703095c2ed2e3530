"""Where a checkpoint's files are: in a folder, or at the hub and in its cache.

Finds files by name, and says what is wrong with a place where they are not. A hub id's files are
downloaded, one by one as they are asked for. Knows no tensor, and opens nothing;
`engine.checkpoint` does. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from proto.errors import ModelError

DEMO_MODEL: Final = Path(__file__).parent / "demo"

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"


def find_source(model: str | None) -> Folder | Hub:
    """The place that a user means.

    Args:
        model: a folder, a hub id ("org/name"), or None for the demo model.
    Raises:
        ModelError: there is no such folder, and nothing of that name at the hub.
    """
    if model is None:
        return Folder(DEMO_MODEL)
    path = Path(model).expanduser()
    if path.is_dir():
        return Folder(path)
    if path.exists():
        raise ModelError(
            f"--model {model} is a file: name the folder that holds config.json and the weights"
        )
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ModelError(f"--model {model}: there is no such folder")
    return Hub(model)


class Folder:
    """A checkpoint in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name

    def locate(self, file: str) -> Path | None:
        """Where a file is; None where it is not."""
        path = self.folder / file
        if not path.is_file():
            return None
        check_link(path)
        return path

    def describe(self, file: str) -> str:
        """A file, as a sentence names it, also one that is not there."""
        return str(self.folder / file)

    def why_no_config(self) -> str:
        """What to say where config.json is not."""
        if not any(self.folder.iterdir()):
            return f"{self.folder} is empty: --model wants a folder with config.json and weights"
        return f"{self.folder} holds no config.json: it is not a Hugging Face checkpoint"

    def why_no_weights(self) -> str:
        """What to say where there is neither a file of weights nor an index."""
        pickled = sorted(it.name for it in self.folder.glob("*.bin"))
        if pickled:
            return _pickled(str(self.folder), pickled[0])
        return (
            f"{self.folder} holds neither {SINGLE} nor {INDEX}: "
            "the weights are missing, fetch the checkpoint again"
        )


class Hub:
    """A checkpoint named by its hub id; files come from the hub cache, or are downloaded to it."""

    def __init__(self, repo: str) -> None:
        self.repo, self.name = repo, repo
        self._revision: str | None = None
        self._unreachable = False
        config = self.locate("config.json")
        if config is None:
            raise ModelError(self.why_no_config())
        self.folder = config.parent
        # All files of one commit, even if the hub moves on while this runs.
        if self.folder.parent.name == "snapshots":
            self._revision = self.folder.name

    def locate(self, file: str) -> Path | None:
        """Where a file is once it is downloaded; None where the hub has none."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            path = Path(hf_hub_download(self.repo, file, revision=self._revision))
            check_link(path)
            return path
        except LocalEntryNotFoundError:  # not in the cache, and the hub was not asked or is away
            self._unreachable = True
            return None
        except EntryNotFoundError:
            return None
        except HFValidationError as exc:
            raise ModelError(
                f"--model {self.repo!r} is neither a folder nor a hub id like 'org/name'"
            ) from exc
        except (HfHubHTTPError, OSError) as exc:
            reason = str(exc).splitlines()[0]
            raise ModelError(f"{file} of {self.repo} could not be downloaded: {reason}") from exc

    def describe(self, file: str) -> str:
        """As of a folder."""
        return f"{file} of {self.repo}"

    def why_no_config(self) -> str:
        """As of a folder."""
        from huggingface_hub.constants import HF_HUB_OFFLINE

        where = "on the hub"
        if HF_HUB_OFFLINE:
            where = "in the hub cache (HF_HUB_OFFLINE is set)"
        elif self._unreachable:
            where = "in the hub cache, and the hub cannot be reached"
        return f"--model {self.repo!r} is no folder here, and no such model was found {where}"

    def why_no_weights(self) -> str:
        """As of a folder."""
        if self.locate("pytorch_model.bin") or self.locate("pytorch_model.bin.index.json"):
            return _pickled(self.repo, "pytorch_model.bin")
        return f"{self.repo} has no safetensors weights in the hub cache or on the hub"


def check_link(path: Path) -> None:
    """Refuse a link that leads out of its folder to anything but the hub cache's own files.

    A folder that came from elsewhere may have a link to any file that its reader can read.

    Raises:
        ModelError: names the link and where it leads.
    """
    if not path.is_symlink():
        return
    real, folder = path.resolve(), path.parent.resolve()
    is_blob = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    own_blobs = (folder.parent.parent / "blobs").resolve()  # of a snapshot in the hub cache
    is_own_blob = folder.parent.name == "snapshots" and real.is_relative_to(own_blobs)
    if not (real.is_relative_to(folder) or is_blob or is_own_blob):
        raise ModelError(
            f"{path} is a link to {real}, outside of the checkpoint's folder: put the file itself "
            "there if you trust it"
        )


def _pickled(where: str, file: str) -> str:
    return (
        f"{where} holds {file} but no safetensors: pickled weights are never loaded; convert them "
        "where you trust them, with transformers: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
    )
