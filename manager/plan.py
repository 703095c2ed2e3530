"""`manager plan`: how a model would be cut into sections, before any worker is started.

The same arithmetic as the workers' own (`engine.plan`), so both come to the same sections. Reads
the checkpoint's config and the headers of its files, no tensor.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from typing import Any, Final

import click

from engine import lean_imports
from manager.options import precision_options
from manager.tables import size, table
from proto.errors import UsageError

# A worker without a model, 300 MB: Python, torch for the CPU and transformers, as its RSS shows.
# The rest is what a step of 256 tokens takes for a while.
PROCESS_BYTES: Final = 350 * 10**6

# Without --context: what most conversations need, or all that the model can.
DEFAULT_CONTEXT: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSection:
    """What one worker will hold."""

    index: int
    start_layer: int
    end_layer: int
    weights_bytes: int
    work_share: float  # of a step's work over all sections
    kv_bytes: int  # for the context asked for
    memory_bytes: int  # weights, KV and the process itself
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A model over its sections."""

    model: str
    dtype: str
    quantize: str
    kv_quantize: str
    num_layers: int
    max_context: int
    context: int  # tokens that the KV figures are for, over all sequences at once
    embedding_bytes: int  # held by the manager
    weights_bytes: int  # of all sections
    sections: tuple[PlannedSection, ...]


@click.command()
@click.option("--model", metavar="DIR|HUB_ID", help="Checkpoint. Default: the demo model.")
@click.option("--sections", type=int, required=True, metavar="N", help="Over how many workers.")
@precision_options
@click.option(
    "--context",
    type=int,
    metavar="TOKENS",
    help=f"Reckon KV for so many tokens. Default: the model's context, at most {DEFAULT_CONTEXT}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def plan(
    model: str | None,
    sections: int,
    dtype: str,
    quantize: str,
    kv_quantize: str,
    context: int | None,
    as_json: bool,
) -> None:
    """Show how a model would be cut into sections, and how to start the workers."""
    if context is not None and context < 1:
        raise UsageError(f"--context {context}: reckon with at least 1 token.")
    lean_imports.allow()
    made = make_plan(
        model,
        sections,
        dtype=dtype,
        quantize=quantize,
        kv_quantize=kv_quantize,
        context=context,
    )
    click.echo(json.dumps(asdict(made), ensure_ascii=False) if as_json else describe(made))


def make_plan(
    model: str | None,
    num_sections: int,
    *,
    dtype: str = "auto",
    quantize: str = "none",
    kv_quantize: str = "none",
    context: int | None = None,
) -> ModelPlan:
    """Cut the model as `num_sections` workers will.

    Raises:
        ModelError: there is no checkpoint, or it cannot be run.
        SplitError: it has fewer layers.
    """
    import torch

    from engine import attention
    from engine.architecture import DTYPES, read_architecture
    from engine.checkpoint import Checkpoint
    from engine.kv import SiteShape
    from engine.plan import layer_sizes
    from engine.quantize import choose_packing, held_sizes
    from engine.sections import split_layers
    from engine.stage_loading import choose_dtype

    checkpoint = Checkpoint(model)
    architecture = read_architecture(checkpoint)
    chosen = choose_dtype(dtype, architecture)
    attention.register()
    built = architecture.build(chosen, attention.ATTENTION_NAME)
    sizes = layer_sizes(built, architecture)
    layer_bytes, after_bytes = list(sizes.layer_bytes), sizes.head_bytes
    packing = choose_packing(quantize, "auto", chosen, torch.device("cpu"))
    if packing is not None and packing.is_lossy:
        layer_bytes, after_bytes = held_sizes(built, architecture, packing, sizes)
    # Sections are cut by what is stored: workers need not agree on how they hold it.
    costs, head_cost = sizes.costs
    all_work = sum(sizes.layer_work) + sizes.head_bytes
    max_context = architecture.max_context
    tokens = min(context or DEFAULT_CONTEXT, max_context)
    kept = SiteShape(*kv_shape(architecture.config))
    kv_bytes = kept.bytes_per_token(chosen, kv_quantize) * tokens
    sections = []
    for index, section in enumerate(split_layers(costs, num_sections, head_cost)):
        is_last = section.end == architecture.num_layers
        weights = sum(layer_bytes[section.start : section.end]) + is_last * after_bytes
        work = sum(sizes.layer_work[section.start : section.end]) + is_last * sizes.head_bytes
        kv = kv_bytes * section.num_layers
        sections.append(
            PlannedSection(
                index=index,
                start_layer=section.start,
                end_layer=section.end,
                weights_bytes=weights,
                work_share=work / all_work,
                kv_bytes=kv,
                memory_bytes=weights + kv + PROCESS_BYTES,
                command=command(model, num_sections, index, dtype, quantize, kv_quantize),
            )
        )
    return ModelPlan(
        model=checkpoint.name,
        dtype=next(name for name, it in DTYPES.items() if it == chosen),
        quantize=quantize,
        kv_quantize=kv_quantize,
        num_layers=architecture.num_layers,
        max_context=max_context,
        context=tokens,
        embedding_bytes=sizes.embedding_bytes,
        weights_bytes=sum(layer_bytes) + after_bytes,
        sections=tuple(sections),
    )


