"""The autoencoder: a picture becomes a latent, eight times smaller on each side, and back.

Module names are those of the published SD 1.x files, so that they load with strict=True.

Shapes:  b batch · c channels · h w of a feature map · f picture pixels a latent pixel, 8 in SD 1.x
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention
from .unet import ResnetBlock, named

EPS = 1e-6  # of every norm here; the UNet's resnets use 1e-5: as trained


class SelfAttention(Attention):
    """Every pixel looks at every pixel, with a single head."""

    def __init__(self, c: int, groups: int):
        super().__init__(c, c, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, c, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        pixels = self.group_norm(x).permute(0, 2, 3, 1)  # b h w c
        return x + super().forward(pixels).permute(0, 3, 1, 2)


class MidBlock(nn.Module):
    """Resnet, attention, resnet, at the coarsest resolution."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, c, groups, None, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([SelfAttention(c, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Resnets at one resolution, then a change of resolution, except at the last level."""

    def __init__(
        self, c_in: int, c: int, n: int, groups: int, down: bool = False, up: bool = False
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c if i else c_in, c, groups, None, EPS) for i in range(n)
        )
        pad = nn.ZeroPad2d((0, 1, 0, 1))  # only right and bottom: as trained
        halve = named(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2))
        double = named(grow=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c, c, 3, padding=1))
        self.downsamplers = nn.ModuleList([halve] if down else [])
        self.upsamplers = nn.ModuleList([double] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


class Encoder(nn.Module):
    """Turn an image into the mean and log-variance of its latent, before the scaling."""

    def __init__(self, channels: Sequence[int], layers: int, latent_channels: int, groups: int):
        super().__init__()
        c, last = channels[0], len(channels) - 1
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            self.down_blocks.append(Level(c, width, layers, groups, down=level < last))
            c = width
        self.mid_block = MidBlock(c, groups)
        self.conv_norm_out = nn.GroupNorm(groups, c, eps=EPS)
        self.conv_out = nn.Conv2d(c, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Turn a latent, without its scaling, into an image."""

    def __init__(self, channels: Sequence[int], layers: int, latent_channels: int, groups: int):
        super().__init__()
        c = channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, c, 3, padding=1)
        self.mid_block = MidBlock(c, groups)
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            self.up_blocks.append(Level(c, width, layers + 1, groups, up=level > 0))
            c = width
        self.conv_norm_out = nn.GroupNorm(groups, c, eps=EPS)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Encoder and decoder (Rombach et al. 2022, section 3.1), SD 1.x by default.

    Latents outside this class are scaled to about unit variance: × 0.18215 in SD 1.x.
    """

    def __init__(
        self,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
    ):
        super().__init__()
        sizes = (block_out_channels, layers_per_block, latent_channels, norm_num_groups)
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.scaling_factor = scaling_factor
        self.f = 2 ** (len(block_out_channels) - 1)  # pixels per latent pixel, on each side

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents, b 4 h w, to images from -1 to 1 or a little beyond. → b 3 f·h f·w"""
        return self.decoder(self.post_quant_conv(latents / self.scaling_factor))

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images, b 3 f·h f·w from -1 to 1, as latents. → b 4 h w

        A latent is the mean of the posterior; with a `generator`, a sample (Kingma & Welling 2014,
        eq. 9).
        """
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(
                mean.shape, generator=generator, dtype=torch.float32, device=generator.device
            ).to(mean)
            mean = mean + (log_variance.clamp(-30, 20) / 2).exp() * noise
        return mean * self.scaling_factor


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn decoded pixels into RGB images. pixels: b 3 h w, from -1 to 1 and clamped to it"""
    pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels.permute(0, 2, 3, 1).cpu()]
