import io

import pytest
import torch
from PIL import Image

from sage_diffusion.accuracy import pictures


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_png_holds_the_rounded_values() -> None:
    image = torch.tensor([0.0, 0.5, 1.0, 1.5, -1.0, float("nan")]).view(1, 2, 3).repeat(3, 1, 1)
    assert [opened(pictures.to_png(image)).getpixel((i % 3, i // 3))[0] for i in range(6)] == [
        0, 128, 255, 255, 0, 0
    ]  # fmt: skip


def test_difference_is_amplified_and_clamped() -> None:
    a, b = torch.tensor([[[0.50, 0.9]]]), torch.tensor([[[0.55, 0.1]]])
    assert pictures.difference(a, b, 8).flatten().tolist() == pytest.approx([0.4, 1.0], abs=1e-6)


def test_grid_shows_every_run_and_its_difference() -> None:
    first = torch.zeros(2, 3, 4, 4)
    second = torch.full((2, 3, 4, 4), 0.1)
    grid = opened(pictures.grid_png([("a", first), ("b", second)], ["x", "y"], cell=12, gain=8))
    width, height = grid.size
    assert height == 30 + 3 * (12 + 6) + 6 and width > 2 * 18
    column = width - 6 - 6 - 6  # in the last picture of each line
    lines = [grid.getpixel((column, 30 + line * 18 + 6)) for line in range(3)]
    assert lines == [(0, 0, 0), (26, 26, 26), (204, 204, 204)]


def test_grid_rejects_rows_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        pictures.grid_png([], [])
    rows = [("a", torch.zeros(2, 3, 4, 4)), ("b", torch.zeros(1, 3, 4, 4))]
    with pytest.raises(ValueError, match=r"row 'b' must hold 2 pictures .* got \(1, 3, 4, 4\)"):
        pictures.grid_png(rows, ["x", "y"])
