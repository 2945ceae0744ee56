"""The recipes of docs/recipes.md against their papers' formulas, written out on diffusers' modules.

Every model has random weights. A recipe's definitions are executed as they stand in the page.
"""

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import reference
import torch
from diffusers.models import attention_processor
from helpers import difference
from PIL import Image
from torch.nn import functional as F

import minip2p
from minip2p import text

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
PROMPTS = ["a photo of a cat riding a bicycle", "a photo of a panda riding a car"]
LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
GUIDANCE, CALLS = 4.0, 6


@pytest.fixture(scope="module")
def recipes() -> SimpleNamespace:
    """Execute the page's imports and definitions, and nothing that makes a picture."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    namespace: dict = {"__name__": "recipes"}
    for block in blocks:
        if re.match(r"import |class |def |@dataclass", block):
            exec(compile(block.partition("\nmodel = ")[0], str(PAGE), "exec"), namespace)
    return SimpleNamespace(**namespace)


def sharpened(unet):
    """Scale queries and outputs, so that a toy's attention is not the same everywhere."""
    for name, parameter in unet.requires_grad_(False).named_parameters():
        if name.endswith(("to_q.weight", "to_out.0.weight")):
            parameter *= 4
    return unet


@pytest.fixture(scope="module")
def model(toy) -> minip2p.StableDiffusion:
    return replace(toy, unet=sharpened(deepcopy(toy.unet)))


@pytest.fixture(scope="module")
def truth(toy_folder) -> reference.Model:
    """Load the same model as diffusers reads it."""
    truth = reference.load(toy_folder)
    sharpened(truth.unet)
    truth.text_encoder.requires_grad_(False)
    return truth


def definition(name: str) -> str:
    """Return the block of the page that begins with the definition of `name`."""
    page = PAGE.read_text("utf-8")
    return re.search(
        rf"^```python\n((?:@dataclass.*\n)?(?:class|def) {name}\b.*?)^```$", page, re.M | re.S
    )[1]


class WrittenOut:
    """A diffusers attention processor that keeps or changes queries, keys, values and maps."""

    def __init__(self, name, change=lambda name, q, k, v: (q, k, v), maps=None):
        self.name, self.change, self.maps = name, change, maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        q, k, v = self.change(self.name, q, k, v)
        probs = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        if self.maps is not None and "attn2" in self.name:
            self.maps[self.name] = probs
        return attn.to_out[0]((probs @ v).transpose(1, 2).flatten(2))


def set_processors(unet, **options) -> None:
    unet.set_attn_processor({name: WrittenOut(name, **options) for name in unet.attn_processors})


@torch.no_grad()
def run(truth, contexts, latents, before=lambda call, t, x: None, calls=CALLS) -> torch.Tensor:
    """Sample with DDIM and guidance. contexts: 2 b 77 d, or as many for each call."""
    schedule = reference.make_scheduler("ddim")
    schedule.set_timesteps(calls)
    x = latents
    for call, t in enumerate(schedule.timesteps):
        moved = before(call, t, x)
        x = x if moved is None else moved
        context = contexts[call] if isinstance(contexts, list) else contexts
        eps_uncond, eps = truth.unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = schedule.step(eps_uncond + GUIDANCE * (eps - eps_uncond), t, x).prev_sample
    return x


def ours(model, prompts=PROMPTS, latents=LATENTS, **options) -> torch.Tensor:
    options = {"guidance_scale": GUIDANCE, "num_inference_steps": CALLS, **options}
    return minip2p.generate(model, prompts, latents=latents, decode=False, **options).latents


def test_mutual_self_attention(recipes, model, truth):
    calls = []

    def change(name, q, k, v):  # the authors': rows (uncond source, uncond, source, edit)
        if "attn1" in name and name.startswith("up") and calls[-1] >= 4:
            k, v = (t[[0, 0, 2, 2]] for t in (k, v))
        return q, k, v

    set_processors(truth.unet, change=change)
    context = truth.context(["", "", *PROMPTS])
    theirs = run(truth, context, LATENTS, lambda call, t, x: calls.append(call))
    latents = ours(model, hooks=[recipes.MutualSelfAttention()])
    assert difference(latents, theirs) < 1e-5
    assert torch.equal(latents[0], ours(model)[0])  # the source is left alone
    assert difference(latents[1], ours(model)[1]) > 1e-3
    assert len(definition("MutualSelfAttention").splitlines()) <= 15


