"""Search inside other libraries' tokenizers: the same results, less memory, nothing left behind."""

import copy

import pytest
import torch
from torch import nn

from sage_diffusion.vq.hosts import HOSTS, search, searching_copy
from sage_diffusion.vq.memory import peak_memory
from sage_diffusion.vq.scores import LazyScores, Scores

CODES, DIM = 2048, 8


def diffusers_quantizer():
    from diffusers.models.autoencoders.vae import VectorQuantizer

    quantizer = VectorQuantizer(CODES, DIM, beta=0.25)
    nn.init.normal_(quantizer.embedding.weight)
    return quantizer, (2, DIM, 6, 6)


def emu3():
    from transformers import Emu3VQVAEConfig
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAEVectorQuantizer

    quantizer = Emu3VQVAEVectorQuantizer(Emu3VQVAEConfig(codebook_size=CODES, embed_dim=DIM))
    nn.init.normal_(quantizer.embedding.weight)
    return quantizer, (1, 2, DIM, 6, 6)


def janus():
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAEVectorQuantizer

    config = JanusVQVAEConfig(num_embeddings=CODES, embed_dim=DIM)
    return JanusVQVAEVectorQuantizer(config), (2, DIM, 6, 6)


def chameleon():
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEVectorQuantizer

    config = ChameleonVQVAEConfig(num_embeddings=CODES, embed_dim=DIM)
    return ChameleonVQVAEVectorQuantizer(config), (2, DIM, 6, 6)


def glm_image():
    from transformers.models.glm_image.configuration_glm_image import GlmImageVQVAEConfig
    from transformers.models.glm_image.modeling_glm_image import GlmImageVQVAEVectorQuantizer

    config = GlmImageVQVAEConfig(num_embeddings=CODES, embed_dim=DIM)
    return GlmImageVQVAEVectorQuantizer(config), (2, DIM, 6, 6)


def apertus():
    from transformers.models.apertus1p5 import modeling_apertus1p5 as apertus1p5

    config = apertus1p5.Apertus1p5VisionTokenizerConfig(codebook_size=CODES, embed_dim=DIM)
    return apertus1p5.Apertus1p5VisionTokenizerVectorQuantizer(config), (2, DIM, 6, 6)


def mimi():
    from transformers import MimiConfig
    from transformers.models.mimi.modeling_mimi import MimiEuclideanCodebook

    quantizer = MimiEuclideanCodebook(MimiConfig(codebook_size=CODES, codebook_dim=DIM))
    quantizer.embed_sum.normal_()
    quantizer.forward = quantizer.encode
    return quantizer, (2, 40, DIM)


def simvq():
    library = pytest.importorskip("vector_quantize_pytorch")
    return library.SimVQ(dim=DIM, codebook_size=CODES), (2, 40, DIM)


def library_codebook():
    library = pytest.importorskip("vector_quantize_pytorch")
    return library.VectorQuantize(dim=DIM, codebook_size=CODES).eval()._codebook, (2, 40, DIM)


MAKERS = [
    diffusers_quantizer,
    emu3,
    janus,
    chameleon,
    glm_image,
    apertus,
    mimi,
    simvq,
    library_codebook,
]


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result for x in tensors(part)] if isinstance(result, tuple) else []


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def host(request):
    torch.manual_seed(0)
    quantizer, shape = request.param()
    return quantizer, torch.randn(shape)


def test_the_same_results_and_nothing_left_behind(host):
    quantizer, x = host
    before, state = dict(vars(quantizer)), copy.deepcopy(quantizer.state_dict())
    want = tensors(quantizer(x))
    with search(quantizer) as searching:
        got = tensors(quantizer(x))
        measured = searching.measure(lambda: quantizer(x))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert measured.calls == 1 and measured.same_ids
    assert vars(quantizer).keys() == before.keys()
    assert vars(quantizer).get("forward") == before.get("forward")
    assert all(torch.equal(t, state[n]) for n, t in quantizer.state_dict().items())
    for a, b in zip(tensors(quantizer(x)), want, strict=True):
        assert torch.equal(a, b)


