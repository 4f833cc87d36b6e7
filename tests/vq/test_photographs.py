"""Picture files."""

import pytest
import torch
from PIL import Image

from sage_diffusion.vq.photographs import load_picture, picture_files
from sage_diffusion.vq.tokenizer import TokenizerError


def test_folders_are_read_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt"):
        Image.new("RGB", (4, 2)).save(tmp_path / name, "png")
    found = picture_files([tmp_path, tmp_path / "notes.txt"])
    assert [path.name for path in found] == ["a.JPG", "b.png", "notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match="must hold pictures"):
        picture_files([tmp_path / "empty"])


def test_a_picture_is_turned_and_made_smaller(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.png", exif=exif)
    whole = load_picture(tmp_path / "a.png")
    assert whole.shape == (3, 40, 20) and whole.dtype == torch.uint8
    assert whole[:, 0, 0].tolist() == [255, 0, 0]
    assert load_picture(tmp_path / "a.png", 10).shape == (3, 10, 5)
    (tmp_path / "b.png").write_text("no")
    with pytest.raises(TokenizerError, match="is no picture that can be read"):
        load_picture(tmp_path / "b.png")
    with pytest.raises(TokenizerError, match="must be a picture, there is none"):
        load_picture(tmp_path / "c.png")
