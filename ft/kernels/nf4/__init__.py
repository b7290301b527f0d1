"""4-bit NormalFloat storage of frozen weights, equal bit for bit to bitsandbytes' codes and scales."""

from ft.kernels.nf4.bnb import from_bnb, to_bnb
from ft.kernels.nf4.format import BLOCKS, NF4Tensor, dynamic_map, nbytes, nf4_code
from ft.kernels.nf4.native import on_cpu
from ft.kernels.nf4.ops import dequantise, dequantise_rows, quantise
from ft.kernels.nf4.product import linear
from ft.kernels.nf4.reference import slice_rows

__all__ = [
    "BLOCKS",
    "NF4Tensor",
    "dequantise",
    "dequantise_rows",
    "dynamic_map",
    "from_bnb",
    "linear",
    "nbytes",
    "nf4_code",
    "on_cpu",
    "quantise",
    "slice_rows",
    "to_bnb",
]
