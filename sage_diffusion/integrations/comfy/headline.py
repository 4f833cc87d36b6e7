"""What stands on a node: two lines that are true whenever they are read, and what state it is in.

A node is made larger by hand only, and shows two lines before.  So the first says what ran, the
second how much faster; where nothing was quantized the first is the cause and the second the
remedy.  No line promises another that comes later.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

#: ``nothing`` is a plan that quantizes and did so nowhere: red on the page.
State = Literal[
    "ready", "sampling", "done", "warning", "nothing", "cancelled", "failed", "off", "elsewhere"
]


class Headline(NamedTuple):
    """Two lines and a state."""

    state: State
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.first}\n{self.second}"


OFF = Headline("off", "off: the model is passed through", "its own attention runs in every call")

MISSING = Headline(
    "nothing",
    "NOT QUANTIZED: this MODEL did not go through Sage Attention",
    "Remedy: connect Sage Attention's MODEL to the sampler and to this node",
)


def ready(title: str) -> Headline:
    """The node has patched a MODEL."""
    return Headline("ready", f"ready: {title}", "nothing was sampled with it since")


def sampling(title: str) -> Headline:
    """A run has begun and not ended."""
    return Headline("sampling", f"sampling: {title}", "no figures of this run yet")


def broken_off(error: BaseException) -> Headline:
    """A run was cancelled, or failed."""
    kind = type(error).__name__
    if kind == "InterruptProcessingException":  # ComfyUI's, of the button on the page
        return Headline("cancelled", "cancelled while sampling", "no figures of this run")
    text = " ".join(str(error).split())
    return Headline("failed", "sampling failed: no figures of this run", f"{kind}: {text}")


def elsewhere(node: str) -> Headline:
    """Another node sampled with this one's settings, and reports itself."""
    return Headline("elsewhere", f"sampled by {node}", "its figures stand on that node")
