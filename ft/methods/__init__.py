"""Methods: each a frozen attrs class of three functions, named in a recipe."""

from ft.methods.sft import SFT

__all__ = ["SFT"]
