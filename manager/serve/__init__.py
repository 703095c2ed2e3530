"""`manager serve`: the pipeline behind an OpenAI-compatible API, and a page to watch it."""
