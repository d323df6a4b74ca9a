"""`SoftCoTLLM`: vLLM in a program, with SoftCoT adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams

from .check_fit import SAMPLING, check_outputs, prompts
from .inputs import with_thoughts, without_thoughts
from .load import load_adapters
from .private import tokenize

_ROWS = 32  # prompts that an assistant reads at once


class SoftCoTLLM(LLM):
    """vLLM's `LLM`, whose `generate` and `chat` take the name of an adapter.

    Without a name, they are vLLM's own, and the base answers.

    Example:
        ```python
        from softcot_peft.serving import SoftCoTLLM

        llm = SoftCoTLLM("path/to/base", adapters={"gsm8k": "path/to/adapter"}, dtype="float32")
        for output in llm.generate(["What is nine less four?"], adapter="gsm8k"):
            print(output.outputs[0].text)
        ```

    Args:
        model: Hub id or folder of the base.
        adapters: Hub ids or folders of adapters, by name.
        adapter_device: Where assistants and projections run.
        **options: Passed to `vllm.LLM`.

    Raises:
        ValueError: An adapter does not fit the base.
    """

    def __init__(
        self, model: str, *, adapters: Mapping[str, str], adapter_device: str = "cpu", **options: Any
    ) -> None:
        super().__init__(model, **{**options, "enable_prompt_embeds": True})
        self._adapters = load_adapters(adapters, self.model_config, adapter_device)
        dtype = self.model_config.dtype
        for adapter in list(self._adapters.values())[:1]:
            outputs = super().generate(prompts(adapter.embeddings, dtype), SamplingParams(**SAMPLING), use_tqdm=False)
            check_outputs(outputs, dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_config.model!r}, adapters={sorted(self._adapters)})"

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Generate as `vllm.LLM.generate` does, with the thoughts of an adapter.

        Args:
            prompts: A prompt or several: texts, lists of ids, or dicts with `prompt` or `prompt_token_ids`.
            sampling_params: As in vLLM.
            adapter: Name of the adapter. `None`: the base answers.
            tokenization_kwargs: As in vLLM.
            **options: Other arguments of `vllm.LLM.generate`.

        Returns:
            An output for each prompt. Its `prompt_token_ids` are the prompt's, without thoughts.

        Raises:
            ValueError: There is no such adapter, or a prompt cannot be combined with thoughts.
        """
        if adapter is None:
            return super().generate(prompts, sampling_params, tokenization_kwargs=tokenization_kwargs, **options)
        several = isinstance(prompts, (list, tuple)) and not (prompts and isinstance(prompts[0], int))
        inputs = tokenize(self, prompts if several else [prompts], False, tokenization_kwargs=tokenization_kwargs)
        return self._run(adapter, inputs, sampling_params, options)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        adapter: str | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer conversations as `vllm.LLM.chat` does, with the thoughts of an adapter.

        Args:
            messages: A conversation or several, as in vLLM.
            sampling_params: As in vLLM.
            use_tqdm: Whether to show progress.
            adapter: Name of the adapter. `None`: the base answers.
            **options: As in vLLM: `chat_template`, `chat_template_content_format`, `chat_template_kwargs`,
                `add_generation_prompt`, `continue_final_message`, `tools` and `tokenization_kwargs`.

        Returns:
            An output for each conversation.

        Raises:
            ValueError: There is no such adapter, or a prompt cannot be combined with thoughts.
        """
        if adapter is None:
            return super().chat(messages, sampling_params, use_tqdm, **options)
        conversations = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
        if options.get("chat_template") is None and adapter in self._adapters:
            options["chat_template"] = self._adapters[adapter].chat_template
        inputs = tokenize(self, conversations, True, **options)
        return self._run(adapter, inputs, sampling_params, {"use_tqdm": use_tqdm})

    def _run(
        self, adapter: str, inputs: list[dict[str, Any]], sampling_params: Any, options: dict[str, Any]
    ) -> list[RequestOutput]:
        if adapter not in self._adapters:
            raise ValueError(
                f"`adapter` must be one of those that the engine was started with, {sorted(self._adapters)}, got "
                f"{adapter!r}."
            )
        rows: list[Any] = [given.get("prompt_token_ids") for given in inputs]
        if any(row is None or given["type"] != "token" for row, given in zip(rows, inputs, strict=True)):
            raise ValueError("`prompts` must be texts or ids to be combined with thoughts, got something else.")
        embed = self._adapters[adapter].embed
        embeds = [each for start in range(0, len(rows), _ROWS) for each in embed(rows[start : start + _ROWS])]
        prompts = [
            {**with_thoughts(row, each, adapter, given.get("cache_salt")), "prompt": given.get("prompt")}
            for row, each, given in zip(rows, embeds, inputs, strict=True)
        ]
        outputs = super().generate(prompts, sampling_params, **options)
        for output, row, given in zip(outputs, rows, inputs, strict=True):
            without_thoughts(output, row).prompt = given.get("prompt")
        return outputs