def kv_shape(config: Any) -> tuple[int, int, int]:
    """Heads, and the sizes of their keys and values, that one layer keeps; by the usual fields.

    The workers learn it from the model itself; where a layer differs from its config this is
    an estimate.
    """
    heads = config.num_attention_heads
    key_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    value_size = key_size
    latent_rope = getattr(config, "qk_rope_head_dim", None)
    if latent_rope:  # multi-head latent attention keeps every head's keys and values
        key_size = config.qk_nope_head_dim + latent_rope
        value_size = config.v_head_dim
    elif not getattr(config, "multi_query", False):
        heads = getattr(config, "num_key_value_heads", None) or heads
    else:
        heads = 1
    return heads, key_size, value_size


def command(
    model: str | None,
    num_sections: int,
    index: int,
    dtype: str,
    quantize: str,
    kv_quantize: str,
) -> str:
    """How to start the worker of one section on its own machine."""
    words = ["worker", "--sections", str(num_sections), "--index", str(index)]
    if model is not None:
        words += ["--model", model]
    if dtype != "auto":
        words += ["--dtype", dtype]
    if quantize != "none":
        words += ["--quantize", quantize]
    if kv_quantize != "none":
        words += ["--kv-quantize", kv_quantize]
    return shlex.join(words)


def describe(plan: ModelPlan) -> str:
    """The plan for people."""
    rows = [
        (
            str(it.index),
            f"{it.start_layer}:{it.end_layer}",
            size(it.weights_bytes),
            f"{it.work_share:.0%}",
            size(it.kv_bytes),
            size(it.memory_bytes),
        )
        for it in plan.sections
    ]
    held_as = plan.dtype if plan.quantize == "none" else plan.quantize
    kv_as = "" if plan.kv_quantize == "none" else f" in {plan.kv_quantize}"
    titles = ("SECTION", "LAYERS", "WEIGHTS", "WORK", "KV", "MEMORY")
    return "\n".join(
        (
            f"{plan.model}: {plan.num_layers} layers, {size(plan.weights_bytes)} of weights "
            f"in {held_as}, context {plan.max_context}",
            "",
            table(titles, rows),
            "",
            f"KV is for {plan.context} tokens{kv_as}, all sequences together; memory is weights, "
            f"KV and about {size(PROCESS_BYTES)} of process.",
            f"The manager maps {size(plan.embedding_bytes)} of embeddings.",
            "",
            *(it.command for it in plan.sections),
            "",
            "Each on its own machine: add --listen ADDRESS:7710 --secret-file FILE.",
        )
    )
