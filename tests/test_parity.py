"""The UNet, the VAE, the schedulers and whole runs against diffusers', on random weights."""

import copy
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from helpers import difference, noise
from torch import Tensor

import minip2p
from minip2p import text
from minip2p.unet import UNet
from minip2p.vae import VAE

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SD_SCHEDULE = SD_BETAS | dict(steps_offset=1, set_alpha_to_one=False)
PROMPTS = ["a photo of a cat", "a painting of a squirrel eating a burger"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def error(ours: Tensor, truth: Tensor) -> float:
    """Return the relative error in float64, of tensors on any device."""
    ours, truth = ours.double().cpu(), truth.double().cpu()
    assert ours.shape == truth.shape
    return difference(ours, truth)


def unet_pair(widths: tuple[int, ...], layers: int, context: int):
    """diffusers' UNet and ours, with the same weights in the same memory."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=widths,
        layers_per_block=layers,
        cross_attention_dim=context,
        attention_head_dim=8,
        down_block_types=["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(widths) - 1),
    ).eval()
    with torch.device("meta"):
        ours = UNet(widths, layers, context, heads=8)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return theirs, ours.eval()


def vae_pair(widths: tuple[int, ...], layers: int):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
    ).eval()
    with torch.device("meta"):
        ours = VAE(widths, layers)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return theirs, ours.eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(16, 24), (15, 18)], ids=str)
@pytest.mark.parametrize("widths, layers", [((32, 64, 128, 128), 2), ((64, 96, 128), 1)], ids=str)
def test_unet(widths, layers, size, device):
    theirs, ours = unet_pair(widths, layers, 48)
    theirs, ours = theirs.to(device), ours.to(device)
    x, context = torch.randn(2, 4, *size, device=device), torch.randn(2, 77, 48, device=device)
    for t in (1, 501, torch.tensor([3, 999], device=device)):
        assert error(ours(x, t, context), theirs(x, t, context).sample) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("widths, layers", [((32, 64, 64, 64), 2), ((32, 64), 1)], ids=str)
def test_vae(widths, layers, device):
    theirs, ours = (model.to(device) for model in vae_pair(widths, layers))
    z = torch.randn(2, 4, 8, 12, device=device)
    image = theirs.decode(z).sample
    assert error(ours.decode(z * 0.18215), image) < 1e-5
    assert image.shape[2:] == (8 * ours.f, 12 * ours.f)

    posterior = theirs.encode(image).latent_dist
    assert error(ours.encode(image) / 0.18215, posterior.mean) < 1e-5
    sample = ours.encode(image, torch.Generator().manual_seed(5)) / 0.18215
    drawn = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    assert error(sample, posterior.mean + posterior.std * drawn.to(device)) < 1e-5


def text_pair(**sizes: int):
    """transformers' text encoder and ours, with the same weights in the same memory."""
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(vocab_size=49408, hidden_act="quick_gelu", **sizes)
    theirs = transformers.CLIPTextModel(config).eval()
    for parameter in theirs.parameters():  # norms begin as ones, biases as zeros
        parameter += 0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    with torch.device("meta"):
        ours = text.TextEncoder(**{name: getattr(config, name) for name in names})
    # transformers has the prefix up to 5.5
    state = {k.removeprefix("text_model."): t for k, t in theirs.state_dict().items()}
    assert list(state) == list(ours.state_dict())  # in this order: a model's identity keeps it
    ours.load_state_dict(state, strict=True, assign=True)
    return theirs, ours.eval()


TEXT_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
FULL_TEXT_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "sizes", [TEXT_SIZES, pytest.param(FULL_TEXT_SIZES, marks=pytest.mark.slow)], ids=["", "full"]
)
def test_text_encoder(clip_tokenizer, sizes, device):
    """In half precision: the mean error against the float32 output is no larger than theirs."""
    theirs, ours = (module.to(device) for module in text_pair(**sizes))
    prompts = [text.tokenize(clip_tokenizer, p) for p in (*PROMPTS, "", "word " * 75, "日本 🐱")]
    ids = torch.tensor([prompt.ids for prompt in prompts], device=device)
    truth = theirs(ids).last_hidden_state
    assert error(ours(ids), truth) < 1e-6
    assert error(text.encode(ours, prompts), truth) < 1e-6
    for dtype in (torch.float16, torch.bfloat16):
        theirs_half, ours_half = (copy.deepcopy(module).to(dtype) for module in (theirs, ours))
        theirs_error = error(theirs_half(ids[3:]).last_hidden_state, truth[3:])
        assert error(ours_half(ids[3:]), truth[3:]) <= 1.05 * theirs_error < 0.02


