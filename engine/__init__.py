"""The model and the plan: sections, stages, KV blocks, sampling, scheduling. No sockets."""
