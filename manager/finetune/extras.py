"""Say which extra is missing, before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec

from proto.errors import UsageError


def require(package: str, what: str, extra: str = "finetune") -> None:
    """Make sure that an optional package is installed, without importing it.

    Raises:
        UsageError: it is not; names the extra to install.
    """
    if find_spec(package) is None:
        raise UsageError(
            f"{what} needs {package}, which is not installed: pip install 'comboio[{extra}]'."
        )