@pytest.mark.slow
def test_full_size_unet_and_decoder():
    theirs, ours = unet_pair((320, 640, 1280, 1280), 2, 768)
    x, context = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768)
    assert error(ours(x, 481, context), theirs(x, 481, context).sample) < 1e-5
    assert (
        len({m.layer.name for m in ours.modules() if isinstance(m, minip2p.attention.Attention)})
        == 32
    )
    del theirs, ours
    theirs, ours = vae_pair((128, 256, 512, 512), 2)
    z = torch.randn(1, 4, 32, 32)
    assert error(ours.decode(z * 0.18215), theirs.decode(z).sample) < 1e-5


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_good_as_diffusers(dtype, device):
    """Mean error against the float32 forward, over several inputs."""
    truth_unet = unet_pair((32, 64, 128, 128), 2, 48)[0].to(device)
    theirs_half, ours_half = (m.to(device, dtype) for m in unet_pair((32, 64, 128, 128), 2, 48))
    errors = {"theirs": 0.0, "ours": 0.0}
    for t in (1, 251, 501, 751):
        x, context = torch.randn(2, 4, 16, 16, device=device), torch.randn(2, 77, 48, device=device)
        truth = truth_unet(x, t, context).sample
        half = x.to(dtype), t, context.to(dtype)
        errors["theirs"] += error(theirs_half(*half).sample, truth) / 4
        errors["ours"] += error(ours_half(*half), truth) / 4
    print(errors)
    assert errors["ours"] <= 1.1 * errors["theirs"]


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 30, 50, 999])
def test_inverse_step_is_that_of_diffusers(steps):
    """With SD's own offset and last alpha, which diffusers' inverse scheduler has to be told: its
    defaults are timesteps 0, 20, ... 980 and a last alpha of 1."""
    settings = {"clip_sample": False, "prediction_type": "epsilon", **SD_SCHEDULE}
    theirs = diffusers.DDIMInverseScheduler(**settings)
    theirs.set_timesteps(steps)
    ours = minip2p.DDIM(steps)
    assert ours.timesteps[::-1] == theirs.timesteps.tolist()
    rng = torch.Generator().manual_seed(2)
    x = y = torch.randn(1, 4, 8, 8, generator=rng)
    for t in reversed(ours.timesteps):
        e = torch.randn(1, 4, 8, 8, generator=rng)
        x, y = theirs.step(e, t, x).prev_sample, ours.inverse_step(e, t, y)
        assert error(y, x) < 1e-5, t


def test_eta_draws_the_same_noise_for_every_image():
    ddim = minip2p.DDIM(10, eta=1.0, generator=torch.Generator().manual_seed(3))
    x = torch.randn(1, 4, 8, 8).expand(3, -1, -1, -1)
    out = ddim.step(torch.zeros_like(x), ddim.timesteps[0], x)
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "scheduler, steps, size, negative, guidance",
    [
        pytest.param("pndm", 30, (64, 64), "", 7.5, marks=pytest.mark.slow),
        ("ddim", 3, (64, 128), "blurry", 3.0),
        ("pndm", 4, (128, 64), "blurry", 12.0),
        ("pndm", 4, (64, 64), "", 1.0),
    ],
)
def test_run_equals_the_diffusers_pipeline(
    layouts, scheduler, steps, size, negative, guidance, device
):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(layouts["diffusers"]).to(device)
    pipe.set_progress_bar_config(disable=True)
    if scheduler == "ddim":
        pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, **SD_SCHEDULE)
    model = minip2p.load(layouts["diffusers"], device=device)
    height, width = size
    latents = noise(height // 8, width // 8, seed=7).expand(2, -1, -1, -1)
    ours = minip2p.generate(
        model,
        PROMPTS,
        num_inference_steps=steps,
        scheduler=scheduler,
        guidance_scale=guidance,
        negative_prompt=negative,
        height=height,
        width=width,
        seed=7,
    )
    settings = dict(
        prompt=PROMPTS,
        negative_prompt=[negative] * 2,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        latents=latents.to(device),
    )
    theirs = pipe(output_type="latent", **settings).images
    assert error(ours.latents, theirs) < 1e-4
    pixels = pipe(output_type="pt", **settings).images  # in [0, 1]
    theirs_images = minip2p.vae.to_images(pixels * 2 - 1)
    for image, other in zip(ours.images, theirs_images, strict=True):
        a, b = (torch.tensor(np.asarray(i)).int() for i in (image, other))
        assert (a - b).abs().max() <= 1


def test_golden_picture_of_the_bundled_model(model):
    """Seeded latents of the bundled model, averaged to 4 x 4, as the second edition made them."""
    golden = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())
    for case in golden:
        result = minip2p.generate(
            model,
            case["prompts"],
            edit=case["edit"],
            num_inference_steps=case["steps"],
            seed=case["seed"],
            decode=False,
        )
        small = torch.nn.functional.adaptive_avg_pool2d(result.latents, 4).flatten()
        assert error(small, torch.tensor(case["latents"])) < 1e-5, case["prompts"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 1e-3), (torch.float16, 5e-2), (torch.bfloat16, 2e-1)], ids=str
)
def test_edits_on_a_gpu_are_those_of_the_cpu(dtype, limit):
    prompts = ["a photo of a cat riding a car", "a photo of a dog riding a car"]
    blend = minip2p.LocalBlend("cat")
    edit = minip2p.WordSwap({"default_": 0.8, "dog": 0.5}, 0.5, local_blend=blend)
    latents = [
        minip2p.generate(
            minip2p.load(device=device, dtype=kind), prompts, edit=edit, num_inference_steps=8
        ).latents
        for device, kind in (("cpu", torch.float32), ("cuda", dtype))
    ]
    assert error(latents[1], latents[0]) < limit
