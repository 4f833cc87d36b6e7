"""Files of tensors say what they are."""

import pytest
import torch

from sage_diffusion.kv.tensor_files import load, save


class NoneOfThem(ValueError):
    """What the tests' files raise."""


def test_what_is_written_is_read(tmp_path):
    path, columns = tmp_path / "file", torch.arange(6).view(2, 3).T
    save(path, "test-1", {"x": columns}, {"of": "six"})
    tensors, about = load(path, "test-1", "trial", NoneOfThem)
    assert list(tensors) == ["x"] and torch.equal(tensors["x"], columns)
    assert about == {"format": "test-1", "of": "six"}


def test_what_it_is_not_is_said(tmp_path):
    path = tmp_path / "file"
    save(path, "test-1", {"x": torch.zeros(1)}, {})
    with pytest.raises(NoneOfThem, match=r"must be a trial \(test-2\), it is not"):
        load(path, "test-2", "trial", NoneOfThem)
    with pytest.raises(NoneOfThem, match="must be a whole trial: its metadata lack of, layers"):
        load(path, "test-1", "trial", NoneOfThem, ("of", "format", "layers"))
    path.write_bytes(b"no")
    with pytest.raises(NoneOfThem, match="must be a safetensors file"):
        load(path, "test-1", "trial", NoneOfThem)
    with pytest.raises(OSError):
        load(tmp_path / "missing", "test-1", "trial", NoneOfThem)
