"""Tokenizers: round trips, files of tokenizers and of ids, usage, the command line."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sage_diffusion import cli
from sage_diffusion.vq import FSQ, Residual, SimVQ, VectorQuantizer, load_tokenizer
from sage_diffusion.vq.checkpoints import convert, save_tokenizer
from sage_diffusion.vq.families import compact
from sage_diffusion.vq.idfile import Tokens, load_tokens, pack, save_tokens, unpack
from sage_diffusion.vq.tokenizer import TokenizerError, psnr, token_bits
from sage_diffusion.vq.usage import effective_rank, rarity, usage

TINY = {"widths": [8, 12], "depths": [1, 1]}


def tiny(quantizer=None):
    torch.manual_seed(0)
    return compact.make(quantizer or SimVQ(6, 50), TINY).eval()


def picture(height=24, width=16):
    """A smooth one with an edge, ``[1, 3, H, W]`` in 0 .. 1."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([x, y, (x > y).float()])[None]


class TestRoundTrip:
    @pytest.mark.parametrize(
        "quantizer",
        [SimVQ(6, 50), FSQ((5, 4), 6), Residual([SimVQ(6, 16), VectorQuantizer(6, 16)])],
        ids=lambda q: q.kind,
    )
    def test_ids_decode_to_the_forward_pass(self, quantizer):
        tokenizer = tiny(quantizer)
        ids = tokenizer.encode(picture())
        levels = (2,) if quantizer.levels == 2 else ()
        assert ids.shape == (1, 3, 2, *levels) and ids.dtype == torch.int64
        with torch.no_grad():
            forward, indices, _ = tokenizer(picture())
        assert torch.equal(indices.view(ids.shape), ids)
        assert torch.equal(tokenizer.decode(ids), forward.clamp(0, 1))
        assert tokenizer.picture_bits(24, 16) == 6 * quantizer.bits

    def test_folded_simvq_decodes_bit_for_bit(self):
        tokenizer = tiny()
        ids = tokenizer.encode(picture())
        want = tokenizer.decode(ids)
        tokenizer.quantizer = tokenizer.quantizer.fold()
        assert torch.equal(tokenizer.encode(picture()), ids)
        assert torch.equal(tokenizer.decode(ids), want)

    @pytest.mark.parametrize(
        "image,message",
        [
            (torch.zeros(3, 16, 16), r"floating \[B, 3, H, W\], got torch.float32 \(3, 16, 16\)"),
            (torch.zeros(1, 1, 16, 16), r"\(1, 1, 16, 16\)"),
            (torch.zeros(1, 3, 16, 20), "multiples of 8, got 20 x 16; crop or pad it to 16 x 16"),
            (torch.zeros(1, 3, 4, 16), "multiples of 8, got 16 x 4"),
            (torch.full((1, 3, 16, 16), torch.nan), "finite"),
            (torch.full((1, 3, 16, 16), -1.0), r"in 0 .. 1, got -1 .. -1"),
            (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floating"),
        ],
    )
    def test_pictures_that_do_not_fit(self, image, message):
        with pytest.raises(TokenizerError, match=message):
            tiny().encode(image)

    def test_ids_that_do_not_fit(self):
        tokenizer = tiny()
        with pytest.raises(TokenizerError, match="ids must be 0 to 49, got 0 to 50"):
            tokenizer.decode(torch.tensor([[[0, 50]]]))
        with pytest.raises(TokenizerError, match=r"ids must be \[B, h, w\], got \(2, 2\)"):
            tokenizer.decode(torch.zeros(2, 2, dtype=torch.int64))

    def test_a_family_without_decoder_says_so(self):
        tokenizer = tiny()
        object.__setattr__(tokenizer.traits, "no_decoder", "a generator reads its tokens")
        tokenizer.decoder = None
        with pytest.raises(TokenizerError, match="can't decode: a generator reads its tokens"):
            tokenizer.decode(tokenizer.encode(picture()))

    @pytest.mark.parametrize(
        "settings", [{"widths": [8]}, {"widths": [8], "depths": [1, 1]}, {"widths": 8, "depths": 1}]
    )
    def test_impossible_networks(self, settings):
        with pytest.raises(TokenizerError, match="must have widths and depths"):
            compact.make(SimVQ(6, 50), settings)


class TestFiles:
    @pytest.mark.parametrize("half", [False, True])
    def test_saved_and_loaded(self, tmp_path, half):
        tokenizer, path = tiny(VectorQuantizer(6, 50)), tmp_path / "t.safetensors"
        save_tokenizer(path, tokenizer, half=half)
        again = load_tokenizer(path)
        assert again.fingerprint == tokenizer.fingerprint and not again.training
        assert not any("sums" in name for name in load_file(path))
        if not half:
            assert torch.equal(again.encode(picture()), tokenizer.encode(picture()))
        assert (
            psnr(
                again.decode(tokenizer.encode(picture())),
                tokenizer.decode(tokenizer.encode(picture())),
            )
            > 50
        )

    def test_a_damaged_file_is_refused(self, tmp_path):
        path, broken = tmp_path / "t.safetensors", tmp_path / "broken.safetensors"
        save_tokenizer(path, tiny())
        state = load_file(path)
        header = json.loads(_metadata(path)["sage_vq"])

        def write(header, state=state):
            save_file(state, broken, {"sage_vq": json.dumps(header)})

        for change, message in (
            ({"version": 2}, "must have a header of version 1"),
            ({"family": "vqvae"}, "no tokenizer family that is known; compact: the file has no"),
            ({"fingerprint": "0" * 16}, "must hold the codes that its header names"),
            ({"settings": {"widths": [8], "depths": [1]}}, "weights do not fit their header"),
            ({"quantizer": {**header["quantizer"], "codebook_size": 51}}, "do not fit"),
            ({"quantizer": {**header["quantizer"], "dim": 7}}, "do not fit"),
            ({"family": "\ud800"}, "damaged header: family must be Unicode text"),
            ({"settings": float("nan")}, "damaged header: settings must be a finite number"),
        ):
            write({**header, **change})
            with pytest.raises(TokenizerError, match=message):
                load_tokenizer(broken)
        del header["quantizer"]
        write(header)
        with pytest.raises(TokenizerError, match="header must have 'quantizer'"):
            load_tokenizer(broken)
        broken.write_bytes(path.read_bytes()[:200])
        with pytest.raises(TokenizerError, match="is no safetensors file"):
            load_tokenizer(broken)

    def test_unknown_keys_list_the_families(self, tmp_path):
        path = tmp_path / "t.safetensors"
        save_file({"encoder.blocks.0.weight": torch.zeros(2)}, path)
        with pytest.raises(
            TokenizerError, match=r"compact: .*; vqgan: no quantize.embedding.weight"
        ):
            load_tokenizer(path)
        with pytest.raises(TokenizerError, match="must be a file or folder, there is none"):
            load_tokenizer(tmp_path / "missing.safetensors")
        with pytest.raises(TokenizerError, match=r"must hold a config.json"):
            load_tokenizer(tmp_path)

    def test_a_pickle_that_wants_code_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        path, out = tmp_path / "evil.ckpt", tmp_path / "out.safetensors"
        torch.save({"state_dict": {"a": Evil()}}, path)
        with pytest.raises(TokenizerError, match=r"wants to run code, (io|_io)\.open: it is not r"):
            convert(path, out)
        path.write_bytes(b"PNG")
        with pytest.raises(TokenizerError, match="no checkpoint that PyTorch reads"):
            convert(path, out)
        assert not (tmp_path / "ran").exists() and not out.exists()
        torch.save({"state_dict": {"a": torch.zeros(2)}}, path)
        with pytest.raises(TokenizerError, match="no tokenizer family that is known"):
            convert(path, out)
        torch.save([1], path)
        with pytest.raises(TokenizerError, match="dictionary of tensors"):
            convert(path, out)
        out.write_text("mine")
        with pytest.raises(TokenizerError, match="exists; nothing is overwritten"):
            convert(path, out)
        with pytest.raises(TokenizerError, match="convert it first"):
            load_tokenizer(path)


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


class TestIdFiles:
    @pytest.mark.parametrize("size", [2, 160, 4096, 64000, 2**18, 2**40])
    @pytest.mark.parametrize("shape", [(1, 8, 8), (2, 5, 7), (1, 3, 4, 2), (1, 1, 1)])
    def test_packed_and_unpacked(self, size, shape):
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(size, shape, generator=g)
        ids.view(-1)[0] = size - 1
        data = pack(Tokens(ids, size, "00ff" * 4))
        found = unpack(data)
        assert torch.equal(found.ids, ids)
        assert (found.codebook_size, found.fingerprint) == (size, "00ff" * 4)

    @pytest.mark.parametrize("size", [160, 4096, 64000])
    def test_bits_of_a_token(self, size):
        """A picture of 256 x 256 pixels at 8 pixels a token, header included: log2 K + 5 %."""
        ids = torch.randint(size, (1, 32, 32))
        data = pack(Tokens(ids, size, "0" * 16))
        assert 8 * len(data) / 1024 <= 1.05 * math.log2(size)

    def test_damage_is_found(self, tmp_path):
        data = pack(Tokens(torch.randint(160, (1, 9, 9)), 160, "0" * 16))
        for bad, message in (
            (data[:20], "must begin with SVQT"),
            (b"JUNK" + data[4:], "must begin with SVQT"),
            (data[:-1], "must have .* bytes"),
            (data + b"0", "must have .* bytes"),
            (data[:4] + b"\x09" + data[5:], "must have version 1, got 9"),
            (data[:-20] + b"\xff" * 20, "damaged"),
        ):
            with pytest.raises(TokenizerError, match=message):
                unpack(bad)
        path = tmp_path / "x.vqt"
        path.write_bytes(data[:-1])
        with pytest.raises(TokenizerError, match=r"x.vqt: a file of 81 ids"):
            load_tokens(path)
        with pytest.raises(TokenizerError, match="can't be read"):
            load_tokens(tmp_path / "none.vqt")

    def test_what_can_not_be_packed(self, tmp_path):
        path = tmp_path / "x.vqt"
        for ids, message in (
            (torch.full((1, 2, 2), 9), "ids must be 0 to 8, got 9 to 9"),
            (torch.zeros(2, 2, dtype=torch.int64), "must be integers"),
            (torch.zeros(1, 2, 2), "must be integers"),
        ):
            with pytest.raises(TokenizerError, match=message):
                save_tokens(path, Tokens(ids, 9, "0" * 16))
        assert not path.exists()

    def test_ids_of_another_tokenizer(self):
        mine, other = tiny(), tiny(SimVQ(6, 51))
        tokens = Tokens.of(mine, mine.encode(picture()))
        tokens.check(mine)
        with pytest.raises(TokenizerError, match=r"51 codes, .* got ids of another \(50 codes"):
            tokens.check(other)


class TestUsage:
    def test_by_hand(self):
        assert token_bits(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])) == pytest.approx(2)
        assert token_bits(torch.zeros(5, dtype=torch.int64)) == 0
        torch.testing.assert_close(
            rarity(torch.tensor([[[7, 7], [7, 3]]])),
            torch.tensor([[[1.0, 1.0], [1.0, 3.0]]])
            * -math.log2(0.75)
            * torch.tensor([[[1.0, 1.0], [1.0, 2 / (3 * -math.log2(0.75))]]]),
        )
        g = torch.Generator().manual_seed(0)
        flat = torch.randn(20000, 2, generator=g) @ torch.randn(2, 6, generator=g).mul(1)
        assert 1 < effective_rank(flat) <= 2.001
        assert effective_rank(torch.randn(20000, 6, generator=g)) == pytest.approx(6, rel=0.01)
        assert effective_rank(torch.ones(9, 6)) == 0

    def test_of_a_tokenizer(self):
        tokenizer = tiny()
        pictures = [picture(), picture(16, 16).flip(-1)]
        found = usage(tokenizer, pictures)
        ids = torch.cat([tokenizer.encode(image).flatten() for image in pictures])
        assert (found.tokens, found.used) == (10, len(ids.unique()))
        assert found.dead == 50 - found.used and found.dim == 6
        assert found.entropy_bits == token_bits(ids)
        assert found.even == pytest.approx(50 * (1 - (1 - 1 / 50) ** 10))
        assert found.most[0][1] == ids.unique(return_counts=True)[1].max()
        assert usage(tokenizer, pictures, tokens=4).tokens == 4
        with pytest.raises(TokenizerError, match="at least one picture"):
            usage(tokenizer, [])

    def test_levels_count_as_one_id(self):
        tokenizer = tiny(Residual([SimVQ(6, 16), SimVQ(6, 16)]))
        found = usage(tokenizer, [picture()])
        assert found.codes == 256 and 1 <= found.used <= 6


