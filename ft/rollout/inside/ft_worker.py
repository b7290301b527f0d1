"""Runs inside the workers of a vLLM server that ft starts: what vLLM's own reload of weights leaves out on a CPU.

There vLLM multiplies by packed copies of weights, which it makes when it loads them. On a GPU nothing is packed.
"""

from __future__ import annotations

from typing import Any


class Repacks:
    """Methods that vLLM adds to its worker (``--worker-extension-cls``). Each returns how many modules it found."""

    model_runner: Any

    def ft_unpack(self) -> int:
        """Before new weights: routed experts are to be packed when they are loaded, as they were the first time.

        vLLM takes a module that has a kernel already for one whose weights are not packed.
        """
        methods = [m.quant_method for m in self._modules() if getattr(m, "quant_method", None) is not None]
        with_kernel = [method for method in methods if getattr(method, "moe_kernel", None) is not None]
        for method in with_kernel:
            method.moe_kernel = None
        return len(with_kernel)

    def ft_repack(self) -> int:
        """After new weights: a head that is tied to the embeddings was not loaded itself, and has its old copy yet."""
        heads = [m for m in self._modules() if hasattr(m, "tie_weights") and hasattr(m, "cpu_linear")]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
        return len(heads)

    def _modules(self) -> list[Any]:
        model = self.model_runner.get_model()
        return list(model.modules()) if next(model.parameters()).device.type == "cpu" else []
