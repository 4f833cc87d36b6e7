"""``AccuracyReport``: what a plan cost against FP16, as data; JSON, Markdown, HTML and a PNG.

A row is one attention call compared with exact attention on the same inputs.  Calls that ran as
``fp16`` are rows too, with no error by definition, so that a heat map can tell them from calls that
never happened (a step cache skipped the block): those have no row and stay unknown.
"""

from __future__ import annotations

from pathlib import Path

from sage_diffusion.accuracy.findings import Findings
from sage_diffusion.files import write_bytes, write_text


class AccuracyReport(Findings):
    """:class:`Findings` and the forms in which people and programs read them."""

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` reads back; without the pictures."""
        from sage_diffusion.accuracy.report_json import dump

        return dump(self)

    @classmethod
    def from_json(cls, text: str) -> AccuracyReport:
        """Read a report.

        Raises:
            ReportError: no JSON, a later version, or a wrong value; the message names the path.
        """
        from sage_diffusion.accuracy.report_json import parse

        return cls(**parse(text))

    def to_markdown(self) -> str:
        """Tables for a terminal, a pull request or a model card."""
        from sage_diffusion.accuracy.render import markdown

        return markdown(self)

    def to_html(self) -> str:
        """One HTML page that needs no other file and no network."""
        from sage_diffusion.accuracy.render import html

        return html(self)

    def heatmap_png(self, path: str | Path) -> None:
        """Write the layer x step heat map as a PNG.

        Raises:
            ImportError: matplotlib, the extra ``plot``, is not installed.
        """
        from sage_diffusion.accuracy.heatmap import heatmap_png

        write_bytes(Path(path), heatmap_png(self))

    def save(self, folder: str | Path, name: str = "report") -> tuple[Path, ...]:
        """Write ``name.json``, ``name.md`` and ``name.html`` into a folder, made if need be."""
        forms = {"json": self.to_json, "md": self.to_markdown, "html": self.to_html}
        paths = {Path(folder) / f"{name}.{ending}": form for ending, form in forms.items()}
        for path, form in paths.items():
            write_text(path, form())
        return tuple(paths)
