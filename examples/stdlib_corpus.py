"""Text that every machine with Python has: what the standard library says about itself.

Docstrings, whole-line comments, and the language reference behind `help("import")`, as one document
per module or topic. The same Python gives the same documents in the same order. Knows nothing of
tokens or training; `train_demo_model.py` reads it.
"""

import ast
import hashlib
import importlib
import inspect
import itertools
import pydoc_data.topics
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

END_OF_TEXT: Final = "<|endoftext|>"  # never within a document

# Too big to learn from, or not English: tables, vendored wheels, and what others put here.
SKIPPED_FOLDERS: Final = frozenset(
    """site-packages dist-packages test tests idle_test __pycache__ ensurepip encodings
    pydoc_data turtledemo""".split()  # noqa: SIM905 - a list of ten strings reads worse
)


@dataclass(frozen=True, slots=True)
class Document:
    """One module or topic, as plain text."""

    name: str
    text: str


def documents() -> Iterator[Document]:
    """The text of the running Python's standard library, always in the same order."""
    root = Path(sysconfig.get_path("stdlib"))
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"topic {name}", tidy(text))
    licence = root / "LICENSE.txt"
    if licence.exists():
        yield Document("licence", tidy(licence.read_text(encoding="utf-8")))
    for name in compiled_modules(root):
        yield from describe_compiled(name)
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            yield from describe_source(relative.as_posix(), path)


def compiled_modules(root: Path) -> list[str]:
    """Names of the modules written in C, but for those that exist to be tested."""
    shared = (path.name.partition(".")[0] for path in (root / "lib-dynload").glob("*.so"))
    names = {*sys.builtin_module_names, *shared}
    return sorted(
        name for name in names if not name.startswith(("_test", "_xx", "xx", "_ctypes_t"))
    )


def describe_compiled(name: str) -> Iterator[Document]:
    """The docstrings of a module without Python source."""
    try:
        module = importlib.import_module(name)
    except ImportError:  # built without the library it needs (Tk, readline)
        return
    parts = [f"{name}\n{module.__doc__ or ''}"]
    for key, value in sorted(vars(module).items()):
        parts.append(described(key, value))
        if isinstance(value, type) and value.__module__ in (name, "builtins"):
            parts += [
                described(f"{key}.{inner}", vars(value)[inner]) for inner in sorted(vars(value))
            ]
    yield Document(f"compiled {name}", tidy("\n\n".join(filter(None, parts))))


def described(name: str, value: object) -> str:
    """Name, signature and docstring of a function or class; "" for anything else."""
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or not (callable(value) or inspect.isdatadescriptor(value)):
        return ""
    signature = getattr(value, "__text_signature__", None)
    return f"{name}{signature.replace('$', '') if signature else ''}\n{inspect.cleandoc(doc)}"


def describe_source(name: str, path: Path) -> Iterator[Document]:
    """The docstrings and whole-line comments of one source file, in the order of the file."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # lib2to3 keeps broken files for its own tests
        return
    pieces = [*docstrings(tree, name), *comments(source)]
    if pieces:
        yield Document(name, tidy("\n\n".join(text for _, text in sorted(pieces))))


def docstrings(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring under the heading of what it describes."""
    for node in ast.walk(tree):
        match node:
            case ast.Module():
                heading, line = name, 0
            case ast.ClassDef():
                bases = ", ".join(map(ast.unparse, node.bases))
                heading, line = f"class {node.name}({bases})", node.lineno
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                heading, line = f"{node.name}({ast.unparse(node.args)})", node.lineno
            case _:
                continue
        if doc := ast.get_docstring(node):
            yield line, f"{heading}\n{doc}"


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each block of whole-line comments that reads as prose."""
    lines = enumerate(source.splitlines(), start=1)
    for is_comment, block in itertools.groupby(lines, lambda line: line[1].lstrip()[:1] == "#"):
        if not is_comment:
            continue
        numbers, texts = zip(*block, strict=True)
        text = inspect.cleandoc("\n".join(line.lstrip().lstrip("#") for line in texts))
        letters = sum(character.isalpha() or character == " " for character in text)
        if letters >= max(40, 0.85 * len(text)):  # else a table, a separator, or old code
            yield numbers[0], text


def tidy(text: str) -> str:
    """Drop ruler lines, trailing blanks and runs of empty lines."""
    text = inspect.cleandoc(text.replace("\r", "").replace(END_OF_TEXT, ""))
    text = re.sub(r"(?m)^[ \t]*([-=*~^#_+.])\1{2,}[ \t]*$", "", text)
    text = re.sub(r"(?m)[ \t]+$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def split(everything: list[Document]) -> tuple[list[Document], list[Document]]:
    """Set one document in twenty aside, by the hash of its name.

    Modules and topics quote each other, so a paragraph is kept only where it comes first, and the
    documents set aside come first of all: nothing in them is left in the training text.
    """
    by_hash = sorted(everything, key=lambda document: sha256(document.name))
    num_heldout = max(1, len(everything) // 20)
    seen: set[str] = set()
    heldout = [kept for each in by_hash[:num_heldout] if (kept := first_seen(each, seen)).text]
    train = [kept for each in by_hash[num_heldout:] if (kept := first_seen(each, seen)).text]
    return train, heldout


def first_seen(document: Document, seen: set[str]) -> Document:
    """The document without the paragraphs in `seen`, to which its own are added."""
    paragraphs = []
    for paragraph in document.text.split("\n\n"):
        key = " ".join(paragraph.split())
        if key not in seen:
            seen.add(key)
            paragraphs.append(paragraph)
    return Document(document.name, "\n\n".join(paragraphs).strip())


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def cut(text: str, max_bytes: int) -> str:
    return text.encode()[:max_bytes].decode(errors="ignore")


def python_licence() -> str:
    """The licence of the text: the PSF asks that it stay with what is made from Python."""
    path = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    return path.read_text(encoding="utf-8") if path.exists() else f"{sys.copyright}\n"
