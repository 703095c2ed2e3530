"""What runs inside a fine-tuning job, however it was launched: torch, no click, no sockets."""
