"""Optional, for CPUs: the same pictures in less time. Of the package only cli.py uses it.

    keep_memory()       the process keeps its large blocks of memory and uses them again
    prepare(unet)       the UNet's convolutions and linear layers compute the same another way

Shapes:  b batch · c o channels in and out · h w height and width · r s rows and columns of tiles
"""

import ctypes
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -4, -3, -1  # glibc's malloc.h


def keep_memory(keep: bool = True) -> bool:
    """Free memory stays with the process, or with False returns to the system as by default.

    The system hands out zeroed pages, and a UNet frees and takes its largest tensors hundreds of
    times a call: a tenth of the time is spent on that. For the whole process, so this is for
    programs to decide, not for libraries. Returns whether there is such an allocator: glibc's.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    if keep:
        return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
    for option, value in (
        (M_MMAP_MAX, 65536),
        (M_MMAP_THRESHOLD, 32 << 20),  # what glibc arrives at by itself
        (M_TRIM_THRESHOLD, 64 << 20),
    ):
        libc.mallopt(option, value)
    libc.malloc_trim(0)
    return True


# Winograd's F(4x4, 3x3): 16 outputs of a 3x3 filter g over a 6x6 tile d, with 36 products for 144,
#     Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A        (Lavin & Gray 2016, eq. 8 and section 4.3)
# Summed over the channels, the 36 products are 36 matrix products.
G = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
B_T = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
A_T = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
]


class Winograd(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1, by Winograd's algorithm."""

    filters: Tensor
    b_t: Tensor
    a_t: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        g, weight = torch.tensor(G, dtype=torch.float64), conv.weight.detach().double()
        filters = torch.einsum("xi,yj,ocij->xyco", g, g, weight).flatten(0, 1)  # 36 c o
        self.register_buffer("filters", filters.to(conv.weight.dtype))
        self.register_buffer("b_t", filters.new_tensor(B_T).to(conv.weight.dtype))
        self.register_buffer("a_t", filters.new_tensor(A_T).to(conv.weight.dtype))
        assert conv.bias is not None
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: b c h w → b o h w"""
        b, c, h, w = x.shape
        r, s, o = (h + 3) // 4, (w + 3) // 4, self.filters.shape[2]
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * s - w + 1, 1, 4 * r - h + 1))
        out = x.new_empty(b, r, 4, s, 4, o)
        at_once = max(1, 256 // (r * s))  # pictures: as many tiles as the cache has room for
        for part, y in zip(x.split(at_once), out.split(at_once), strict=True):
            d = part.unfold(1, 6, 4).unfold(2, 6, 4)  # b r s c 6 6
            d = d.permute(4, 5, 0, 1, 2, 3).reshape(6, -1)  # 6, 6·b·r·s·c
            d = self.b_t @ (self.b_t @ d).view(6, 6, -1)  # 6 6 b·r·s·c
            m = torch.bmm(d.view(36, -1, c), self.filters)  # 36 b·r·s o
            m = self.a_t @ m.view(6, 6, -1)  # 6 4 b·r·s·o
            m = (self.a_t @ m.view(6, -1)).view(4, 4, len(part), r, s, o)
            y.copy_(m.permute(2, 3, 0, 4, 1, 5))
        out = out.view(b, 4 * r, 4 * s, o)[:, :h, :w]
        return out.add_(self.bias).permute(0, 3, 1, 2)


class PackedConv(nn.Module):
    """A convolution whose weights wait in the order that oneDNN's kernels read them in."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.options = list(conv.padding), list(conv.stride), [1, 1], 1
        weight = conv.weight.detach().to(memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.options)
        self.bias, self.out_channels = conv.bias, conv.out_channels

    def forward(self, x: Tensor) -> Tensor:
        call = torch.ops.mkldnn._convolution_pointwise
        return call(x, self.weight, self.bias, *self.options, "none", [], "")


class PackedLinear(nn.Module):
    """A linear layer whose weights wait in the order that oneDNN's kernels read them in."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1024)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def faster(layer: nn.Module, widest: int) -> nn.Module:
    """Another module that computes what `layer` computes, or the layer itself."""
    if not isinstance(layer, nn.Conv2d | nn.Linear) or layer.weight.numel() < 1 << 15:
        return layer
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer)
    by_tiles = (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1))
    if by_tiles and layer.out_channels <= widest:
        return Winograd(layer)
    return PackedConv(layer)


def prepare(unet: nn.Module, widest: int = 640) -> nn.Module:
    """Replace a UNet's layers, in place, by faster ones for inference on a CPU. Returns it.

    Results differ in the sixth digit. The 3x3 convolutions of up to `widest` channels take four
    times their memory, 0.8 GB more in SD 1.x; with 1280, all of them, 6 GB. The other layers'
    weights are packed. What is replaced can't be saved, moved or trained: load the model again for
    that. Raises ValueError unless the UNet is in float32 (bfloat16 is faster as it is), on the
    CPU, and torch is built with oneDNN.
    """
    weight = next(unet.parameters())
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            f"fast.prepare (--fast) takes a UNet in float32 on the CPU, not in {weight.dtype} on "
            f"{weight.device}: leave it out."
        )
    if not torch.backends.mkldnn.is_available():
        raise ValueError("fast.prepare needs a torch that is built with oneDNN.")
    for parent in list(unet.modules()):
        for name, layer in list(parent.named_children()):
            setattr(parent, name, faster(layer, widest))
    return unet
