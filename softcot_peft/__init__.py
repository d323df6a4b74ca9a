"""SoftCoT (arXiv 2502.12134) as a PEFT method. Importing this package registers the method with PEFT."""

from ._register import add_peft_type, register

add_peft_type()  # the config's `peft_type` is this member

from ._version import __version__  # noqa: E402
from .assistant import use_assistant  # noqa: E402
from .cached import compute_thoughts, use_thoughts  # noqa: E402
from .chat_template import with_thought_tokens  # noqa: E402
from .config import SoftCoTConfig  # noqa: E402
from .conversations import split_conversations  # noqa: E402
from .model import SoftCoTModel  # noqa: E402
from .reader import use_tokenizer  # noqa: E402

register(SoftCoTConfig, SoftCoTModel)

__all__ = [
    "SoftCoTConfig",
    "SoftCoTModel",
    "__version__",
    "compute_thoughts",
    "split_conversations",
    "use_assistant",
    "use_thoughts",
    "use_tokenizer",
    "with_thought_tokens",
]
