"""For engines that run the base themselves: what the base reads, as embeddings."""

from .embedder import Embedder
from .prompt_embeds import prompt_embeds

__all__ = ["Embedder", "prompt_embeds"]
