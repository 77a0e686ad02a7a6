"""The older attention layer: seeds watch chunks of what attention returns."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn

from kasmina_fx.compat.layer import KasminaLayer
from kasmina_fx.compat.weights import copy_weights
from kasmina_fx.errors import InvalidArgument

_PARTS: Final = ("q", "k", "v")


class KasminaAttentionLayer(KasminaLayer):
    """A MultiheadAttention with seeds.

    Arguments are those of ``nn.MultiheadAttention`` and of :class:`KasminaLayer`.

    Raises:
        InvalidArgument: ``embed_dim`` does not divide by ``num_heads`` (a ValueError).
    """

    kind = nn.MultiheadAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "attention_layer",
    ) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise InvalidArgument(
                f"embed_dim ({embed_dim}) must be divisible by num_heads ({num_heads})"
            )
        base = nn.MultiheadAttention(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
        )
        self._build(base, num_seeds, cache_size_mb, telemetry_enabled, layer_name, None)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        """The attention's output, with the seeds' contributions, and its weights or None.

        ``key`` is the query unless given, ``value`` the key. Others as of
        ``nn.MultiheadAttention``.
        """
        key = query if key is None else key
        return super().forward(
            query,
            key,
            key if value is None else value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    @property
    def q_proj(self) -> nn.Linear:
        """The projection of queries: a view, see :meth:`projection`."""
        return self.projection("q")

    @property
    def k_proj(self) -> nn.Linear:
        """The projection of keys: a view, see :meth:`projection`."""
        return self.projection("k")

    @property
    def v_proj(self) -> nn.Linear:
        """The projection of values: a view, see :meth:`projection`."""
        return self.projection("v")

    def projection(self, part: str) -> nn.Linear:
        """One of the projections, ``"q"``, ``"k"`` or ``"v"``, as a Linear made when asked for.

        Its weight and bias are views of the attention's own tensors, their gradients of those':
        what is written to them under ``no_grad`` is written there. Optimizers take the attention's
        parameters, not these.
        """
        base: Any = self.base
        place = _PARTS.index(part)
        rows = slice(place * base.embed_dim, (place + 1) * base.embed_dim)
        if base.in_proj_weight is None:
            weight = getattr(base, f"{part}_proj_weight")
            shown = _view(weight, slice(None))
        else:
            shown = _view(base.in_proj_weight, rows)
        view = nn.Linear(shown.shape[1], shown.shape[0], bias=False, device="meta")
        view.weight = shown
        if base.in_proj_bias is not None:
            view.bias = _view(base.in_proj_bias, rows)
        return view

    def copy_weights_from_attention(self, original_attention: nn.MultiheadAttention) -> None:
        """Copy all weights and biases.

        Raises:
            InvalidArgument: Not a MultiheadAttention of the same shapes; nothing has changed.
        """
        if not isinstance(original_attention, nn.MultiheadAttention):
            raise InvalidArgument(
                f"Source must be a MultiheadAttention, not a {type(original_attention).__name__}"
            )
        copy_weights(original_attention, self.base)


def _view(parameter: nn.Parameter, rows: slice) -> nn.Parameter:
    view = nn.Parameter(parameter.detach()[rows], requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        view.grad = parameter.grad[rows]
    return view
