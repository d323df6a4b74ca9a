"""vLLM's server, as `vllm serve` starts it, with a thought source that fails for some prompts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softcot_peft.sources import AssistantSource, Prompts, register_source

BAD = 7  # an id


@register_source("failing")
class FailingSource(AssistantSource):
    """An assistant that fails if the last token of any prompt is `BAD`."""

    def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
        if (prompts.input_ids[:, -1] == BAD).any():
            raise RuntimeError("The assistant is out of order.")
        return super().read(prompts, num_thoughts)


def main() -> Any:
    from vllm.entrypoints.launchers.api_server.entry import main

    return main()


if __name__ == "__main__":
    main()
