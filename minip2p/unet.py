"""The denoiser: a U-Net that reads a noisy latent, a timestep and a prompt, and predicts the noise.

Module names are the names in the published SD 1.x checkpoint, so load_state_dict(strict=True) needs
no key map, and `down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k` is a path you can type.

Shapes:  b batch · c channels · h w height and width of a feature map · d width of a token
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, CachedContext, Hook, Layer, Size

Context = Tensor | CachedContext


class Dims(NamedTuple):
    """The sizes that every block of one UNet shares."""

    time: int  # width of the time embedding
    context: int  # width of a word
    heads: int
    groups: int  # of each GroupNorm


def timestep_embedding(t: Tensor, d: int) -> Tensor:
    """Compute sinusoids of geometrically spaced frequencies, cosines first. t: b → b d"""
    freqs = torch.exp(
        -math.log(10000) * torch.arange(d // 2, dtype=torch.float32, device=t.device) / (d // 2)
    )
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def named(**modules: nn.Module) -> nn.Sequential:
    """Run modules one after the other, under the names of their keys in the checkpoint."""
    return nn.Sequential(OrderedDict(modules))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a skip; the UNet adds the timestep in the middle.

    d_time: width of the time embedding, None in the VAE. eps: of the norms, as trained: 1e-5 in
    the UNet, 1e-6 in the VAE.
    """

    def __init__(self, c_in: int, c_out: int, groups: int, d_time: int | None, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if d_time is not None:
            self.time_emb_proj = nn.Linear(d_time, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Add a residual to x. x: b c_in h w, temb: b d_time → b c_out h w"""
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class GEGLU(nn.Module):
    """A linear layer whose second half opens and closes the first (Shazeer 2020)."""

    def __init__(self, d: int, d_out: int):
        super().__init__()
        self.proj = nn.Linear(d, 2 * d_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Pixels look at each other (attn1), then at the words (attn2); ff then acts on each alone."""

    def __init__(self, d: int, dims: Dims):
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.attn1 = Attention(d, d, dims.heads)
        self.norm2 = nn.LayerNorm(d)
        self.attn2 = Attention(d, dims.context, dims.heads)
        self.norm3 = nn.LayerNorm(d)
        # Identity stands where training had a dropout, so that the keys are net.0 and net.2.
        self.ff = named(net=nn.Sequential(GEGLU(d, 4 * d), nn.Identity(), nn.Linear(4 * d, d)))

    def forward(self, x: Tensor, context: Context, hook: Hook | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), None, hook)
        x = x + self.attn2(self.norm2(x), context, hook)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """See the feature map as pixels, one token each, and run a transformer block on them."""

    def __init__(self, c: int, dims: Dims):
        super().__init__()
        # 1e-6 here, 1e-5 in ResnetBlock: as trained
        self.norm = nn.GroupNorm(dims.groups, c, eps=1e-6)
        self.proj_in = nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, dims)])
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, context: Context, hook: Hook | None) -> Tensor:
        pixels = self.proj_in(self.norm(x)).permute(0, 2, 3, 1)  # b h w c
        for block in self.transformer_blocks:
            pixels = block(pixels, context, hook)
        return x + self.proj_out(pixels.permute(0, 3, 1, 2))


class Upsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class DownBlock(nn.Module):
    """Resnet (and attention) a few times; keep each result for the way up; halve the size."""

    def __init__(self, c_ins: list[int], c: int, dims: Dims, attend: bool, resample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c, dims.groups, dims.time) for c_in in c_ins)
        self.attentions = nn.ModuleList(Transformer2D(c, dims) for _ in c_ins if attend)
        halve = named(conv=nn.Conv2d(c, c, 3, stride=2, padding=1))
        self.downsamplers = nn.ModuleList([halve] if resample else [])

    def forward(
        self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Context, hook: Hook | None
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:  # every level but the coarsest
                x = self.attentions[i](x, context, hook)
            skips.append(x)
        for downsample in self.downsamplers:  # one, or none at the coarsest level
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """Resnet, attention, resnet, at the coarsest resolution."""

    def __init__(self, c: int, dims: Dims):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, c, dims.groups, dims.time) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer2D(c, dims)])

    def forward(self, x: Tensor, temb: Tensor, context: Context, hook: Hook | None) -> Tensor:
        x = self.resnets[0](x, temb)
        x = self.attentions[0](x, context, hook)
        return self.resnets[1](x, temb)


