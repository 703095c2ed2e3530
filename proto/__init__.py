"""The words both sides of a link share: errors, messages, frames, sessions. No torch."""
