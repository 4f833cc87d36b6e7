"""Training and repair of tokenizers, in Python and as commands."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sage_diffusion import cli
from sage_diffusion.vq import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    Groups,
    Residual,
    SimVQ,
    VectorQuantizer,
    load_tokenizer,
)
from sage_diffusion.vq.checkpoints import save_tokenizer
from sage_diffusion.vq.families import compact
from sage_diffusion.vq.repair import health, refit, repair
from sage_diffusion.vq.tokenizer import TokenizerError
from sage_diffusion.vq.training import Training, crops, preview, scales, train

TINY = {"widths": [8, 12], "depths": [1, 1]}


def tiny(quantizer=None):
    torch.manual_seed(0)
    return compact.make(quantizer or SimVQ(6, 50), TINY).eval()


def picture(height=24, width=16):
    """A smooth one with an edge, ``[1, 3, H, W]`` in 0 .. 1."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([x, y, (x > y).float()])[None]


class TestTraining:
    def pictures(self):
        return [(picture(40, 48)[0] * 255).to(torch.uint8), (picture(32, 32)[0] * 200).byte()]

    def test_learns(self):
        seen = []
        settings = Training(steps=80, batch=4, crop=16, learning_rate=0.01)
        train(tiny(VectorQuantizer(6, 50)), self.pictures(), settings, progress=seen.append)
        assert [step.step for step in seen] == list(range(1, 81))
        first, last = (sum(step.psnr for step in part) / 8 for part in (seen[:8], seen[-8:]))
        assert last > first + 1.5

    def test_goes_on_where_it_stopped(self, tmp_path):
        settings = Training(steps=24, batch=4, crop=16)
        whole = train(tiny(VectorQuantizer(6, 50)), self.pictures(), settings)

        class Stop(Exception):
            pass

        def stop(step):
            if step.step == 13:
                raise Stop

        path = tmp_path / "c.safetensors"
        options = {"checkpoint": path, "save_every": 6}
        with pytest.raises(Stop):
            train(tiny(VectorQuantizer(6, 50)), self.pictures(), settings, progress=stop, **options)
        again = train(tiny(VectorQuantizer(6, 50)), self.pictures(), settings, **options)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        with pytest.raises(TokenizerError, match="a checkpoint of other settings"):
            train(tiny(), self.pictures(), settings, **options)
        path.write_text("no")
        with pytest.raises(TokenizerError, match="is no checkpoint"):
            train(tiny(), self.pictures(), settings, **options)

    def test_the_callers_random_numbers_stay(self):
        torch.manual_seed(5)
        want = torch.rand(3)
        tokenizer = tiny()
        torch.manual_seed(5)
        train(tokenizer, self.pictures(), Training(steps=1, batch=2, crop=16))
        assert torch.equal(torch.rand(3), want)

    @pytest.mark.parametrize(
        "settings,pictures,message",
        [
            ({"crop": 20}, None, "crop must be a multiple of 8, got 20"),
            ({"crop": 16}, [], "at least one picture"),
            ({"crop": 40}, None, "sides of 40 or more"),
            ({"crop": 16}, [torch.zeros(3, 32, 32)], "must be uint8"),
            ({"crop": 16, "learning_rate": 1e30}, None, "lower learning_rate"),
        ],
    )
    def test_refuses(self, settings, pictures, message):
        pictures = self.pictures() if pictures is None else pictures
        with pytest.raises(TokenizerError, match=message):
            train(tiny(), pictures, Training(steps=150, batch=2, **settings))
        with pytest.raises(ValueError, match="must be positive"):
            Training(steps=0)

    def test_crops_come_from_every_size(self):
        sizes = scales(torch.zeros(3, 1100, 1300, dtype=torch.uint8))
        assert [min(size.shape[1:]) for size in sizes] == [1024, 512, 320]
        small = torch.zeros(3, 40, 50, dtype=torch.uint8)
        assert scales(small)[0] is small
        got = crops([[torch.full((3, 20, 20), 255, dtype=torch.uint8)]], 3, 16, torch.Generator())
        assert torch.equal(got, torch.ones(3, 3, 16, 16))

    def test_a_cancelled_run_keeps_its_last_step(self, tmp_path):
        settings = Training(steps=12, batch=2, crop=16)
        whole = train(tiny(), self.pictures(), settings)

        class Cancelled(BaseException):
            pass

        def cancel(step):
            if step.step == 5:
                raise Cancelled

        path = tmp_path / "c.safetensors"
        with pytest.raises(Cancelled):
            train(tiny(), self.pictures(), settings, checkpoint=path, progress=cancel)
        seen = []
        again = train(tiny(), self.pictures(), settings, checkpoint=path, progress=seen.append)
        assert [step.step for step in seen] == list(range(6, 13))
        for name, tensor in whole.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name

    def test_the_encoder_stays_where_only_the_decoder_is_trained(self):
        tokenizer = tiny()
        before = {name: x.clone() for name, x in tokenizer.state_dict().items()}
        train(tokenizer, self.pictures(), Training(steps=2, batch=2, crop=16, parts="decoder"))
        changed = {
            n.split(".")[0] for n, x in tokenizer.state_dict().items() if (x != before[n]).any()
        }
        assert changed == {"quantizer", "decoder"}
        with pytest.raises(ValueError, match="parts must be one of all, decoder, got 'encoder'"):
            Training(parts="encoder")

    def test_a_preview_shows_crops_above_what_becomes_of_them(self):
        tokenizer = tiny(VectorQuantizer(6, 50)).train()
        state = {name: x.clone() for name, x in tokenizer.state_dict().items()}
        shown = preview(tokenizer, self.pictures(), 16)
        assert shown.shape == (1, 3, 32, 32)
        crop = self.pictures()[0][:, 12:28, 16:32].float() / 255
        assert torch.equal(shown[0, :, :16, :16], crop)
        want = tokenizer.decode(tokenizer.encode(crop[None]))
        assert torch.allclose(shown[0, :, 16:, :16], want[0], atol=1e-6)
        assert all(torch.equal(x, state[name]) for name, x in tokenizer.state_dict().items())


