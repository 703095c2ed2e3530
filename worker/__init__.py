"""The process that holds one stage."""
