"""Decoder layers run with few calls, where their modules have a form that is known here."""
