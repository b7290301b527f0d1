"""The whole run executes Triton kernels by Triton's interpreter: `@triton.jit` reads the variable when it decorates."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
