"""SoftCoT (arXiv 2502.12134) as a PEFT method. Importing the package registers the method with PEFT."""

from typing import TYPE_CHECKING, Any

from .registration import add_peft_type, register

if TYPE_CHECKING:
    from .precompute import compute_thoughts, use_thoughts
    from .serving import prompt_embeds

add_peft_type()  # before the config is imported, whose `peft_type` is this member

from ._version import __version__  # noqa: E402
from .chat_template import with_thought_tokens  # noqa: E402
from .checkpoint.upload import prepare_for_hub  # noqa: E402
from .config import SoftCoTConfig  # noqa: E402
from .conversations import split_conversations  # noqa: E402
from .sources.find_assistant import use_assistant  # noqa: E402
from .sources.tokenizers import use_tokenizer  # noqa: E402
from .tuner import SoftCoTModel  # noqa: E402

register(SoftCoTConfig, SoftCoTModel)

__all__ = [
    "SoftCoTConfig",
    "SoftCoTModel",
    "__version__",
    "compute_thoughts",
    "prepare_for_hub",
    "prompt_embeds",
    "split_conversations",
    "use_assistant",
    "use_thoughts",
    "use_tokenizer",
    "with_thought_tokens",
]


def __getattr__(name: str) -> Any:
    """Import precomputation and serving when they are first asked for: few programs use them, and all passes come."""
    if name in ("compute_thoughts", "use_thoughts"):
        from . import precompute

        return getattr(precompute, name)
    if name == "prompt_embeds":
        from . import serving

        return serving.prompt_embeds
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
