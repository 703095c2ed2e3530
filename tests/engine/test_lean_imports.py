"""A worker does without what training, sharding and compiling need, until somebody asks for it."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from engine.lean_imports import SymbolicShapes
from tests.support.processes import READY, ROOT, clean_environment

HEAVY = (
    "accelerate",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx",
)
# What is there for good; a stand-in is a module of another type.
LOADED = """
import json, sys, types
def loaded(names):
    return [it for it in names if type(sys.modules.get(it)) is types.ModuleType]
"""


def script(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOADED + code, *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=clean_environment(),
    )  # fmt: skip


def said(code: str, *args: str) -> Any:
    process = script(code, *args)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


def test_a_worker_that_has_checked_its_layers_has_loaded_nothing_for_training_or_compiling():
    worker = script(
        "import atexit\n"
        "from worker.cli import main\n"
        f"atexit.register(lambda: print(json.dumps(loaded(['torch', *{HEAVY}]))))\n"
        "main(sys.argv[1:])\n",
        *("--listen", "127.0.0.1:0", "--dtype", "bfloat16", "--quantize", "int4", "--no-cache"),
    )
    assert worker.stdout is not None
    ready = worker.stdout.readline()
    worker.send_signal(signal.SIGTERM)
    out, err = worker.communicate(timeout=120)
    assert READY.match(ready), err
    assert json.loads(out) == ["torch"]


def test_what_was_put_off_is_there_once_it_is_asked_for():
    before, after, compiled, algebra, same = said(
        """
from engine import lean_imports
lean_imports.allow()
lean_imports.prepare()
import sympy, torch
dynamo = torch._dynamo

@torch.compiler.disable
def plain(x):
    return x + 1

@torch._dynamo.allow_in_graph
def marked(x):
    return plain(x) * 2

names = ["torch._dynamo", "sympy", "torch.fx.experimental.symbolic_shapes"]
before = loaded(names)
from torch._dynamo.backends.registry import lookup_backend  # a file of it, before the whole
compiled = torch.compile(lambda x: marked(x) * 2, backend="eager")(torch.ones(1)).item()
from torch._dynamo.trace_rules import is_callable_allowed
from torch.fx.experimental import symbolic_shapes
symbol = sympy.Symbol("a") + sympy.Symbol("a")
same = [
    dynamo is torch._dynamo,
    lookup_backend is dynamo.lookup_backend,
    is_callable_allowed(marked),
    isinstance(symbol, sympy.Basic),
    symbolic_shapes.sympy is sympy,
]
print(json.dumps([before, loaded(names), compiled, str(symbol), same]))
"""
    )
    assert before == []
    assert after == ["torch._dynamo", "sympy", "torch.fx.experimental.symbolic_shapes"]
    assert (compiled, algebra, same) == (8.0, "2*a", [True] * 5)


def test_transformers_knows_the_same_classes_as_ever():
    assert (
        said(
            """
from engine import lean_imports
lean_imports.allow()
lean_imports.prepare()
import transformers.models
from transformers.utils.import_utils import _LazyModule, define_import_structure
path = transformers.models.__file__
whole = _LazyModule("transformers.models", path, define_import_structure(path))
same = vars(transformers.models)
names = ["_class_to_module", "_modules", "_object_missing_backend", "_import_structure"]
equal = [vars(whole)[it] == same[it] for it in names]
print(json.dumps([len(whole._class_to_module) > 1000, *equal]))
"""
        )
        == [True] * 5
    )


def test_with_a_torch_that_it_was_not_tried_with_nothing_stands_aside():
    assert said(
        """
from engine import lean_imports
lean_imports.KNOWN_VERSIONS["torch"] = ("1.0",)
lean_imports.allow("accelerate")
lean_imports.prepare()
from transformers.utils import is_torch_distributed_available
import torch
from engine.later_module import Later
aside = [it for it in sys.modules.values() if it is None or isinstance(it, Later)]
print(json.dumps([len(aside), is_torch_distributed_available()]))
"""
    ) == [0, importlib.import_module("torch.distributed").is_available()]


@pytest.mark.filterwarnings("ignore:guard_size_oblivious:FutureWarning")
@pytest.mark.parametrize("name", SymbolicShapes.ANSWERS)
def test_of_plain_numbers_the_stand_in_says_what_torch_says(name):
    theirs = getattr(importlib.import_module("torch.fx.experimental.symbolic_shapes"), name)
    is_answered, ours = SymbolicShapes.ANSWERS[name]
    plain = [True, False, 0, 1, 7, (2, 3), (2, (3, 4)), ()]
    asked = [(one,) for one in plain] + [(one, other) for one in plain for other in plain]
    answered = [given for given in asked if is_answered(given)]
    assert len(answered) > 1
    for given in answered:
        answer = ours(*given)
        assert (answer, type(answer)) == (theirs(*given), type(theirs(*given))), given
