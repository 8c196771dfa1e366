"""What numbers may be, for annotations.

What a gin file or an override binds is held to them, see `config/types.py`.
"""

from __future__ import annotations

import math
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

# A dimension of an array, a number of steps: XLA counts elements by int32.
Count = Annotated[int, Ge(1), Le(2**31 - 1)]
# JAX takes seeds modulo 2^32, so that larger ones would be others in silence.
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Depth = Annotated[int, Ge(1), Le(1000)]  # Layers are traced one by one.
Positive = Annotated[float, Gt(0), Lt(math.inf)]
NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
Finite = Annotated[float, Gt(-math.inf), Lt(math.inf)]
Rate = Annotated[float, Ge(0), Lt(1)]  # Of what is dropped.
