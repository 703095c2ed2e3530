"""Slurm from the outside: what is submitted, what becomes of it, what the cluster has."""
