"""The projections that come with the package: one linear layer, two, or one for each thought position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import SoftCoTConfig
from .projections import check_whole, register_projection


class _LinearMap:
    """What linear maps share: weights `(..., H_base, H_source)` and biases `(..., H_base)`."""

    weight: Tensor
    bias: Tensor

    @torch.no_grad()
    def initialise(self, kind: str) -> None:
        """Set the maps to zero (`"zero"`) or to the identity (`"identity"`).

        Raises:
            ValueError: The identity would map to another width.
        """
        self.bias.zero_()
        self.weight.zero_()
        if kind == "identity":
            if self.weight.shape[-1] != self.weight.shape[-2]:
                raise ValueError(
                    "`projection_init='identity'` needs a source as wide as the base's embeddings, got "
                    f"{self.weight.shape[-1]} and {self.weight.shape[-2]}. Use 'default', 'zero' or 'matched'."
                )
            self.weight.diagonal(dim1=-2, dim2=-1).fill_(1)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply what it projects to by a factor."""
        self.weight.mul_(factor)
        self.bias.mul_(factor)


@register_projection("linear")
class LinearProjection(_LinearMap, nn.Linear):  # type: ignore[misc]  # whose bias may be None
    """`s = W t + b` (section 3 of arXiv 2502.12134).

    Args:
        source_size: Width of t.
        base_size: Width of s.
        config: The adapter's config. `init_weights=True`: the default initialisation of `nn.Linear`. `False`: standard
            normal values, large enough for tests to see an effect.
    """

    def __init__(self, source_size: int, base_size: int, config: SoftCoTConfig) -> None:
        super().__init__(source_size, base_size)
        if not config.init_weights:
            nn.init.normal_(self.weight)
            nn.init.normal_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Project `(..., H_source)` to `(..., H_base)`, in the projection's dtype and on its device.

        Raises:
            RuntimeError: The weights are sharded or offloaded and not gathered, or were never loaded.
        """
        check_whole(self.weight)
        return super().forward(states.to(self.weight))


@register_projection("mlp")
class MLPProjection(nn.Module):
    """`s = W' gelu(W t + b) + b'`, both layers as wide as the base's embeddings.

    Args:
        source_size: Width of t.
        base_size: Width of s.
        config: The adapter's config, as for [`LinearProjection`].
    """

    def __init__(self, source_size: int, base_size: int, config: SoftCoTConfig) -> None:
        super().__init__()
        self.inner = LinearProjection(source_size, base_size, config)
        self.outer = LinearProjection(base_size, base_size, config)

    def initialise(self, kind: str) -> None:
        """Set the second layer to zero (`"zero"`); an MLP is never the identity.

        Raises:
            ValueError: `kind` is `"identity"`.
        """
        if kind == "identity":
            raise ValueError("`projection_init='identity'` needs `projection='linear'` or 'per_position', got 'mlp'.")
        self.outer.initialise(kind)

    def rescale(self, factor: float) -> None:
        """Multiply what it projects to by a factor."""
        self.outer.rescale(factor)

    def forward(self, states: Tensor) -> Tensor:
        """Project `(..., H_source)` to `(..., H_base)`."""
        hidden: Tensor = self.outer(nn.functional.gelu(self.inner(states)))
        return hidden


@register_projection("per_position")
class PerPositionProjection(_LinearMap, nn.Module):
    """`s_n = W_n t_n + b_n`: a linear map for each thought position (Self-SoftCoT, ACL 2026).

    Args:
        source_size: Width of t.
        base_size: Width of s.
        config: The adapter's config; it has `num_thought_tokens` maps.
    """

    def __init__(self, source_size: int, base_size: int, config: SoftCoTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_thought_tokens, base_size, source_size))
        self.bias = nn.Parameter(torch.empty(config.num_thought_tokens, base_size))
        for parameter in (self.weight, self.bias):
            if config.init_weights:
                nn.init.uniform_(parameter, -(source_size**-0.5), source_size**-0.5)  # as `nn.Linear`
            else:
                nn.init.normal_(parameter)
        self.sizes = config.num_thought_tokens, source_size, base_size  # weights may be sharded

    def extra_repr(self) -> str:
        """Return the number of maps and their sizes."""
        return "num_maps={}, in_features={}, out_features={}".format(*self.sizes)

    def forward(self, states: Tensor) -> Tensor:
        """Project `(..., N, H_source)` to `(..., N, H_base)`; N may be smaller than the number of maps.

        Raises:
            RuntimeError: As for [`LinearProjection`].
            ValueError: There are more thoughts than maps.
        """
        check_whole(self.weight)
        num = states.shape[-2]
        if num > len(self.weight):
            raise ValueError(
                f"`projection='per_position'` has a map for each of {len(self.weight)} thoughts "
                f"(`num_thought_tokens`), got {num}. Use fewer thoughts, or another projection."
            )
        weight, bias = self.weight[:num], self.bias[:num]
        return torch.einsum("...nh,noh->...no", states.to(weight), weight) + bias
