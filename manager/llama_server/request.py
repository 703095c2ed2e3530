"""Our options of a request in llama.cpp's words.

Pure. Those that the OpenAI API knows as well are given to its client by name.
"""

from __future__ import annotations

from typing import Final

from manager.generation import GenerationOptions
from proto.errors import RequestRefused

# The order of transformers' `generate`, which is our pipeline's; the server's own is another one.
SAMPLERS: Final = ("penalties", "temperature", "top_k", "top_p", "min_p")
# What the server was started with must not change the text.
NEUTRAL: Final = {"mirostat": 0, "dynatemp_range": 0.0}
NUM_SEEDS: Final = 2**32 - 1  # one more stands for a random seed


def request_body(options: GenerationOptions, context: int) -> dict[str, object]:
    """What llama.cpp takes beside the words of the OpenAI API.

    Args:
        context: of the server, in tokens.
    Raises:
        RequestRefused: it has no counterpart of an option.
    """
    if options.stop_token_ids:
        raise RequestRefused("llama-server knows no stop_token_ids: give stop texts instead.")
    if options.logprobs:
        raise RequestRefused("log-probabilities of a llama-server are not read: leave them out.")
    body: dict[str, object] = {
        "top_k": options.top_k,
        "min_p": options.min_p,
        "repeat_penalty": options.repetition_penalty,
        "repeat_last_n": context if options.looks_back else 0,  # all of it, not the last few
        "samplers": SAMPLERS,
        "ignore_eos": options.ignore_eos,
        **NEUTRAL,
        "verbose": True,
        "return_tokens": True,
        "return_progress": True,
    }
    if options.seed is not None:
        body["seed"] = options.seed % NUM_SEEDS
    return body
