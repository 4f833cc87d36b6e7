"""A rolling, compressed KV cache for causal Wan models.

    cache = WanKVCache(len(transformer.blocks), method="k3v2", sink=1560, recent=1560)
    with cached(transformer, cache) as run:
        for frame, chunk in chunks:
            cache.enable_append_mode()
            for t in steps:
                velocity = run(chunk, t, prompt, frame_offset=frame)
                cache.enable_overwrite_mode()

The interface is that of diffusers' open pull request #13681 - ``WanKVCache(num_blocks,
window_size)``, ``update(block_idx, key, value)``, two modes, ``reset()``, ``frame_offset`` - so
that the cache fits its processor when it lands.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_diffusion.kv.layer import Layer
from sage_diffusion.kv.method import Method
from sage_diffusion.kv.presets import method as method_of
from sage_diffusion.kv.rolling import Rolling, RollingBody
from sage_diffusion.kv.scratch import Scratch


class WanKVCache:
    """K and V of the chunks of frames that came before, for every block of a Wan transformer.

    What a layer keeps: the first ``sink`` tokens exact, older ones compressed, the last ``recent``
    tokens before the present chunk exact, and the present chunk, which is written again at every
    denoising step.  A chunk is compressed once, when it has left ``recent``.

    Args:
        num_blocks: transformer blocks.
        window_size: most tokens that are kept, with sink and present chunk; -1: all.  The oldest
            after the sink go, a whole span at a time.
        method: a preset's name or a method; ``"lossless"`` keeps everything as it is.
        sink: first tokens that are kept exact, and never dropped.
        recent: tokens before the present chunk that are kept exact.
        span: tokens that are compressed and dropped together; None: the first chunk's.
        budget: most bytes of K and V of all blocks together; the oldest spans go until they fit,
            so the history is the longest that does.

    Raises:
        ValueError: a number that is out of range, or a method that does not exist or fit.
    """

    def __init__(
        self,
        num_blocks: int,
        window_size: int = -1,
        *,
        method: str | Method = "lossless",
        sink: int = 0,
        recent: int = 0,
        span: int | None = None,
        budget: int | None = None,
    ):
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        if window_size < 1 and window_size != -1:
            raise ValueError(f"window_size must be -1 or at least 1 token, got {window_size}")
        if budget is not None and budget < 1:
            raise ValueError(f"budget must be at least 1 byte, got {budget}")
        self.num_blocks, self.window_size, self.budget = num_blocks, window_size, budget
        self.method, self.sink, self.recent, self.span = method_of(method), sink, recent, span
        self._layer(0, 1 if span is None else span)  # what can't be is said here
        self._appends = True
        self.scratch = Scratch()
        self.layers: list[Layer] = []

    def enable_append_mode(self) -> None:
        """What the next forward pass brings is a new chunk: a chunk's first denoising step."""
        self._appends = True

    def enable_overwrite_mode(self) -> None:
        """What the next forward pass brings replaces the newest tokens: its further steps."""
        self._appends = False

    def reset(self) -> None:
        """Forget everything, as between two videos."""
        self.layers = []
        self.scratch.clear()

    def _layer(self, number: int, span: int) -> Layer:
        return Layer(Rolling(self.method, span), self.sink, self.recent, number)

    def update(self, block_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take a chunk's K and V, and give all that it may attend to.

        Args:
            key, value: ``[B, n, H, D]``, K after RoPE.

        Returns:
            ``[B, T, H, D]`` each; all blocks share this memory, so it holds until the next call.

        Raises:
            ValueError: shapes are not those of the tokens before, or the present chunk with sink
                and ``recent`` is already more than the budget.
        """
        if not self.layers:
            span = key.shape[1] if self.span is None else self.span
            self.layers = [self._layer(number, span) for number in range(self.num_blocks)]
        layer, count = self.layers[block_idx], key.shape[1]
        if not self._appends and layer.tokens:
            layer.crop(max(layer.tokens - count, 0))
        layer.append(key.transpose(1, 2), value.transpose(1, 2))
        self._forget(layer)
        k, v = self.scratch.fill(layer)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _forget(self, layer: Layer) -> None:
        body = layer.body
        assert isinstance(body, RollingBody)
        while 0 < self.window_size < layer.tokens and body.tokens:
            body.drop()
        if self.budget is None:
            return
        most = self.budget // self.num_blocks
        while layer.nbytes > most and body.tokens:
            body.drop()
        if layer.nbytes > most:
            raise ValueError(
                f"a budget of {self.budget} bytes gives each block {most}, but its sink, recent "
                f"tokens and present chunk alone take {layer.nbytes}"
            )

    @property
    def tokens(self) -> int:
        """Tokens that the first block keeps."""
        return self.layers[0].tokens if self.layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated for K and V between two calls."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def peak_bytes(self) -> int:
        """The same with the memory that a layer is decoded into."""
        return self.nbytes + self.scratch.nbytes


class _Processor:
    """Wan's self-attention over a cache and the present chunk.

    Without a cache it is the processor that it stands in for.
    """

    def __init__(self, run: CachedWan, index: int, original: Any):
        self.run, self.index, self.original = run, index, original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        cache = self.run.cache
        if cache is None:
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        if rotary_emb is None:
            raise ValueError("a KV cache needs the rotary embedding of the self-attention")
        heads = (attn.heads, -1)
        query, key, value = _projections(attn, hidden_states)
        query = _rotated(attn.norm_q(query).unflatten(2, heads), rotary_emb)
        key = _rotated(attn.norm_k(key).unflatten(2, heads), rotary_emb)
        keys, values = cache.update(self.index, key, value.unflatten(2, heads))
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attention_mask
        )
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))


def _projections(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(hidden_states).chunk(3, -1)
        return query, key, value
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def _rotated(states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE of neighbouring channels, as Wan has it: ``states [B, n, H, D]``."""
    cos, sin = angles[0][..., 0::2], angles[1][..., 1::2]
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).type_as(states)