def coarse_maps(truth, x, t, context) -> torch.Tensor:
    """Return the mean coarse cross-attention maps, b h w k, of the UNet on its own."""
    maps: dict = {}
    set_processors(truth.unet, maps=maps)
    truth.unet(x, t, context)
    return (
        torch.stack([m.mean(1) for m in maps.values() if m.shape[2] == 256])
        .mean(0)
        .unflatten(1, (16, 16))
    )


def test_gradient_of_a_words_map(recipes, model, truth):
    x = LATENTS[:1].clone().requires_grad_()
    maps = coarse_maps(truth, x, 500, truth.context(PROMPTS[:1]))
    (theirs,) = torch.autograd.grad(maps[..., 5].max(), x)  # "cat"
    gradient = recipes.word_gradient(model, PROMPTS[0], "cat", LATENTS[:1], 500)
    assert difference(gradient, theirs) < 1e-5
    assert len(definition("word_maps").replace("\n\n", "\n").splitlines()) <= 15


def test_attend_and_excite(recipes, model, truth):
    """Chefer et al. 2023, equations 1 and 2, with their smoothing and step sizes."""
    words = [5, 8]  # "cat", "bicycle"
    steps = torch.linspace(1.0, 0.5, CALLS).sqrt() * 20
    grid = torch.arange(3.0) - 1
    kernel = torch.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 0.5**2))

    @torch.enable_grad()
    def before(call, t, x):
        if call >= CALLS / 2:
            set_processors(truth.unet)
            return x
        z = x.clone().requires_grad_()
        maps = coarse_maps(truth, z, t, truth.context(PROMPTS[:1]))[0, :, :, 1:9]
        maps = (maps * 100).softmax(-1)
        largest = []
        for word in words:
            padded = F.pad(maps[None, None, :, :, word - 1], (1, 1, 1, 1), mode="reflect")
            largest.append(F.conv2d(padded, (kernel / kernel.sum())[None, None]).max())
        loss = max(1 - value for value in largest)
        return (z - steps[call] * torch.autograd.grad(loss, z)[0]).detach()

    theirs = run(truth, truth.context(["", PROMPTS[0]]), LATENTS[:1], before)
    hook = recipes.AttendAndExcite(model, ["cat", "bicycle"])
    latents = ours(model, PROMPTS[0], LATENTS[:1], hooks=[hook])
    assert difference(latents, theirs) < 1e-5
    assert difference(latents, ours(model, PROMPTS[0], LATENTS[:1])) > 1e-5


def test_cross_attention_guidance(recipes, model, truth):
    """Parmar et al. 2023, section 3.3: the source's maps are kept in a run of their own."""
    kept, context = [], truth.context(PROMPTS)

    def maps_of(x, t, context):
        maps: dict = {}
        set_processors(truth.unet, maps=maps)
        truth.unet(x, t, context)
        return dict(maps)  # the processors write to theirs again

    @torch.enable_grad()
    def before(call, t, x):
        z = x.clone().requires_grad_()
        loss = 0
        for name, map_ in maps_of(z, t, context[1:]).items():
            loss = loss + ((map_[0] - kept[call][name][0]) ** 2).sum((1, 2)).mean(0)
        return (z - 0.1 * torch.autograd.grad(loss, z)[0]).detach()

    empty = truth.context([""])
    keep = lambda call, t, x: kept.append(maps_of(x, t, context[:1])) or x  # noqa: E731
    source = run(truth, torch.cat([empty, context[:1]]), LATENTS[:1], keep)
    edit = run(truth, torch.cat([empty, context[1:]]), LATENTS[1:], before)
    latents = ours(model, hooks=[recipes.CrossAttentionGuidance(model)])
    assert difference(latents, torch.cat([source, edit])) < 1e-5
    assert difference(latents[1], ours(model)[1]) > 1e-5


def test_perturbed_attention_guidance(recipes, model, truth):
    """Ahn et al. 2024, equation 16, by diffusers' own attention processor."""
    usual = attention_processor.AttnProcessor2_0()
    identity = attention_processor.PAGIdentitySelfAttnProcessor2_0()
    for name, module in truth.unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            is_perturbed = name.startswith("mid") and name.endswith("attn1")
            module.set_processor(identity if is_perturbed else usual)
    schedule = reference.make_scheduler("ddim")
    schedule.set_timesteps(CALLS)
    x, context = LATENTS[:1], truth.context([PROMPTS[0]] * 2)
    with torch.no_grad():
        for t in schedule.timesteps:
            eps, perturbed = truth.unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = schedule.step(eps + 3 * (eps - perturbed), t, x).prev_sample
    prompt = PROMPTS[0]
    options = {"negative_prompt": prompt, "hooks": [recipes.Perturbed()]}
    latents = ours(model, prompt, LATENTS[:1], guidance_scale=4, **options)
    assert difference(latents, x) < 1e-5


