"""Runs inside the workers of a vLLM server that ft starts: what its own reload of weights leaves out on a CPU."""

from __future__ import annotations

from typing import Any


class Repacks:
    """Methods that vLLM adds to its worker (``--worker-extension-cls``)."""

    model_runner: Any

    def ft_repack(self) -> int:
        """Pack the output head's weights anew; returns how many heads there were.

        On a CPU vLLM multiplies by a packed copy of a weight, and makes it when the weight is loaded. A head that is
        tied to the embeddings is not loaded itself, and would keep its copy of the old weights. On a GPU nothing is
        packed, and there is nothing to do.
        """
        heads = [m for m in self.model_runner.get_model().modules() if hasattr(m, "cpu_linear") and _is_head(m)]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
        return len(heads)


def _is_head(module: Any) -> bool:
    return hasattr(module, "tie_weights") and hasattr(module, "quant_method")