class CachedWan:
    """A Wan transformer whose self-attention reads and fills a :class:`WanKVCache`.

    Calling it calls the transformer; :meth:`remove` leaves the transformer as it was.

    Raises:
        ValueError: the model has no blocks with Wan's self-attention, or it is patched already.
    """

    def __init__(self, transformer: Any, cache: WanKVCache):
        blocks = list(getattr(transformer, "blocks", []))
        if not blocks or not all(hasattr(b, "attn1") and hasattr(b, "attn2") for b in blocks):
            raise ValueError(
                f"a KV cache needs a Wan transformer with blocks of attn1 and attn2, "
                f"got {type(transformer).__name__}"
            )
        self.transformer, self.default = transformer, cache
        self.cache: WanKVCache | None = None
        self._offset = 0
        self._blocks: list[Any] = blocks
        for index, block in enumerate(blocks):
            if isinstance(block.attn1.processor, _Processor):
                raise ValueError("the transformer has a KV cache already; remove that one first")
            block.attn1.processor = _Processor(self, index, block.attn1.processor)
        self._hook = transformer.rope.register_forward_hook(self._shifted)

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        frame_offset: int = 0,
        kv_cache: WanKVCache | None = None,
        **more: Any,
    ) -> Tensor:
        """The transformer's prediction for one chunk, ``[B, C, frames, H, W]``.

        Args:
            frame_offset: frames of patches before this chunk, for RoPE.
            kv_cache: another cache than the default, e.g. that of the branch without prompt.
            more: as the transformer takes it.

        Raises:
            ValueError: the cache is for another number of blocks, or RoPE's table is too short.
        """
        cache = self.default if kv_cache is None else kv_cache
        if cache.num_blocks != len(self._blocks):
            raise ValueError(
                f"the cache is for {cache.num_blocks} blocks, the transformer has "
                f"{len(self._blocks)}"
            )
        self.cache, self._offset = cache, frame_offset
        try:
            return self.transformer(
                hidden_states, timestep, encoder_hidden_states, return_dict=False, **more
            )[0]
        finally:
            self.cache = None

    def _shifted(
        self, rope: Any, inputs: tuple[Tensor, ...], angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """The same angles, those along time from frame ``offset`` on."""
        if self.cache is None or self._offset == 0:
            return None
        frames = inputs[0].shape[2] // rope.patch_size[0]
        last = self._offset + frames
        if last > rope.max_seq_len:
            raise ValueError(
                f"RoPE's table has {rope.max_seq_len} frames, the chunk ends at frame {last}"
            )
        shifted = []
        for whole, table in zip(angles, (rope.freqs_cos, rope.freqs_sin), strict=True):
            time = table[self._offset : last, : rope.t_dim]
            whole = whole.clone().unflatten(1, (frames, -1))
            whole[..., : rope.t_dim] = time[None, :, None, None]
            shifted.append(whole.flatten(1, 2))
        return shifted[0], shifted[1]

    def remove(self) -> None:
        """Give every block its own processor back; more than once does no harm."""
        self._hook.remove()
        for block in self._blocks:
            if isinstance(block.attn1.processor, _Processor):
                block.attn1.processor = block.attn1.processor.original
        self._blocks = []

    def __enter__(self) -> CachedWan:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def cached(transformer: Any, cache: WanKVCache) -> CachedWan:
    """Let a Wan transformer use a cache; a context manager, or a handle to ``remove()``."""
    return CachedWan(transformer, cache)