class UpBlock(nn.Module):
    """Join what the way down kept; resnet (and attention), once more often; double the size."""

    def __init__(self, c_ins: list[int], c: int, dims: Dims, attend: bool, resample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c, dims.groups, dims.time) for c_in in c_ins)
        self.attentions = nn.ModuleList(Transformer2D(c, dims) for _ in c_ins if attend)
        self.upsamplers = nn.ModuleList([Upsample(c)] if resample else [])

    def forward(
        self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Context, hook: Hook | None
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
            if self.attentions:
                x = self.attentions[i](x, context, hook)
        for upsample in self.upsamplers:
            # The next skip is twice as large, or one less where the way down met an odd size.
            x = upsample(x, skips[-1].shape[2:])
        return x


class UNet(nn.Module):
    """SD 1.x by default; smaller numbers make a toy for the tests.

    The arguments are the fields of a published config.json, except `heads`, which those call
    attention_head_dim although SD 1.x means the number of heads by it.
    """

    def __init__(
        self,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        cross_attention_dim: int = 768,
        heads: int = 8,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        c, coarsest = block_out_channels[0], len(block_out_channels) - 1
        dims = Dims(4 * c, cross_attention_dim, heads, norm_num_groups)
        self.attention_levels = coarsest  # all levels but the coarsest

        first, second = nn.Linear(c, dims.time), nn.Linear(dims.time, dims.time)
        self.time_embedding = named(linear_1=first, act=nn.SiLU(), linear_2=second)
        self.conv_in = nn.Conv2d(4, c, 3, padding=1)

        # These loops push and pop channel counts where forward() pushes and pops feature maps.
        self.down_blocks, skips = nn.ModuleList(), [c]
        for level, width in enumerate(block_out_channels):
            deeper = level < coarsest
            c_ins = [c] + [width] * (layers_per_block - 1)
            self.down_blocks.append(DownBlock(c_ins, width, dims, attend=deeper, resample=deeper))
            skips += [width] * (layers_per_block + deeper)
            c = width

        self.mid_block = MidBlock(c, dims)

        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(block_out_channels))):
            c_ins = [c_in + skips.pop() for c_in in [c] + [width] * layers_per_block]
            block = UpBlock(c_ins, width, dims, attend=level < coarsest, resample=level > 0)
            self.up_blocks.append(block)
            c = width

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, c)
        self.conv_out = nn.Conv2d(c, 4, 3, padding=1)

        for name, module in self.named_modules():  # tell every attention layer its address
            if isinstance(module, Attention):
                module.layer = Layer(
                    name, place=name.split("_")[0], is_cross=name.endswith("attn2")
                )

    def forward(
        self, x: Tensor, t: int | Tensor, context: Context, hook: Hook | None = None
    ) -> Tensor:
        """Predict the noise in x. x: b 4 h w, t: one timestep or b, context: b 77 d → as x"""
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        temb = self.time_embedding(timestep_embedding(t, self.conv_in.out_channels).to(x.dtype))

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, skips, temb, context, hook)
        x = self.mid_block(x, temb, context, hook)
        for block in self.up_blocks:
            x = block(x, skips, temb, context, hook)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def coarse_size(self, height: int, width: int) -> Size:
        """Return the size of the coarse feature maps, for latents of height x width.

        It is the coarsest size at which the UNet attends whose shorter side is at least 16: 16 x 16
        for a 512 x 512 picture of SD 1.x, 24 x 24 at 768 x 768. Their self-attention holds the
        layout, and LocalBlend reads their cross-attention.
        """
        for _ in range(self.attention_levels - 1):
            half = (height + 1) // 2, (width + 1) // 2
            if min(half) < 16:
                break
            height, width = half
        return height, width
