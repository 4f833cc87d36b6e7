"""Names of layers in pipelines, and which globs mean them."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase


class LayerName(str):
    """Where a layer is: the path inside of a component of its pipeline.

    The text is the path alone for the pipeline's main denoiser, whatever else the pipeline has, and
    ``component.path`` for any other.  A glob means the layer if it matches the text, the path, or
    ``component.path`` with the component spelled out, so that a plan which was made on one pipeline
    fits the same model in another (a U-Net beside a ControlNet, both experts of Wan 2.2).

    Args:
        path: inside of the component.
        component: name of the component, empty for a model without a pipeline.
        main: is it the main denoiser?
    """

    path: str
    component: str

    def __new__(cls, path: str, component: str = "", main: bool = True) -> LayerName:
        new = super().__new__(cls, path if main or not component else f"{component}.{path}")
        new.path, new.component = path, component
        return new

    def sub(self, call: int) -> LayerName:
        """The name of a later attention call of the same module."""
        main = self.path == self
        return LayerName(f"{self.path}.{call}", self.component, main)


def texts(name: str) -> tuple[str, ...]:
    """What a glob may match of a layer's name."""
    if not isinstance(name, LayerName):
        return (name,)
    return str(name), name.path, f"{name.component}.{name.path}"


def means(glob: str, name: str, match: Callable[[str, str], bool] = fnmatchcase) -> bool:
    """Does a glob mean a layer?  Any string may be a name; ``match`` says how globs match texts."""
    if match(name, glob):
        return True
    if not isinstance(name, LayerName):
        return False
    if match(name.path, glob):
        return True
    head, dot, _ = glob.partition(".")
    named = bool(dot) and fnmatchcase(name.component, head)
    return named and match(f"{name.component}.{name.path}", glob)


def inside(name: str, components: set[str]) -> str:
    """The path inside of a component; of a plain string without the component's name, if any."""
    if isinstance(name, LayerName):
        return name.path
    head, _, path = name.partition(".")
    return path if path and head in components else name
