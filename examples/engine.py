"""vLLM in lm-evaluation-harness, with or without an adapter; `evaluate.py --engine vllm` uses it.

Prompts are tokenized, and answers decoded and cut at stop texts, as the harness does for models of transformers. In
float32 the scores are those of `generate`. In bfloat16 the engine rounds differently, so some answers differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, postprocess_generated_text
from transformers import PreTrainedTokenizerBase

ADAPTER = "adapter"  # its name in the engine


class Engine(LM):
    """A base in vLLM, optionally with an adapter, as a model of the harness.

    Args:
        base: Hub id or folder of the base.
        adapter: Hub id or folder of a SoftCoT adapter.
        tokenizer: Writes the prompts.
        dtype: Name of the dtype.
        rows: Number of questions that the engine answers at once.
    """

    def __init__(
        self, base: str, adapter: str | None, tokenizer: PreTrainedTokenizerBase, dtype: str, rows: int
    ) -> None:
        super().__init__()
        from softcot_peft.serving import SoftCoTLLM  # imports vLLM, which need not be installed

        adapters = {ADAPTER: adapter} if adapter else {}
        self.llm: Any = SoftCoTLLM(base, adapters=adapters, dtype=dtype, max_num_seqs=rows)
        self.tokenizer = tokenizer
        self.adapter: str | None = ADAPTER if adapter else None  # that answers; `None`: the base
        self.seed = 0
        self.chat_template_args: dict[str, Any] = {}

    @property
    def tokenizer_name(self) -> str:
        """Return a name of the tokenizer, for the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that renders the prompts, for the harness's log."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation."""
        rendered: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.chat_template_args,
        )
        return rendered

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer the requests, all at once."""
        prompts, params, stops = [], [], []
        for place, request in enumerate(requests):
            prompt, settings = request.args
            stops.append(handle_stop_sequences(list(settings.get("until") or []), eos=None))
            prompts.append({"prompt_token_ids": self.ids(prompt)})
            params.append(self.sampling(settings, stops[-1], place))
        outputs = self.llm.generate(prompts, params, adapter=self.adapter)
        texts = []
        for request, output, stop in zip(requests, outputs, stops, strict=True):
            ids = list(output.outputs[0].token_ids)
            text = postprocess_generated_text(self.tokenizer.decode(ids, skip_special_tokens=True), stop, None)
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def ids(self, prompt: str) -> list[int]:
        """Return a prompt's ids, by the harness's rule: one that begins with BOS has its special tokens already."""
        written = has_bos_prefix(prompt, self.tokenizer.bos_token)
        found: list[int] = self.tokenizer(prompt, add_special_tokens=not written)["input_ids"]
        return found

    def sampling(self, settings: dict[str, Any], stop: Sequence[str], place: int) -> Any:
        """Return vLLM's form of the harness's settings; each request of a seed has its own."""
        from vllm import SamplingParams

        chosen: dict[str, Any] = {"temperature": 0}
        if settings["do_sample"]:
            chosen = {"temperature": settings["temperature"], "top_p": settings["top_p"], "seed": self.seed + place}
        return SamplingParams(**chosen, stop=list(stop), max_tokens=settings["max_gen_toks"])

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Refuse: vLLM has no log-probabilities of prompts that are given as embeddings."""
        raise NotImplementedError("Tasks that score log-likelihoods cannot run in vLLM with thoughts.")

    def loglikelihood_rolling(self, requests: list[Instance]) -> NoReturn:
        """Refuse, as `loglikelihood` does."""
        self.loglikelihood(requests)
