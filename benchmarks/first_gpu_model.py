"""Sections of :mod:`.first_gpu` beyond single kernels: a model, host time, graphs, compilation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_diffusion import AttentionSession, attention
from sage_diffusion.speed.bench import inputs
from sage_diffusion.verify.checks import relative_l1

if TYPE_CHECKING:
    from benchmarks.first_gpu import Run

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """A block of a diffusion transformer: attention with normalized Q and K, then an MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))

    def forward(self, x: Tensor, attend: Attention) -> Tensor:
        """``[B, L, width]``."""
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(y, y.shape[-1:]) for y in (q, k))
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        hidden: Tensor = self.up(self.norms[1](x))
        return x + self.down(F.gelu(hidden, approximate="tanh"))


class Transformer(nn.Module):
    """Blocks, each with an attention of its own."""

    def __init__(self, width: int, heads: int, blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))

    def forward(self, x: Tensor, attends: list[Attention]) -> Tensor:
        """``[B, L, width]``."""
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, attend)
        return x


def make(state: Run) -> tuple[Transformer, Tensor]:
    """Random weights and an input, always the same."""
    width, heads, tokens, blocks = state.sizes.model
    device = state.place.device
    torch.manual_seed(0)
    with torch.device(device):
        net = Transformer(width, heads, blocks).to(torch.bfloat16).eval()
        return net, torch.randn(1, tokens, width, dtype=torch.bfloat16)


def session(state: Run, spec: str) -> tuple[AttentionSession, list[Any]]:
    """A session with a layer a block."""
    served = AttentionSession(spec)
    return served, [served.layer(f"blocks.{i}") for i in range(state.sizes.model[3])]


def native(state: Run) -> list[Attention]:
    """PyTorch's attention for every block."""
    return [F.scaled_dot_product_attention] * state.sizes.model[3]


def forward(state: Run) -> dict[str, Any]:
    """Milliseconds of a forward with PyTorch's and with quantized attention, and the difference."""
    net, x = make(state)
    timer = state.timer()
    exact = net(x, native(state))
    base = timer(lambda: net(x, native(state))).median
    rows: dict[str, Any] = {"sdpa": {"milliseconds": base}}
    for spec in state.specs:
        served, layers = session(state, spec)
        out = net(x, layers)
        took = timer(lambda layers=layers: net(x, layers)).median
        summary = served.summary()
        rows[spec] = {
            "milliseconds": took,
            "speedup": base / took,
            # Of what the blocks add: the input passes through them.
            "relative_l1": relative_l1(out - x, exact - x),
            "ran": counted(layer.ran for layer in summary.layers),
            "declined": counted(layer.declined for layer in summary.layers),
        }
    return rows


def counted(layers: Iterable[dict[Any, int]]) -> dict[str, int]:
    """Calls of all layers by what ran them ("int8/fp8 on hopper"), or by why they were declined."""
    total: Counter[str] = Counter()
    for layer in layers:
        for key, number in layer.items():
            total[" on ".join(key) if isinstance(key, tuple) else key] += number
    return dict(total)


def calls(state: Run, length: int) -> dict[str, Callable[[], Tensor]]:
    """PyTorch's attention and ours on short sequences."""
    head_dim = state.sizes.head_dims[0]
    q, k, v = inputs(1, state.sizes.heads, length, head_dim, state.place.device, torch.float16)
    found: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v)
    }
    for spec in state.specs:
        found[spec] = lambda spec=spec: attention(q, k, v, spec)
        layer = AttentionSession(spec).layer("blocks.0")
        found[f"{spec}, session"] = lambda layer=layer: layer(q, k, v)
    return found


def overhead(state: Run) -> dict[str, Any]:
    """Microseconds of the host per call, and kernels that it launches."""
    rows = {}
    for name, call in calls(state, state.sizes.short[0]).items():
        rows[name] = {"host_us": host_time(state, call), "launches": launches(state, call)}
    return rows


def host_time(state: Run, call: Callable[[], object], repeats: int = 20) -> float:
    """Microseconds until a call returns, best of some rounds; the card is idle before each."""
    call()
    times = []
    for _ in range(state.sizes.rounds):
        synchronize(state)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats)
        synchronize(state)
    return 1e6 * min(times)


def launches(state: Run, call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that a call puts on the card; None without one."""
    if state.place.emulated:
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        synchronize(state)
    on_card = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_card for event in seen.events())


def synchronize(state: Run) -> None:
    """Wait for the card."""
    if state.place.device.type == "cuda":
        torch.cuda.synchronize(state.place.device)


def graphs(state: Run) -> dict[str, Any]:
    """The same calls replayed from a CUDA graph: the same bits, and what launches cost the host."""
    rows: dict[str, Any] = {}
    timer = state.timer()
    for length in state.sizes.short:
        for name, call in calls(state, length).items():
            if name.endswith("session"):
                continue
            try:
                replay, out = captured(state, call)
                replay()
                want = call()
                rows[f"{name}, {length}"] = {
                    "milliseconds": timer(replay).median,
                    "call_ms": timer(call).median,
                    "same_bits": torch.equal(out.view(torch.uint8), want.view(torch.uint8)),
                }
            except Exception as error:
                synchronize(state)
                state.problem(f"graphs: {name}, {length}", f"{type(error).__name__}: {error}")
    return rows


def captured(state: Run, call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """A call's replay and its output; without a card the call itself."""
    if state.place.emulated:
        out = call()
        return lambda: out.copy_(call()), out
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def compiled(state: Run) -> dict[str, Any]:
    """The model through ``torch.compile``: graphs that it needs, and what is left of the gain."""
    net, x = make(state)
    timer, rows = state.timer(), {}
    specs = [None, *fastest(state, 2)]
    modes = {"default": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
    if state.place.emulated:
        modes = {"eager": {"backend": "eager"}}
    for mode, options in modes.items():
        for spec in specs:
            name = f"{spec or 'sdpa'}, {mode}"
            if state.spent > state.seconds:
                state.problem(f"compile: {name}", "no time left")
                continue
            try:
                rows[name] = one_compiled(state, net, x, spec, timer, options)
            except Exception as error:
                text = " ".join(str(error).split())[:400]
                state.problem(f"compile: {name}", f"{type(error).__name__}: {text}")
    return rows


def fastest(state: Run, count: int) -> list[str]:
    """Specs with the fastest forwards, or the ladder's last where none was timed."""
    rows = state.found.get("model", {})
    timed = [spec for spec in state.specs if spec in rows]
    timed.sort(key=lambda spec: rows[spec]["milliseconds"])
    return timed[:count] or state.specs[-count:]


def one_compiled(
    state: Run, net: Transformer, x: Tensor, spec: str | None, timer: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """One spec in one mode."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    layers = native(state) if spec is None else session(state, spec)[1]
    fast = torch.compile(net, **options)
    start = time.perf_counter()
    fast(x, layers)
    synchronize(state)
    took = time.perf_counter() - start
    return {
        "milliseconds": timer(lambda: fast(x, layers)).median,
        "compile_s": round(took, 1),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }
