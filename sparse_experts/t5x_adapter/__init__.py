"""Our models under T5X: see docs/t5x.md.

The only part that imports t5x. `variables` and `metrics` say what T5X is given,
and need no t5x.
"""
