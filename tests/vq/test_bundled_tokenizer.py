"""The tokenizer that comes with the package."""

import json

import torch
import torch.nn.functional as F

from sage_diffusion import cli
from sage_diffusion.vq import load_tokenizer
from sage_diffusion.vq.checkpoints import BUNDLED
from sage_diffusion.vq.tokenizer import psnr


def picture(side=128):
    """Soft light, an edge and a texture, ``[1, 3, side, side]`` in 0 .. 1."""
    y, x = torch.meshgrid(*(torch.linspace(0, 1, side),) * 2, indexing="ij")
    hill = (y > 0.6 + 0.2 * torch.sin(5 * x)).float()
    noise = torch.rand(side, side, generator=torch.Generator().manual_seed(0))
    grass = 0.3 + 0.1 * F.avg_pool2d(noise[None], 3, 1, 1)[0]
    sky = torch.stack([0.5 + 0.4 * y, 0.6 + 0.3 * y, 0.9 - 0.1 * y])
    ground = torch.stack([grass, grass + 0.2, grass * 0.5])
    return (sky * (1 - hill) + ground * hill)[None].clamp(0, 1)


def test_it_is_small_and_draws_what_it_is_given():
    """On photographs it beats down-scaling by 8 (its card); this one is softer than they are."""
    assert BUNDLED.stat().st_size <= 8 << 20
    tokenizer = load_tokenizer("bundled")
    assert (tokenizer.codebook_size, tokenizer.bits, tokenizer.traits.factor) == (4096, 12, 8)
    image = picture()
    ids = tokenizer.encode(image)
    assert ids.shape == (1, 16, 16) and len(ids.unique()) > 40
    assert psnr(tokenizer.decode(ids), image) > 25
    blurred = F.avg_pool2d(image, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert psnr(tokenizer.decode(ids), image) > psnr(blurred, image)


def test_the_command_line_takes_it_by_itself(tmp_path, capsys):
    from PIL import Image

    pixels = (picture()[0].permute(1, 2, 0) * 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = tmp_path / "a.vqt"
    assert cli.main(["vq", "encode", str(tmp_path / "a.png"), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == [16, 16] and found["bytes"] == out.stat().st_size == 32 + 384
    again = tmp_path / "again.png"
    assert cli.main(["vq", "decode", str(out), "--out", str(again)]) == 0
    assert Image.open(again).size == (128, 128)
