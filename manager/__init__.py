"""The process that owns requests and jobs, and the one command line."""
