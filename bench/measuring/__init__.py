"""What the measurements share: models, contestants, rounds, verdicts."""