def collapsed(quantizer=None):
    """A tokenizer all of whose codes but two lie in one place."""
    tokenizer = tiny(quantizer or VectorQuantizer(6, 32, decay=None, kmeans=False, revive=0.0))
    with torch.no_grad():
        tokenizer.quantizer.codebook.mul_(0.01).add_(10)
        tokenizer.quantizer.codebook[:2] -= 10
    return tokenizer


class TestRepair:
    settings = Training(steps=60, batch=4, crop=16, learning_rate=0.02)

    def pictures(self):
        g = torch.Generator().manual_seed(0)
        noise = torch.rand(3, 64, 64, generator=g) * 60
        return [(picture(64, 64)[0] * 190 + noise).to(torch.uint8)]

    @pytest.mark.parametrize("parts", ["all", "decoder"])
    @pytest.mark.parametrize("method", ["kmeans", "simvq"])
    def test_codes_come_alive_and_the_given_one_stays(self, method, parts):
        tokenizer = collapsed()
        before = {name: x.clone() for name, x in tokenizer.state_dict().items()}
        settings = Training(**{**vars(self.settings), "parts": parts})
        found = repair(tokenizer, self.pictures(), settings, method=method, tokens=400)
        assert found.before.usage.used <= 2
        assert found.refitted.usage.used >= 10 and found.after.usage.used >= 8
        assert found.after.psnr > found.before.psnr + 0.4
        assert not found.tokenizer.training
        assert found.tokenizer.fingerprint != tokenizer.fingerprint
        assert all(torch.equal(x, before[name]) for name, x in tokenizer.state_dict().items())
        kind = {"kmeans": VectorQuantizer, "simvq": SimVQ}[method]
        assert type(found.tokenizer.quantizer) is kind
        assert "new codes: " in str(found) and json.dumps(found.as_dict())

    def test_a_repair_that_was_cancelled_goes_on(self, tmp_path):
        whole = repair(collapsed(), self.pictures(), self.settings, tokens=100)

        def cancel(step):
            if step.step == 7:
                raise KeyboardInterrupt

        options = {"checkpoint": tmp_path / "c.safetensors", "tokens": 100}
        with pytest.raises(KeyboardInterrupt):
            repair(collapsed(), self.pictures(), self.settings, **options, progress=cancel)
        again = repair(collapsed(), self.pictures(), self.settings, **options)
        for name, tensor in whole.tokenizer.state_dict().items():
            assert torch.equal(again.tokenizer.state_dict()[name], tensor), name

    def test_new_codes_of_simvq_have_the_latents_mean_and_covariance(self):
        g = torch.Generator().manual_seed(0)
        mixing, shift = torch.randn(6, 6, generator=g), torch.randn(6, generator=g)
        latents = torch.randn(4000, 6, generator=g) @ mixing + shift
        torch.manual_seed(0)
        made = refit(VectorQuantizer(6, 20000), latents, "simvq")
        assert torch.allclose(made.table().mean(0), shift, atol=0.1)
        assert torch.allclose(made.table().t().cov(), latents.t().cov(), rtol=0.1, atol=0.3)

    @pytest.mark.parametrize(
        "quantizer",
        [
            VectorQuantizer(6, 16, metric="cosine"),
            IBQ(6, 16),
            SimVQ(6, 16),
            Groups([VectorQuantizer(4, 8), VectorQuantizer(2, 8)]),
            Residual([SimVQ(6, 16), VectorQuantizer(6, 16)]),
        ],
        ids=lambda q: q.kind,
    )
    def test_codebooks_of_every_kind_are_fitted(self, quantizer):
        latents = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) * 3 + 5
        made = refit(quantizer, latents, "kmeans")
        assert (made.dim, made.codebook_size, made.levels) == (
            quantizer.dim,
            quantizer.codebook_size,
            quantizer.levels,
        )
        again = made.decode(made.encode(latents[None]))[0]
        want = latents
        if getattr(quantizer, "metric", "") == "cosine":
            want = torch.nn.functional.normalize(latents, dim=-1)
        centred = (want - want.mean(0)).square().sum()
        assert (again - want).square().sum() < 0.8 * centred
        assert len(made.encode(latents[None]).flatten(0, 1).unique(dim=0)) > 8

    @pytest.mark.parametrize("quantizer", [FSQ((5, 4), 6), BSQ(6, 4), LFQ(6, 4)])
    def test_nothing_to_fit(self, quantizer):
        with pytest.raises(
            TokenizerError, match=f"repair needs a codebook.*{quantizer.kind} has none"
        ):
            repair(tiny(quantizer), self.pictures(), self.settings)

    def test_refuses(self):
        with pytest.raises(TokenizerError, match="method must be one of kmeans, simvq, got 'em'"):
            repair(collapsed(), self.pictures(), self.settings, method="em")
        with pytest.raises(TokenizerError, match="at least one picture"):
            repair(collapsed(), [], self.settings)
        tokenizer = collapsed()
        tokenizer.decoder = None
        object.__setattr__(tokenizer.traits, "no_decoder", "a generator reads its tokens")
        with pytest.raises(TokenizerError, match="can't be trained: a generator reads"):
            repair(tokenizer, self.pictures(), self.settings)

    def test_figures_are_of_the_pictures_that_were_held_out(self):
        dark = [torch.zeros(3, 32, 32, dtype=torch.uint8)]
        short = Training(steps=1, batch=1, crop=16)
        found = repair(collapsed(), self.pictures(), short, held_out=dark, tokens=100)
        assert found.before == health(collapsed(), dark, 16, 100)
        assert found.before != health(collapsed(), self.pictures(), 16, 100)


