"""Arithmetic that torch does slower than the memory allows, as small C kernels.

`native` chooses and names them, `packed` holds weights as they read them. Everything works without
the compiled part too, by torch alone. Knows no model, no checkpoint and no plan.
"""
