"""llama.cpp's llama-server and its RPC workers: configured, started, watched, asked, ended."""
