"""Two-pass training: prompts run without gradient into a KV cache, then thoughts and responses with gradient.

The base is frozen, so nothing before the thoughts has a gradient, and neither activations nor logits are needed there.
"""

from __future__ import annotations

from typing import Any

import torch

from ..rows.arguments import repeat_for_chains
from ..rows.divide import divide
from ..sources import ThoughtSource
from .head_loss import HeadLoss
from .host import Host
from .interface import run_prompts
from .response import ResponsePass
from .shared_prompt import shares_prompts
from .two_pass_trial import TwoPassTrial
from .whole import WholeRows


class TwoPassTraining(WholeRows):
    """Runs a training step in two passes if the base allows it, else on whole rows.

    Args:
        host: The host of the base.
        source: The active adapter's thought source.
        trial: Determines whether the base allows it.
    """

    def __init__(self, host: Host, source: ThoughtSource, trial: TwoPassTrial) -> None:
        super().__init__(host, source)
        self.trial = trial
        self.response: ResponsePass | None = None  # the second pass; `None`: whole rows

    @property
    def head_loss(self) -> HeadLoss | None:
        """The loss computed in place of the base's head; `None`: the base computes it."""
        return None if self.response is None else self.response.head_loss

    def begin(self, inputs: dict[str, Any]) -> None:
        """Run the first pass, and replace the arguments with those of the second pass."""
        (placement, own), host, source = self.locate(inputs), self.host, self.source
        states = None
        if not (shares_prompts(host, source, placement, own) and self.trial.lets_share(inputs, placement, source)):
            states = host.read(inputs.get("input_ids"), placement, source, own, chains=self.chains)
            if not self.trial.allows(inputs, placement, states[:, :1], source):
                self.insert_chains(inputs, placement, states)
                return
        rows = divide(inputs, placement, host.filler(source), host.takes_positions, source.shares_cache)
        if states is None:
            ids = rows.prompt["input_ids"]
            mask = rows.prompt.get("attention_mask", torch.ones_like(ids))
            states, cache = host.read_into(source, ids, mask, placement.num_thoughts)
        else:
            cache = run_prompts(host, source, rows.prompt)
        if (chains := states.shape[1]) > 1:  # the prompts run once for all chains
            cache.batch_repeat_interleave(chains)
            rows = rows.repeated(chains)
            repeat_for_chains(inputs, placement, chains)
        self.response = ResponsePass(host, self.source, rows, states)
        self.response.begin_after(inputs, cache, self.trial.replaces_head())
        self.writing = self.response.writing

    def finish(self, output: Any) -> Any:
        """Align the outputs with the caller's tokens."""
        if self.response is None:
            return super().finish(output)
        return self.add_auxiliary_loss(self.keep_first_chain(self.response.finish(output)))
