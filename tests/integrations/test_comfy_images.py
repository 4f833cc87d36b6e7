"""Pictures and text as ComfyUI's IMAGE."""

import torch

from sage_diffusion.integrations.comfy.images import from_png, note


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
