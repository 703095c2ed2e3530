"""The command lines of fine-tuning. What runs inside a job stands in `engine.jobs`."""
