"""world/train.py: an interrupted run goes on as if nothing had been, and what it writes loads."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

import minip2p
from minip2p import Layer
from minip2p.weights.clip import load_tokenizer
from world import model_folder, optimize, train, vocabulary
from world.scenes import FULL, SMALL, sample

TINY = replace(
    model_folder.PRESETS["small"],
    scenes=24,
    vae_channels=(8, 8, 16, 16),
    vae_samples=8,
    vae_batch=4,
    channels=(32, 32, 32, 32),
    samples=8,
    batch=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Train a model for two steps of each stage, by the code that made the bundled one."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "UNSEEN", 8)
        train.prepare(TINY, out)
        train.run(0, TINY, out, count=1, port=0)
        yield out


class Interrupted(Exception):
    pass


def line(
    steps: int, work: Path, fail_at: int | None = None, nan_at: int | None = None
) -> tuple[nn.Module, list[float]]:
    """Fit a line, and return it and the loss of every step; one may raise Interrupted or be nan."""
    torch.manual_seed(0)
    module, losses = nn.Linear(3, 1), []

    def draw(generator: torch.Generator, progress: float) -> list[torch.Tensor]:
        return [torch.randn(8, 3, generator=generator)]

    def loss(x: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(losses) == fail_at:
            raise Interrupted
        value = ((module(x) - x.sum(dim=1, keepdim=True)) ** 2).mean()
        value = value * torch.nan if len(losses) == nan_at else value
        losses.append(value.item())
        return {"loss": value}

    stage = optimize.Stage(
        "line", nn.ModuleDict({"line": module}), draw, loss, lambda: {}, steps * 8, 8, rate=0.2
    )
    optimize.fit(stage, work, minutes=0)
    return module, losses


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, losses = line(100, tmp_path / "whole")
    with pytest.raises(Interrupted):
        line(100, tmp_path / "parts", fail_at=57)
    parts, rest = line(100, tmp_path / "parts")
    assert rest == losses[40:]  # the last checkpoint is that of step 40
    assert torch.equal(parts.weight, whole.weight)
    assert losses[-1] < losses[0] / 10


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    """The run ends before the next checkpoint replaces the last."""
    with pytest.raises(FloatingPointError, match=r"nan at step 30 of 100.*lower rate than 0.2"):
        line(100, tmp_path, nan_at=30)
    saved = torch.load(tmp_path / "line.pt", weights_only=True)
    assert saved["step"] == 20 and saved["modules"]["line.weight"].isfinite().all()


@pytest.mark.gpu
def test_a_recorded_step_is_the_step_itself(tmp_path):
    weights = []
    for recorded in (False, True):
        torch.manual_seed(0)
        module, work = nn.Linear(3, 1).cuda(), tmp_path / str(recorded)
        weights.append(module.weight.detach().cpu().clone())
        work.mkdir()

        def draw(generator: torch.Generator, progress: float) -> list[torch.Tensor]:
            return [torch.randn(8, 3, generator=generator)]

        def loss(x: torch.Tensor, module: nn.Module = module) -> dict[str, torch.Tensor]:
            return {"loss": ((module(x) - x.sum(dim=1, keepdim=True)) ** 2).mean()}

        modules = nn.ModuleDict({"line": module})
        stage = optimize.Stage(
            "line", modules, draw, loss, lambda: {}, 800, 8, 0.2, recorded=recorded
        )
        optimize.fit(stage, work, minutes=0)
        weights.append(module.weight.detach().cpu())
    first, plain, _, recorded = weights
    assert torch.allclose(plain, recorded, atol=1e-5)
    assert (plain - 1).norm() < (first - 1).norm() / 2


def test_the_average_is_kept_not_the_last_weights(tmp_path):
    module, _ = line(60, tmp_path)
    saved = torch.load(tmp_path / "line.pt", weights_only=True)
    assert torch.equal(module.weight, saved["average"][0])
    assert not torch.equal(module.weight, saved["modules"]["line.weight"])


@pytest.mark.parametrize("shape", [(3, 20, 48), (2, 48, 20)], ids=str)
def test_muons_direction_is_the_nearest_orthogonal_matrix(shape):
    """Newton-Schulz, five steps, against the singular value decomposition."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    direction = optimize.orthogonal(x)
    sizes = torch.linalg.svdvals(direction)
    assert sizes.min() > 0.5 and sizes.max() < 1.3  # 1, roughly: that is all five steps do
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert torch.cosine_similarity(direction.flatten(1), (u @ v).flatten(1)).min() > 0.97


def test_muon_steps_are_as_long_as_adamws_and_fit_a_kernel():
    """The root of the mean square of a step is about 0.2 of the rate, whatever the shape."""
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((24, 40), (40, 24, 3, 3), (24, 40))]
    rng = torch.Generator().manual_seed(0)
    for p in weights:
        p.grad = torch.randn(p.shape, generator=rng) * 1e-3  # its size does not matter
    optimize.Muon(weights, lr=0.1).step()
    for p in weights:
        assert p.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.3)
        assert (p * p.grad).sum() < 0


def test_what_is_looked_up_is_left_to_adamw():
    modules = nn.ModuleDict(
        {"text": train.make_text_encoder(TINY, 50), "vae": train.make_vae(TINY)}
    )
    stage = optimize.Stage("both", modules, lambda *_: [], lambda: {}, lambda: {}, 1, 1, 1e-3)
    muon, adamw = (
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in optimize.make_optimizers(stage)
    )
    for name, p in modules.named_parameters():
        assert id(p) in (muon if p.ndim > 1 and "embeddings" not in name else adamw), name
    assert len(muon) + len(adamw) == len(list(modules.parameters()))


