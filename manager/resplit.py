"""x"""

from __future__ import annotations


class Resplit:
    """y"""

    next_s = 0.0
    why_not = ""

    async def run(self, lease: bytes) -> None:
        """z"""
