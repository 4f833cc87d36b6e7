"""Convert a language model of transformers to one latent for all heads, and say what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sage_diffusion.integrations.transformers.rope import model_rope, text_config
from sage_diffusion.kv.calibration import fingerprint
from sage_diffusion.kv.evaluate import Agreement, agreement
from sage_diffusion.kv.transmla import (
    Conversion,
    ConversionError,
    LayerGram,
    LayerMaps,
    Sizes,
    maps,
)
from sage_diffusion.kv.turning import angles_of

#: KL beyond which a converted model is not to be used without fine-tuning.
MOST_KL = 0.02

#: Of RoPE's gain from 1: what loses RoPE has no gain.
_OFF = 1e-3

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, eq=False)
class Moments:
    """What conversions of a model are computed from.

    Attributes:
        layers: in order.
        angles: ``[D / 2]``, radians a token of each frequency.
        length: tokens of the longest text.
        tokens: of all texts.
    """

    layers: list[LayerGram]
    angles: Tensor
    length: int
    tokens: int


def measure(
    model: nn.Module, texts: Sequence[Tensor], report: Callable[[str], None] = lambda line: None
) -> Moments:
    """Look at K, V and Q of calibration texts, ids ``[n]`` int64 of each.

    Args:
        report: is told of each text.

    Raises:
        ConversionError: the model's attention is of another kind, or there is no text.
    """
    layers = attentions(model)
    angles = _angles(model, layers[0])
    if not texts:
        raise ConversionError("there must be a text to calibrate on, there is none")
    grams = _grams(model, layers, _heads(model), texts, report)
    lengths = [text.numel() for text in texts]
    return Moments(grams, angles, max(lengths), sum(lengths))


def convert(
    model: nn.Module, moments: Moments, sizes: Sizes, *, balance: bool = True,
    by_weight: bool = True,
) -> Conversion:  # fmt: skip
    """The maps that convert a model, which is not changed.

    Args:
        moments: of this model, as :func:`measure` finds them.
        sizes, balance, by_weight: as :func:`sage_diffusion.kv.transmla.maps` takes them.

    Raises:
        ConversionError: the sizes don't fit.
    """
    given: dict[str, Any] = {"balance": balance, "by_weight": by_weight}
    found = [maps(x, sizes, moments.angles, moments.length, **given) for x in moments.layers]
    about = {"model": type(model).__name__, "tokens": moments.tokens, **given}
    return Conversion.of(fingerprint(model), sizes, found, about)


def attentions(model: nn.Module) -> list[Any]:
    """The attention of every layer, all of a kind that can be converted.

    Raises:
        ConversionError: one is not four projections, RoPE of all channels and a softmax.
    """
    config = text_config(model)
    found = [x for name, x in model.named_modules() if name.split(".")[-1] == "self_attn"]
    if len(found) != config.num_hidden_layers:
        raise ConversionError(
            f"each of the {config.num_hidden_layers} layers must have a self_attn, "
            f"{type(model).__name__} has {len(found)}"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise ConversionError("attention must be a plain softmax, this one caps its logits")
    for number, layer in enumerate(found):
        if isinstance(layer, LatentAttention):
            raise ConversionError("the model must not be converted already, it is")
        names = {name.split(".")[0] for name, _ in layer.named_parameters()}
        if names != set(_PROJECTIONS):
            raise ConversionError(
                f"layer {number} must have the parameters {', '.join(_PROJECTIONS)} alone, it has "
                f"{', '.join(sorted(names))}"
            )
    return found


def _heads(model: nn.Module) -> int:
    config = text_config(model)
    return int(config.num_key_value_heads)


def _angles(model: nn.Module, layer: Any) -> Tensor:
    """Radians a token of each frequency ``[D / 2]``, of a RoPE that turns halves of a head."""
    rope = model_rope(model)
    if rope is None:
        raise ConversionError(f"RoPE of {type(model).__name__} must be known, it is not")
    found = angles_of(rope, layer.head_dim, torch.device("cpu"))
    if found is None or abs(found[1] - 1) > _OFF:
        raise ConversionError(
            "RoPE must turn channel i with i + D / 2, all of a head's; it does not"
        )
    return found[0]


@torch.no_grad()
def _grams(
    model: nn.Module, layers: list[Any], heads: int, texts: Sequence[Tensor],
    report: Callable[[str], None],
) -> list[LayerGram]:  # fmt: skip
    """Second moments of what the projections give on the texts, of every layer."""
    dim = layers[0].head_dim
    width = heads * dim
    sums = [
        LayerGram(torch.zeros(2 * width, 2 * width).double(), torch.zeros(heads, dim).double())
        for _ in layers
    ]
    held: dict[int, Tensor] = {}

    def listen(layer: Any, gram: LayerGram) -> list[Any]:
        def k(module: nn.Module, given: Any, out: Tensor) -> None:
            held[0] = out

        def v(module: nn.Module, given: Any, out: Tensor) -> None:
            both = torch.cat([held.pop(0), out], -1).flatten(0, -2).double().cpu()
            gram.kv.add_(both.T @ both)

        def q(module: nn.Module, given: Any, out: Tensor) -> None:
            seen = out.flatten(0, -2).double().cpu().square().sum(0)
            gram.q.add_(seen.view(heads, -1, dim).sum(1))

        return [
            getattr(layer, name).register_forward_hook(hook)
            for name, hook in (("k_proj", k), ("v_proj", v), ("q_proj", q))
        ]

    hooks = [hook for layer, gram in zip(layers, sums, strict=True) for hook in listen(layer, gram)]
    try:
        for number, text in enumerate(texts):
            device = next(model.parameters()).device
            model(text[None].to(device), use_cache=False, logits_to_keep=1)
            report(f"text {number + 1} of {len(texts)}: {text.numel()} tokens")
    finally:
        for hook in hooks:
            hook.remove()
    return sums


class LatentAttention(nn.Module):
    """Attention of all query heads on one latent and one set of channels with RoPE.

    The cache keeps ``[B, 1, T, rope]`` as K and ``[B, 1, T, rank]`` as V.
    """

    frequencies: Tensor

    def __init__(self, layer: Any, found: LayerMaps, heads: int):
        super().__init__()
        weight, device = layer.k_proj.weight, layer.k_proj.weight.device
        self.q_proj, self.o_proj = layer.q_proj, layer.o_proj
        self.layer_idx, self.head_dim, self.scaling = layer.layer_idx, layer.head_dim, layer.scaling
        self.heads, self.rank = heads, found.v_up.shape[-1]
        self.rope = 2 * found.frequencies.numel()
        down = found.down.to(device)
        kv = torch.cat([layer.k_proj.weight, layer.v_proj.weight]).detach().float()
        bias = layer.k_proj.bias
        self.kv_proj = nn.Linear(weight.shape[1], self.rank + self.rope, bias is not None)
        self.kv_proj.weight = nn.Parameter((down @ kv).to(weight.dtype), weight.requires_grad)
        if bias is not None:
            both = torch.cat([bias, layer.v_proj.bias]).detach().float()
            self.kv_proj.bias = nn.Parameter((down @ both).to(weight.dtype), weight.requires_grad)
        for name in ("q_up", "v_up"):
            made = getattr(found, name).to(device, weight.dtype, copy=True)  # it may be trained
            setattr(self, name, nn.Parameter(made, weight.requires_grad))
        self.register_buffer("frequencies", found.frequencies.to(device), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the model's own attention, of ``hidden_states [B, T, hidden]``."""
        batch, tokens = hidden_states.shape[:2]
        cos, sin = (x.index_select(-1, self.frequencies)[:, None] for x in position_embeddings)
        q = self.q_proj(hidden_states).view(batch, tokens, self.heads, -1, self.head_dim)
        q = torch.einsum("bthgd,hcd->bhgtc", q, self.q_up).flatten(1, 2)
        latent, k = self.kv_proj(hidden_states)[:, None].split([self.rank, self.rope], -1)
        k = _rotate(k, cos, sin)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None:
            k, latent = cache.update(k, latent, self.layer_idx)
        content, position = q.split([self.rank, self.rope], -1)
        q = torch.cat([content, _rotate(position, cos, sin)], -1)
        out = scaled_dot_product_attention(
            q,
            torch.cat([latent, k], -1).expand(-1, q.shape[1], -1, -1),
            latent.expand(-1, q.shape[1], -1, -1),
            attention_mask,
            is_causal=attention_mask is None and tokens > 1,
            scale=self.scaling,
        )
        out = out.unflatten(1, (self.heads, -1))  # [B, H, G, T, rank]
        out = torch.einsum("bhgtr,hdr->bthgd", out, self.v_up).flatten(2)
        return self.o_proj(out), None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, h, T, rope]``, whose halves are pairs."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Converted:
    """A model whose attention is replaced; ``with`` undoes it at the end."""

    def __init__(self, model: nn.Module, conversion: Conversion):
        own = fingerprint(model)
        if own != conversion.fingerprint:
            raise ConversionError(
                f"the conversion must be of this model ({own}), it is of {conversion.fingerprint}"
            )
        layers = attentions(model)
        if len(layers) != conversion.layers:
            raise ConversionError(
                f"the conversion must have {len(layers)} layers, it has {conversion.layers}"
            )
        heads = _heads(model)
        made = [LatentAttention(x, conversion.maps(i), heads) for i, x in enumerate(layers)]
        parents = {getattr(x, "self_attn", None): x for x in model.modules()}
        self._undo: list[tuple[nn.Module, nn.Module]] = []
        for layer, latent in zip(layers, made, strict=True):  # all are made: nothing fails here
            parents[layer].self_attn = latent
            self._undo.append((parents[layer], layer))

    def remove(self) -> None:
        """Give the model its attention back; a second call does nothing."""
        while self._undo:
            parent, layer = self._undo.pop()
            parent.self_attn = layer

    def __enter__(self) -> Converted:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def apply(model: nn.Module, conversion: Conversion) -> Converted:
    """Replace the model's attention by the converted one, until the handle is removed.

    A cache of transformers (``DynamicCache``) then keeps ``rank + rope`` numbers of a token and
    layer.  The converted weights are parameters, as training them is what restores the model.

    Raises:
        ConversionError: the conversion is of another model.
    """
    return Converted(model, conversion)


