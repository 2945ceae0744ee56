"""Optional, for CPUs: the same pictures in less time. Of the package only the command line uses it.

    keep_memory()       the process keeps its large blocks of memory and uses them again
    prepare(unet)       the UNet's convolutions and linear layers compute the same another way

Shapes:  b batch · c o channels in and out · h w height and width · r s rows and columns of tiles
"""

import ctypes
import math
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


def pack(weight: Tensor) -> Tensor:
    """o c, a matrix, in the order that oneDNN's kernels read it in: for `multiply` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1024)


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: … c → … o"""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


# Winograd's F(m x m, 3x3): m·m outputs of a 3x3 filter g over a tile d of n x n, n = m + 2,
#     Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A        (Lavin & Gray 2016, eq. 8 and section 4)
# with n·n products for 9·m·m. Summed over the channels, the products are n·n matrix products.
G, B_T, A_T = {}, {}, {}
G[2] = [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]]
B_T[2] = [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]
A_T[2] = [[1, 1, 1, 0], [0, 1, -1, -1]]
G[4] = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
B_T[4] = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
A_T[4] = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
]


class Winograd(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1, by Winograd's algorithm on tiles of m x m."""

    def __init__(self, conv: nn.Conv2d, m: int):
        super().__init__()
        self.m, self.out_channels, self.bias = m, conv.out_channels, conv.bias
        weight = conv.weight.detach().double()
        self.b_t, self.a_t = weight.new_tensor(B_T[m]).float(), weight.new_tensor(A_T[m]).float()
        g = weight.new_tensor(G[m])
        filters = torch.einsum("xi,yj,ocij->xyoc", g, g, weight).flatten(0, 1)  # n·n o c
        self.filters = [pack(one) for one in filters.float()]

    def forward(self, x: Tensor) -> Tensor:
        """x: b c h w → b o h w"""
        b, c, h, w = x.shape
        m, n, o = self.m, self.m + 2, self.out_channels
        r, s = -(-h // m), -(-w // m)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, m * s - w + 1, 1, m * r - h + 1))
        out = x.new_empty(b, r, m, s, m, o)
        at_once = max(1, 256 // (r * s))  # pictures: as many tiles as the cache has room for
        for part, y in zip(x.split(at_once), out.split(at_once), strict=True):
            d = part.unfold(1, n, m).unfold(2, n, m)  # b r s c n n
            d = d.permute(4, 5, 0, 1, 2, 3).reshape(n, -1)  # n, n·b·r·s·c
            d = (self.b_t @ (self.b_t @ d).view(n, n, -1)).view(n * n, -1, c)  # n·n b·r·s c
            p = torch.stack([multiply(*pair) for pair in zip(d, self.filters, strict=True)])
            p = self.a_t @ p.view(n, n, -1)  # n m b·r·s·o
            p = (self.a_t @ p.view(n, -1)).view(m, m, len(part), r, s, o)
            y.copy_(p.permute(2, 3, 0, 4, 1, 5))
        out = out.view(b, m * r, m * s, o)[:, :h, :w]
        return (out if self.bias is None else out.add_(self.bias)).permute(0, 3, 1, 2)


class PackedLinear(nn.Module):
    """A linear layer, or a 1x1 convolution, whose weights wait in the order of oneDNN's kernels."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.channels = -1 if isinstance(layer, nn.Linear) else 1
        self.weight, self.bias = pack(layer.weight.detach().flatten(1)), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        x = multiply(x.movedim(self.channels, -1), self.weight, self.bias)
        return x.movedim(-1, self.channels)


class PackedConv(nn.Module):
    """A 3x3 convolution of padding 1 whose weights wait likewise; with few channels it is slow."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.options = [1, 1], [1, 1], [1, 1], 1  # padding, stride, dilation, groups
        weight = conv.weight.detach().to(memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.options)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        call = torch.ops.mkldnn._convolution_pointwise
        return call(x, self.weight, self.bias, *self.options, "none", [], "")


def faster(layer: nn.Module) -> nn.Module:
    """Another module that computes what `layer` computes, or the layer itself."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return layer
    pairs = math.prod(layer.weight.shape[:2])  # of channels; with few, calling is what costs
    if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1):
        return PackedLinear(layer) if pairs >= 1 << 15 else layer
    by_tiles = (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1))
    if not by_tiles or pairs < 1 << 16:
        return layer
    if layer.weight.dtype == torch.bfloat16:
        return PackedConv(layer)
    # Where there are many channels there are few pixels: the filters are most of the memory, and
    # grow by (m + 2)² / 9.
    return Winograd(layer, 4 if layer.out_channels <= 640 else 2)


def prepare(unet: nn.Module) -> nn.Module:
    """Replace a UNet's layers, in place, by faster ones for inference on a CPU. Returns it.

    In float32 results differ in the sixth digit, and the 3x3 convolutions' filters take 4 times
    their memory up to 640 channels and 1.8 times above, 2.2 GB more in SD 1.x. All other weights
    are packed. What is replaced can't be saved, moved or trained: load the model again for that.
    Raises ValueError unless the UNet is on the CPU, in float32 or a bfloat16 that the CPU has, and
    torch is built with oneDNN.
    """
    weight = next(unet.parameters())
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.device.type != "cpu":
        raise ValueError(
            "fast.prepare (--fast) takes a UNet in float32 or bfloat16 on the CPU, not in "
            f"{weight.dtype} on {weight.device}: leave it out."
        )
    if not torch.backends.mkldnn.is_available():
        raise ValueError("fast.prepare needs a torch that is built with oneDNN.")
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError(
            "fast.prepare (--fast): this CPU does not compute in bfloat16; use float32."
        )
    for parent in list(unet.modules()):
        for name, layer in list(parent.named_children()):
            setattr(parent, name, faster(layer))
    return unet
