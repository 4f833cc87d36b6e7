"""Pictures and text as ComfyUI's IMAGE."""

import torch

from sage_diffusion.integrations.comfy.images import cell_map, from_png, note


def test_images_are_comfyuis():
    image = note("nothing to draw " * 20)
    assert image.dtype == torch.float32
    assert float(image.max()) <= 1
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (255, 0, 51)).save(buffer, "PNG")
    red = from_png(buffer.getvalue())
    assert red.shape == (1, 2, 3, 3)
    assert torch.allclose(red[0, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_a_map_of_cells_is_darker_where_there_is_more():
    values = {("double.00", 0): 0.01, ("double.00", 1): 0.1, ("double.01", 1): 1.0}
    image = cell_map(values, "error")
    assert image.dtype == torch.float32
    assert image.shape[3] == 3
    shades = {
        tuple(round(float(c) * 255) for c in pixel) for pixel in image.reshape(-1, 3).unique(dim=0)
    }
    assert {(255, 245, 235), (127, 39, 4)} <= shades  # the least and the most
    assert cell_map({("a", 0): 0.0}, "error").shape[0] == 1