def test_every_host_has_a_case(host):
    quantizer, _ = host
    name = f"{type(quantizer).__module__}.{type(quantizer).__qualname__}"
    assert name in HOSTS and len(HOSTS) == len(MAKERS) + 1  # one is ComfyUI's


def test_latents_times_codes_are_never_written():
    """16 MiB of scores of a diffusers quantizer stay unwritten; its loss has the same gradient."""
    from diffusers.models.autoencoders.vae import VectorQuantizer

    quantizer = VectorQuantizer(16384, 4, beta=0.25)
    nn.init.normal_(quantizer.embedding.weight)
    x = torch.randn(1, 4, 64, 64, requires_grad=True)
    quantizer(x)[1].backward()
    want, x.grad = x.grad, None
    with search(quantizer) as searching:
        quantizer(x)[1].backward()
        measured = searching.measure(lambda: quantizer(x))
    assert torch.equal(x.grad, want)
    assert measured.before > 200 * 2**20 and measured.after < 12 * 2**20
    assert str(measured).startswith("peak memory of 1 quantizer calls: 2")


class TestVectorQuantize:
    """Of ``vector_quantize_pytorch``: the whole layer, its options, and its distances."""

    def layer(self, **options):
        library = pytest.importorskip("vector_quantize_pytorch")
        torch.manual_seed(0)
        return library.VectorQuantize(dim=8, codebook_size=4096, **options).eval()

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_cosine_sim": True},
            {"codebook_dim": 4, "heads": 2},
            {"codebook_dim": 4, "heads": 2, "separate_codebook_per_head": True},
            {"learnable_codebook": True, "ema_update": False},
            {"accept_image_fmap": True},
        ],
    )
    def test_the_same_outputs(self, options):
        layer = self.layer(**options)
        x = torch.randn((2, 8, 6, 5) if "accept_image_fmap" in options else (2, 30, 8))
        want = layer(x)
        with search(layer):
            got = layer(x)
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[0], want[0])
        for a, b in zip(layer(x), want, strict=True):
            assert torch.equal(a, b)

    def test_latents_times_codes_are_never_written(self):
        layer = self.layer()
        with search(layer) as searching:
            measured = searching.measure(lambda: layer(torch.randn(1, 1024, 8)))
        assert measured.same_ids and measured.calls == 1
        assert measured.before > 60 * 2**20 and measured.after < 8 * 2**20

    def test_distances_are_there_for_whoever_looks(self):
        codebook, x = self.layer()._codebook, torch.randn(2, 30, 8)
        want = codebook(x)[2]
        with search(codebook):
            got = codebook(x)[2]
            assert got.shape == want.shape == (1, 2, 30, 4096)
            assert torch.equal(got + 0, want)

    def test_training_is_the_librarys(self):
        layer, x = self.layer().train(), torch.randn(2, 30, 8)
        state = copy.deepcopy(layer.state_dict())
        want = layer(x)
        after = copy.deepcopy(layer.state_dict())
        layer.load_state_dict(state)
        with search(layer):
            got = layer(x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert all(torch.equal(t, after[n]) for n, t in layer.state_dict().items())


def test_inside_a_model():
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(block_out_channels=(32,), num_vq_embeddings=300).eval()
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        want = model(image).sample
        searching = search(model)
        assert searching.names == ("quantize",)
        assert torch.equal(model(image).sample, want)
        with pytest.raises(ValueError, match="quantize searches already"):
            search(model)
        with pytest.raises(ValueError, match="none was called"):
            searching.measure(lambda: None)
        searching.remove()
        searching.remove()
        assert torch.equal(model(image).sample, want)
    assert "forward" not in vars(model.quantize)


def test_a_model_without_quantizers():
    with pytest.raises(ValueError, match=r"VectorQuantizer, Emu3.*; found none in Linear"):
        search(nn.Linear(2, 2))


class TestScores:
    """Whatever is not known is computed with the real matrix."""

    z, table = torch.randn(5, 3), torch.randn(40, 3)

    def lazy(self, name, function):
        with LazyScores((name,)):
            made = function()
            assert isinstance(made, Scores)
            return made

    def test_unknown_functions(self):
        scores = self.lazy("cdist", lambda: torch.cdist(self.z, self.table))
        real = torch.cdist(self.z, self.table)
        assert torch.equal(torch.softmax(-scores, 1), torch.softmax(-real, 1))
        assert torch.equal(scores.topk(3).indices, real.topk(3).indices)
        assert torch.equal(scores[:, 2:4], real[:, 2:4])
        assert torch.equal(scores.argmax(1), real.argmax(1))
        assert torch.equal(scores.argmin(0), real.argmin(0))
        assert torch.equal(scores.argmin(1, keepdim=True), real.argmin(1, keepdim=True))
        assert scores.shape == (5, 40) and scores.dtype == torch.float32
        with pytest.raises(AttributeError):
            scores.no_such_thing  # noqa: B018

    def test_sums_and_signs(self):
        real = self.z @ self.table.t()
        scores = self.lazy("matmul", lambda: self.z @ self.table.t())
        row, column = torch.randn(5, 1), torch.randn(40)
        outer = self.lazy("add", lambda: row + column)
        assert torch.equal((outer - 2 * scores).argmin(1), (row + column - 2 * real).argmin(1))
        assert torch.equal((scores * -3).argmin(1), (real * -3).argmin(1))
        assert torch.equal((scores + outer).argmax(1), (real + (row + column)).argmax(1))
        assert torch.equal((scores - outer).argmax(1), (real - (row + column)).argmax(1))
        assert torch.equal((scores + 1).argmin(1), (real + 1).argmin(1))
        assert torch.equal((scores + scores).argmax(1), (real + real).argmax(1))
        assert torch.equal(outer.argmin(1), (row + column).argmin(1))

    def test_only_what_was_asked_for_is_lazy(self):
        with LazyScores(("cdist",)):
            assert isinstance(self.z @ self.table.t(), torch.Tensor)
            assert isinstance(torch.cdist(self.z, self.table, p=1.0), torch.Tensor)
            assert isinstance(torch.randn(3, 1) + torch.randn(4), torch.Tensor)
            batched = torch.cdist(self.z.expand(2, 5, 3), self.table.expand(2, 40, 3))
            assert isinstance(batched, torch.Tensor)


def test_peak_memory():
    kept = torch.zeros(1000)

    def run():
        a = torch.ones(1000)
        b = a + 1
        del a
        return kept.view(-1), b * 2

    result, peak = peak_memory(run)
    assert peak == 2 * 4000 and torch.equal(result[1], torch.full((1000,), 4.0))


class TestCopies:
    """``searching_copy``: for models that others hold too."""

    def model(self):
        pytest.importorskip("vector_quantize_pytorch")
        from vector_quantize_pytorch import SimVQ

        torch.manual_seed(0)
        holder = nn.ModuleDict(
            {"inner": nn.ModuleDict({"quantizer": SimVQ(8, 60)}), "other": nn.Linear(8, 8)}
        )
        return holder.eval().requires_grad_(False)

    def test_the_given_model_stays_and_weights_are_shared(self):
        model, seen = self.model(), []
        made, names = searching_copy(model, seen.append)
        assert names == ("inner.quantizer",) and made["other"] is model["other"]
        assert made["inner"]["quantizer"] is not model["inner"]["quantizer"]
        assert "forward" not in vars(model["inner"]["quantizer"])
        pairs = zip(made.state_dict().values(), model.state_dict().values(), strict=True)
        assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
        x = torch.randn(1, 40, 8)
        for _ in range(2):
            got, want = (m["inner"]["quantizer"](x) for m in (made, model))
            assert torch.equal(got[1], want[1])
        assert [(found.calls, found.same_ids) for found in seen] == [(1, True)]
        assert seen[0].after < seen[0].before

    def test_an_object_that_holds_models(self):
        class Pipeline:
            pass

        pipe = Pipeline()
        pipe.name, pipe.vqvae, pipe.unet = "a", self.model(), nn.Linear(2, 2)
        made, names = searching_copy(pipe)
        assert names == ("vqvae.inner.quantizer",)
        assert made.vqvae is not pipe.vqvae and made.unet is pipe.unet
        for nothing in (3, torch.zeros(2), nn.Linear(2, 2), Pipeline()):
            with pytest.raises(ValueError, match="must hold a quantizer of"):
                searching_copy(nothing)
