"""What the tasks of a job run, each on its node."""