class TestCommands:
    @pytest.fixture
    def folder(self, tmp_path):
        pixels = (picture(25, 35)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        return tmp_path

    def run(self, capsys, *arguments):
        code = cli.main(["vq", *map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    short = ("--steps", "2", "--batch", "1", "--crop", "16")

    def train(self, capsys, folder, *more):
        out = folder / "mine.safetensors"
        return self.run(capsys, "train", folder, "--out", out, *self.short, "--codes", "64", *more)

    @pytest.mark.parametrize(
        "more,bits",
        [
            (("--quantizer", "lfq"), 6),
            (("--quantizer", "simvq", "--groups", "2"), 12),
            (("--quantizer", "cosine", "--depth", "2"), 12),
            (("--quantizer", "fsq", "--levels", "4,4,4,4"), 8),
        ],
    )
    def test_train(self, folder, capsys, more, bits):
        shown = folder / "shown.jpg"
        code, found = self.train(capsys, folder, *more, "--preview", shown)
        assert code == 0 and (found["steps"], found["bits_per_token"]) == (2, bits)
        assert Image.open(shown).size == (16, 32)
        loaded = load_tokenizer(folder / "mine.safetensors")
        assert loaded.fingerprint == found["fingerprint"] and loaded.bits == bits

    def test_train_goes_on_and_refuses(self, folder, capsys):
        (folder / "mine.safetensors").write_text("mine")
        code, found = self.train(capsys, folder)
        assert code == 1 and "exists; nothing is overwritten" in found["error"]
        (folder / "mine.safetensors").unlink()
        code, found = self.train(capsys, folder, "--quantizer", "bsq", "--codes", "65")
        assert code == 1 and "must be a power of two for bsq, got 65" in found["error"]
        kept = folder / "kept.safetensors"
        kept.write_text("no")
        code, found = self.train(capsys, folder, "--checkpoint", kept)
        assert code == 1 and "is no checkpoint" in found["error"]
        kept.unlink()
        code, found = self.train(capsys, folder, "--checkpoint", kept)
        assert code == 0 and not kept.exists()

    def test_repair(self, folder, capsys):
        source, out = folder / "t.safetensors", folder / "repaired.safetensors"
        save_tokenizer(source, collapsed())
        data = source.read_bytes()
        arguments = ["repair", source, folder / "photo.png", "--out", out, *self.short]
        arguments += ["--tokens", "100"]
        code, found = self.run(capsys, *arguments, "--method", "simvq", "--parts", "decoder")
        assert code == 0 and source.read_bytes() == data
        assert found["before"]["usage"]["used"] <= 2 < found["after"]["usage"]["used"]
        assert load_tokenizer(out).fingerprint == found["fingerprint"]
        code, found = self.run(capsys, *arguments)
        assert code == 1 and "exists; nothing is overwritten" in found["error"]
        out.unlink()
        code, found = self.run(capsys, *arguments, "--method", "em")
        assert code == 1 and "method must be one of" in found["error"] and not out.exists()
