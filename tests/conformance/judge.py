"""What a base with soft thoughts must do, from the equations and the plain base alone.

    t = Assistant([prompt; thought token x N]).hidden[-1][thought positions]
    s = W t + b
    next token = argmax Base([embed(before); s; embed(after)])

The base here is a copy without an adapter. It takes the rows as `inputs_embeds`, or, where it looks at ids beside the
embeddings, as ids with the filler at the thought positions, the embedding's output being replaced there.

It stands beside tests/oracle.py because families ask for more than a pair of folders: models without a folder, a base
that does not take embeddings alone, a projection that is still being trained, and the base's own loss and `generate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

PAD, FILLER, IGNORED = 0, 1, -100


@dataclass
class Judge:
    """A plain base, an assistant and a projection.

    Args:
        base: A copy of the base that never had an adapter, frozen as it is under one.
        assistant: The assistant, whose vocabulary is the base's.
        thought_id: What stands at the assistant's thought positions.
        num: N.
        weight: W, `(H_base, H_assistant)`; the trained parameter itself, so that it follows the training.
        bias: b, `(H_base,)`.
    """

    base: PreTrainedModel
    assistant: PreTrainedModel
    thought_id: int
    num: int
    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        self.takes = set(inspect.signature(type(self.base).forward).parameters)
        self.uncached = {"use_cache": False} if "use_cache" in self.takes else {}
        self.takes_embeds = self._takes_embeds()

    @torch.no_grad()
    def _takes_embeds(self) -> bool:
        """Whether embeddings alone tell the base what ids do."""
        ids = torch.tensor([[5, 9, 30, 12, 41, 8]])
        try:
            embeds = self.base.get_input_embeddings()(ids)
            self.run(inputs_embeds=embeds + 1)  # refused where ids are found again by their embeddings
            return torch.allclose(self.run(input_ids=ids).logits, self.run(inputs_embeds=embeds).logits, atol=1e-5)
        except (AttributeError, RuntimeError, ValueError):  # CPM-Ant and DeepSeek V4, Gemma 4, BLT (transformers 5.23)
            return False

    def run(self, **arguments: Any) -> Any:
        """The base's output, nothing cached."""
        return self.base(**arguments, **self.uncached)

    def thoughts(self, prompt: list[int]) -> Tensor:
        """`s = W t + b`, `(N, H_base)`."""
        ids = torch.tensor([prompt + [self.thought_id] * self.num])
        with torch.no_grad():
            states = self.assistant(ids, output_hidden_states=True).hidden_states[-1]
            if states.dim() == 4:  # Gemma3n's layers pass on a stack, which is merged for the head
                states = self.assistant.base_model(ids).last_hidden_state
        hidden = states[0, -self.num :]
        return hidden @ self.weight.T + self.bias

    @contextmanager
    def written(self, thoughts: list[Tensor], starts: list[int]) -> Iterator[None]:
        """Each row's thoughts over the embedding's output, where a pass has all the columns."""

        def write(module: Any, args: Any, output: Tensor) -> Tensor:
            if output.dim() != 3 or len(output) != len(starts) or output.shape[1] < max(starts) + self.num:
                return output
            rows = zip(output, thoughts, starts, strict=True)
            return torch.stack([torch.cat([row[:at], s, row[at + self.num :]]) for row, s, at in rows])

        handle = self.base.get_input_embeddings().register_forward_hook(write)
        try:
            yield
        finally:
            handle.remove()

    def logits(self, prompt: list[int], after: list[int]) -> Tensor:
        """Logits `(T, V)` of every position of the row `[prompt; s; after]`, alone and not padded."""
        s = self.thoughts(prompt)
        if self.takes_embeds:
            embed = self.base.get_input_embeddings()
            pieces = [embed(torch.tensor([prompt])), s[None], embed(torch.tensor([after], dtype=torch.long))]
            return self.run(inputs_embeds=torch.cat(pieces, dim=1)).logits[0]
        with self.written([s], [len(prompt)]):
            return self.run(input_ids=torch.tensor([prompt + [FILLER] * self.num + after])).logits[0]

    def nll(self, prompt: list[int], response: list[int], shifted: bool = True) -> Tensor:
        """Summed NLL of a response, given prompt and thoughts.

        Args:
            prompt: Ids.
            response: Ids.
            shifted: Whether each position's logits are compared with the next token, not with its own.
        """
        logits = self.logits(prompt, response)
        last = len(logits) - shifted
        predicting, tokens = logits[last - len(response) : last], torch.tensor(response)
        return torch.nn.functional.cross_entropy(predicting, tokens, reduction="sum")

    def own_loss(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """The base's own loss for the placed rows, padded on the right."""
        thoughts, starts = [self.thoughts(prompt) for prompt in prompts], [len(prompt) for prompt in prompts]
        rows = [p + [FILLER] * self.num + r for p, r in zip(prompts, responses, strict=True)]
        ids, mask = padded(rows, "right")
        labels = ids.masked_fill(mask == 0, IGNORED)
        for row, start in zip(labels, starts, strict=True):
            row[: start + self.num] = IGNORED
        with self.written(thoughts, starts):
            given = {"attention_mask": mask} if "attention_mask" in self.takes and len(rows) > 1 else {}
            return self.run(input_ids=ids, labels=labels, **given).loss

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Greedy new tokens, every token computed from scratch, each row alone."""
        rows = []
        for prompt in prompts:
            tokens = list[int]()
            for _ in range(new):
                tokens.append(int(self.logits(prompt, tokens)[-1].argmax()))
            rows.append(tokens)
        return rows

    @torch.no_grad()
    def own_generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Greedy new tokens of the base's own `generate` on the placed rows, padded on the left."""
        ids, mask = padded([prompt + [FILLER] * self.num for prompt in prompts], "left")
        thoughts = [self.thoughts(prompt) for prompt in prompts]
        with self.written(thoughts, [ids.shape[1] - self.num] * len(prompts)):
            out = self.base.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        return out[:, ids.shape[1] :].tolist()


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask `(B, L)` of rows, padded on one side."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        before, after = (gap, 0) if side == "left" else (0, gap)
        ids.append([PAD] * before + row + [PAD] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
    return torch.tensor(ids), torch.tensor(mask)