class TestCommands:
    @pytest.fixture
    def files(self, tmp_path):
        path = tmp_path / "t.safetensors"
        save_tokenizer(path, tiny(VectorQuantizer(6, 50)))
        pixels = (picture(25, 35)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        return tmp_path, ["--tokenizer", str(path)]

    def run(self, capsys, *arguments):
        code = cli.main(["vq", *map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    def test_there_and_back(self, files, capsys):
        folder, tokenizer = files
        tokens, image = folder / "x.vqt", folder / "y.png"
        code, found = self.run(capsys, "encode", folder / "photo.png", *tokenizer, "--out", tokens)
        assert code == 0
        assert (found["picture"], found["cropped_from"]) == ([32, 24], [35, 25])
        assert (found["tokens"], found["bytes"]) == ([3, 4], tokens.stat().st_size)
        code, done = self.run(capsys, "decode", tokens, *tokenizer, "--out", image)
        assert code == 0 and done["files"] == [str(image)] and done["picture"] == [32, 24]
        decoded = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None] / 255
        loaded = load_tokenizer(tokenizer[1])
        want = loaded.decode(load_tokens(tokens).ids)
        assert (decoded - want).abs().max() <= 0.5 / 255 + 1e-6
        assert (
            cli.main(["vq", "encode", str(folder / "photo.png"), *tokenizer, "--out", str(tokens)])
            == 0
        )
        assert "cropped from 35 x 25" in capsys.readouterr().out

    def test_inspect(self, files, capsys):
        folder, tokenizer = files
        code, found = self.run(capsys, "inspect", *tokenizer)
        assert code == 0 and found["usage"] is None and found["codebook_size"] == 50
        code, found = self.run(capsys, "inspect", folder, *tokenizer, "--tokens", "5")
        assert code == 0 and found["usage"]["tokens"] == 5
        assert cli.main(["vq", "inspect", str(folder / "photo.png"), *tokenizer]) == 0
        assert "effective rank" in capsys.readouterr().out

    def test_convert(self, files, capsys, monkeypatch):
        """What keys do not tell comes from the options and stays in the file."""
        folder, _ = files
        told = []

        def rewrite(source, out, **options):
            told.append(options)
            return load_tokenizer(folder / "t.safetensors")

        monkeypatch.setattr("sage_diffusion.vq.checkpoints.convert", rewrite)
        out = ["--out", folder / "y.safetensors"]
        options = ["--metric", "dot", "--levels", "8,5", "--scales", "1,2,4"]
        code, found = self.run(capsys, "convert", folder / "x.pt", *out, *options)
        assert code == 0 and found["codebook_size"] == 50
        code, _ = self.run(capsys, "convert", folder / "x.pt", *out)
        assert told == [
            {"metric": "dot", "levels": [8, 5], "scales": [1, 2, 4]},
            {"metric": None, "levels": None, "scales": None},
        ]
        code, found = self.run(capsys, "convert", folder / "x.pt", *out, "--levels", "8x5")
        assert code == 1 and "--levels must be numbers like 8,8,5, got 8x5" in found["error"]

    @pytest.mark.parametrize(
        "arguments,message",
        [
            (["encode", "none.png"], "none.png must be a picture, there is none"),
            (["encode", "t.safetensors"], "is no picture that can be read"),
            (["decode", "none.vqt"], "can't be read"),
            (["inspect", "empty"], "must hold pictures"),
        ],
    )
    def test_errors_are_one_document(self, files, capsys, arguments, message):
        folder, tokenizer = files
        (folder / "empty").mkdir()
        code, found = self.run(capsys, arguments[0], folder / arguments[1], *tokenizer)
        assert code == 1 and message in found["error"]

    def test_ids_of_another_tokenizer(self, files, capsys):
        folder, tokenizer = files
        save_tokens(folder / "x.vqt", Tokens(torch.zeros(1, 2, 2, dtype=torch.int64), 50, "0" * 16))
        out = folder / "y.png"
        code, found = self.run(capsys, "decode", folder / "x.vqt", *tokenizer, "--out", out)
        assert code == 1 and "got ids of another" in found["error"] and not out.exists()
