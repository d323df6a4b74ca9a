"""For engines that run the base themselves: what the base reads, as embeddings; and adapters in vLLM."""

from typing import TYPE_CHECKING, Any

from .embedder import Embedder
from .prompt_embeds import prompt_embeds

if TYPE_CHECKING:
    from .vllm.offline import SoftCoTLLM

__all__ = ["Embedder", "SoftCoTLLM", "prompt_embeds"]


def __getattr__(name: str) -> Any:
    """Import vLLM when it is first asked for: it is an extra."""
    if name == "SoftCoTLLM":
        from .vllm.offline import SoftCoTLLM

        return SoftCoTLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
