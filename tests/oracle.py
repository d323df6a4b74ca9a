"""SoftCoT written straight from the equations: one row at a time, everything recomputed at every token.

    t = Assistant([prompt; thought token x N]).hidden[-1][thought positions]
    s = W t + b
    next token = argmax Base([embed(before); s; embed(after)])

It uses models loaded anew from their folders and shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import key_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList


@dataclass
class Oracle:
    """A base, an assistant and a projection; `num` soft thoughts.

    Args:
        base_folder: Folder of the base and its tokenizer.
        assistant_folder: Folder of the assistant and its tokenizer.
        weight: W, `(H_base, H_assistant)`.
        bias: b, `(H_base,)`.
        num: N.
        same_ids: Whether the assistant reads the base's ids.
        filler: What stands at the assistant's thought positions; `None`: its unk token, else its eos token.
        vector: The embedding that stands there instead, `(H_embedding,)`.
        project: Another projection, `(N, H_assistant)` to `(N, H_base)`.
    """

    base_folder: Path
    assistant_folder: Path
    weight: Tensor
    bias: Tensor
    num: int
    same_ids: bool = False
    filler: int | None = None
    vector: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self.base = AutoModelForCausalLM.from_pretrained(self.base_folder).eval()
        self.assistant = AutoModelForCausalLM.from_pretrained(self.assistant_folder).eval()
        self.base_tokenizer = AutoTokenizer.from_pretrained(self.base_folder)
        self.assistant_tokenizer = AutoTokenizer.from_pretrained(self.assistant_folder)

    @classmethod
    def of(
        cls, model: torch.nn.Module, base_folder: Path, assistant_folder: Path, num: int, same_ids: bool = False
    ) -> Oracle:
        """The oracle of an attached adapter: its projection's values, everything else anew."""
        state = model.state_dict()
        weight = next(v for k, v in state.items() if k.endswith(key_of("weight")))
        bias = next(v for k, v in state.items() if k.endswith(key_of("bias")))
        return cls(base_folder, assistant_folder, weight.clone(), bias.clone(), num, same_ids)

    def assistant_ids(self, prompt: list[int]) -> list[int]:
        """The assistant's ids for a prompt of the base, without the thought positions."""
        if self.same_ids:
            return prompt
        text = self.base_tokenizer.decode(prompt, skip_special_tokens=True)
        return list(self.assistant_tokenizer(text)["input_ids"])

    def thoughts(self, prompt: list[int]) -> Tensor:
        """`s = W t + b`, `(N, H_base)`."""
        unk = self.assistant_tokenizer.unk_token_id
        filler = unk if unk is not None else self.assistant_tokenizer.eos_token_id
        filler = filler if self.filler is None else self.filler
        ids = torch.tensor([self.assistant_ids(prompt) + [filler] * self.num])
        embeddings = self.assistant.get_input_embeddings()(ids)
        if self.vector is not None:
            before = embeddings[:, : -self.num]
            embeddings = torch.cat([before, self.vector.expand(1, self.num, -1)], 1)
        hidden = self.assistant(inputs_embeds=embeddings, output_hidden_states=True).hidden_states[-1][0, -self.num :]
        return hidden @ self.weight.T + self.bias if self.project is None else self.project(hidden)

    def logits(self, before: list[int], after: list[int], prompt: list[int] | None = None) -> Tensor:
        """Logits of every placed position `(before + N + after, V)`; `prompt` is what the assistant reads."""
        return self.states(before, after, prompt).logits[0]

    def states(self, before: list[int], after: list[int], prompt: list[int] | None = None) -> Any:
        """Everything the base returns for one row."""
        embed = self.base.get_input_embeddings()
        pieces = [
            embed(torch.tensor(before, dtype=torch.long)),
            self.thoughts(before if prompt is None else prompt),
            embed(torch.tensor(after, dtype=torch.long)),
        ]
        eager = self.base.config._attn_implementation == "eager"
        return self.base(
            inputs_embeds=torch.cat(pieces)[None], use_cache=False, output_hidden_states=True, output_attentions=eager
        )

    @torch.no_grad()
    def generate(
        self,
        before: list[int],
        new: int,
        after: list[int] | None = None,
        processors: LogitsProcessorList | None = None,
    ) -> list[int]:
        """Greedy new tokens, stopping after EOS; processors see the caller's tokens, without thoughts."""
        after, tokens = list(after or []), list[int]()
        while len(tokens) < new:
            scores = self.logits(before, after + tokens)[-1:]
            seen = torch.tensor([before + after + tokens])
            token = int((scores if processors is None else processors(seen, scores)).argmax())
            tokens.append(token)
            if token == self.base.config.eos_token_id:
                break
        return tokens

    @torch.no_grad()
    def sample(self, before: list[int], **options: Any) -> list[list[int]]:
        """New tokens of transformers' own `generate` over `[embed(before); s]`, for beams and sampling."""
        embeddings = torch.cat([self.base.get_input_embeddings()(torch.tensor(before)), self.thoughts(before)])
        return self.base.generate(inputs_embeds=embeddings[None], **options).tolist()

    def loss(self, before: list[int], response: list[int], after: list[int] | None = None) -> Tensor:
        """Mean NLL of the response, given prompt and thoughts."""
        tail = list(after or []) + response
        logits = self.logits(before, tail)
        predicting = logits[-len(response) - 1 : -1]
        return torch.nn.functional.cross_entropy(predicting, torch.tensor(response))

    def mean_loss(self, rows: Iterable[tuple[list[int], ...]]) -> Tensor:
        """Mean NLL of all tokens of the responses; rows hold what `loss` takes."""
        rows = list(rows)
        losses = torch.stack([self.loss(*row) * len(row[1]) for row in rows])
        return losses.sum() / sum(len(row[1]) for row in rows)