@pytest.mark.slow
def test_a_trained_folder_loads_here_and_in_diffusers(folder):
    model = minip2p.load(folder)
    assert model.vocabulary == tuple(SMALL.words)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    prompt = "a squirrel eating a burger"
    theirs = pipeline(
        prompt,
        latents=latents,
        num_inference_steps=4,
        guidance_scale=4.0,
        height=128,
        width=128,
        output_type="latent",
    ).images
    ours = minip2p.generate(model, prompt, latents=latents, num_inference_steps=4).latents
    assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow
def test_training_again_changes_nothing(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    train.run(0, TINY, folder, count=1, port=0)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_word_maps_are_pulled_towards_the_masks():
    """Gradient descent on nothing but the maps' loss brings a word's map to its mask."""
    torch.manual_seed(0)
    scores = torch.zeros(1, 1, 256, 77, requires_grad=True)  # b i q k
    columns = torch.zeros(1, 77, 1)
    columns[0, 5] = 1
    masks = torch.zeros(1, 1, 16, 16)
    masks[..., 4:9, 3:12] = 1
    for _ in range(60):
        words = train.WordMaps(columns)
        words(scores.softmax(dim=-1), Layer("", "up", True, 16, 16))
        words.loss(masks, torch.ones(1, 1)).backward()
        with torch.no_grad():
            scores -= 300 * scores.grad
        scores.grad = None
    map_of_the_word = scores.detach().softmax(dim=-1)[0, 0, :, 5].view(16, 16)
    assert map_of_the_word[masks[0, 0] == 1].min() > 0.5
    assert map_of_the_word[masks[0, 0] == 0].max() < 0.05


def test_a_map_that_is_all_one_word_has_a_finite_loss():
    """In bfloat16 1 - 1e-4 is 1, and the logarithm of what is left of it is infinite."""
    columns = torch.zeros(1, 77, 1, dtype=torch.bfloat16)
    columns[0, 5] = 1
    probs = torch.zeros(1, 1, 256, 77, dtype=torch.bfloat16)
    probs[..., 5] = 1
    words = train.WordMaps(columns)
    words(probs.requires_grad_(), Layer("", "up", True, 16, 16))
    loss = words.loss(torch.zeros(1, 1, 16, 16), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(-torch.tensor(1e-4).log().item(), rel=1e-2)
    assert probs.grad.isfinite().all()


def test_word_maps_are_left_to_themselves_at_the_end():
    def weights(until: float) -> list[float]:
        preset = replace(TINY, supervise=0.2, supervise_until=until)
        return [train.supervision(preset, progress) for progress in (0, 0.25, 0.5, 0.75, 1)]

    assert weights(1.0) == pytest.approx([0.2, 0.2, 0.2, 0.15, 0])  # as it always was
    assert weights(0.5) == pytest.approx([0.2, 0.15, 0, 0, 0])
    assert weights(1 / 3) == pytest.approx([0.2, 0.05, 0, 0, 0])


def test_crops_are_squares_of_the_pictures():
    """Each pixel holds where it is: what is cut out goes on without a gap, from anywhere."""
    places = torch.arange(32)
    picture = torch.stack(torch.broadcast_tensors(places[:, None], places, torch.tensor(7)), dim=-1)
    pictures = picture.expand(5, 32, 32, 3).to(torch.uint8).numpy()
    data = train.Data([sample(SMALL, seed) for seed in range(5)], pictures, pictures)
    crops = data.crops(200, 8, torch.Generator().manual_seed(0))
    rows, columns, blue = ((crops + 1) * 127.5).round().unbind(dim=1)
    assert crops.shape == (200, 3, 8, 8) and (blue == 7).all()
    assert (rows.diff(dim=1) == 1).all() and (rows.diff(dim=2) == 0).all()
    assert (columns.diff(dim=2) == 1).all() and (columns.diff(dim=1) == 0).all()
    corners = rows[:, 0, 0], columns[:, 0, 0]
    assert all(c.min() == 0 and c.max() == 24 for c in corners)


@pytest.mark.parametrize("world", [FULL, SMALL], ids=lambda world: world.name)
@pytest.mark.slow
def test_every_word_is_as_many_tokens_as_it_should_be(world, folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert len(tokenizer) == len(json.loads((folder / "tokenizer" / "vocab.json").read_text()))
    for word in [*world.words, *vocabulary.OTHERS]:
        pieces = vocabulary.PIECES.get(word, [word])
        tokens = tokenizer.bpe.encode(word, add_special_tokens=False).tokens
        assert tokens == [*pieces[:-1], pieces[-1] + "</w>"]


@pytest.mark.slow
def test_columns_are_those_of_the_words(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    scenes = [sample(SMALL, seed) for seed in range(200)]
    masks = torch.zeros(len(scenes), 2, 16, 16, dtype=torch.uint8).numpy()
    captions = train.Captions.of(train.Data(scenes, masks, masks), tokenizer)
    for scene, ids, columns in zip(scenes, captions.ids, captions.columns, strict=True):
        place = scene.place.split()[-1:]  # a place is its noun
        for i, word in enumerate([scene.subject, scene.object, *(place or [""])]):
            tokens = map(tokenizer.bpe.id_to_token, ids[columns[:, i] == 1].tolist())
            assert "".join(tokens).removesuffix("</w>") == word
