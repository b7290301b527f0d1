"""The whole run executes Triton kernels by Triton's interpreter: `@triton.jit` reads the variable when it decorates.

What Triton 3.9's interpreter does differently: float32 becomes bfloat16 by cutting bits off, where devices round to
the nearest, and `tl.dot` of bfloat16 gives nonsense. float32 and float16 are exact, so compare in those.

On a machine with a GPU, `TRITON_INTERPRET=0 pytest -m gpu` runs the tests that are for devices.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