def test_null_text_inversion(recipes, model, truth):
    """Mokady et al. 2023, algorithm 1, in float64: Adam turns rounding into whole steps."""
    unet, cond = deepcopy(truth.unet).double(), truth.context([PROMPTS[0]]).double()
    set_processors(unet)
    picture = Image.new("RGB", (128, 128), "orange")
    inversion = minip2p.invert(model, picture, PROMPTS[0], num_inference_steps=3, method="ddim")
    schedule = reference.make_scheduler("ddim")
    schedule.set_timesteps(3)
    x, uncond = inversion.trajectory[:1].double(), truth.context([""]).double()
    contexts = []
    for i, t in enumerate(schedule.timesteps):
        uncond = uncond.clone().detach().requires_grad_()
        optimizer = torch.optim.Adam([uncond], lr=1e-2 * (1.0 - i / 100.0))
        with torch.no_grad():
            eps = unet(x, t, cond).sample

        def step(uncond, x=x, t=t, eps=eps):
            eps_uncond = unet(x, t, uncond).sample
            return schedule.step(eps_uncond + GUIDANCE * (eps - eps_uncond), t, x).prev_sample

        for _ in range(10):
            loss = F.mse_loss(step(uncond), inversion.trajectory[i + 1 : i + 2].double())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < 1e-5 + i * 2e-5:
                break
        contexts.append(uncond.detach())
        with torch.no_grad():
            x = step(uncond)
    wide = replace(
        model,
        unet=deepcopy(model.unet).double(),
        text_encoder=deepcopy(model.text_encoder).double(),
    )
    inversion = replace(inversion, trajectory=inversion.trajectory.double())
    recipe = recipes.null_text(wide, inversion, GUIDANCE)
    assert difference(torch.cat(recipe), torch.cat(contexts)) < 1e-5
    assert difference(torch.cat(recipe), truth.context([""]).double().expand(3, -1, -1)) > 1e-3


def test_edit_context_acts_from_call_to_call(recipes, model, truth):
    """A context of every call's own, as in the run written out; an edit acts beside it."""
    contexts = [
        0.1 * torch.randn(1, 77, 128, generator=torch.Generator().manual_seed(i))
        for i in range(CALLS)
    ]
    context = truth.context(PROMPTS)
    set_processors(truth.unet)
    theirs = run(truth, [torch.cat([c, c, context]) for c in contexts], LATENTS)
    assert difference(ours(model, hooks=[recipes.NullText(contexts)]), theirs) < 1e-5
    swapped = ours(model, hooks=[recipes.NullText(contexts)], edit="auto")
    assert difference(swapped[:1], theirs[:1]) < 1e-5 and difference(swapped[1:], theirs[1:]) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_dpm_solver(recipes, model, steps):
    schedule = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        algorithm_type="dpmsolver++",
    )
    schedule.set_timesteps(steps)
    solver = recipes.DPMSolver2M(model.alpha_bars(), steps)
    assert solver.timesteps == schedule.timesteps.tolist()
    mine = theirs = LATENTS
    for t in solver.timesteps:
        eps = torch.sin(3 * mine + t), torch.sin(3 * theirs + t)
        mine, theirs = solver.step(eps[0], t, mine), schedule.step(eps[1], t, theirs).prev_sample
    assert difference(mine, theirs) < 1e-5


def test_alignment_by_hand(recipes, model):
    """The words that are named take over a map, the others keep their own."""
    edit = recipes.ByHand(1.0, 0.0, pairs={"panda": "cat"})
    source, target = (text.tokenize(model.tokenizer, prompt) for prompt in PROMPTS)
    alignment = edit.align(source, target)
    assert alignment.mapper.nonzero().tolist() == [
        [5, 5]
    ] and alignment.exists.nonzero().tolist() == [[5]]


def test_no_recipe_is_long():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert all(len([line for line in block.splitlines() if line]) <= 40 for block in blocks)