@dataclass(frozen=True)
class Cost:
    """What a conversion saves, and what it does to the predictions on a text.

    Attributes:
        numbers, before: that a token keeps, of all layers, and kept before.
        partial: with RoPE dropped where it is, and no projection.
        whole: converted.
    """

    numbers: int
    before: int
    partial: Agreement
    whole: Agreement

    @property
    def warning(self) -> str | None:
        """A sentence, unless the predictions stay what they were."""
        if self.whole.kl <= MOST_KL:
            return None
        return (
            f"the conversion changes the predictions (KL {self.whole.kl:.3f}, perplexity "
            f"{self.whole.exact_perplexity:.2f} -> {self.whole.perplexity:.2f}): a model must be "
            "fine-tuned after it, the paper takes billions of tokens"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "warning": self.warning}


@torch.no_grad()
def cost(model: nn.Module, ids: Tensor, conversion: Conversion, partial: Conversion) -> Cost:
    """Judge a conversion on a text ``ids [n]`` that it was not made on.

    Args:
        partial: the same with the largest rank: what dropping RoPE costs by itself.

    Raises:
        ConversionError: one is of another model.
    """
    exact = _logits(model, ids)
    found = []
    for one in (partial, conversion):
        with apply(model, one):
            found.append(agreement(_logits(model, ids), exact, ids[1:]))
    sizes, layers = conversion.sizes, conversion.layers
    return Cost(layers * (sizes.rank + sizes.rope), layers * 2 * conversion.width, *found)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model(ids[None].to(device), use_cache=False).logits[0, :-1].cpu()  # type: ignore[no-any-return]


def full_rank(sizes: Sizes, width: int) -> Sizes:
    """The sizes without projection, for layers with ``width`` channels of K."""
    return Sizes(2 * width - sizes.rope, sizes.rope)
