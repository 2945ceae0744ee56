"""Optional: compute the same in less time. Nothing else in the package needs this file.

    keep_memory()       keep freed memory in the process and use it again (Linux)
    prepare(unet)       replace a UNet's layers by ones that are faster on a CPU
    record(unet)        replay a UNet's calls as CUDA graphs on a GPU

Shapes:  b batch · c o channels in and out · h w height and width · r s rows and columns of tiles
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CachedContext, Chain, Hook, PromptRows
from .edit import PromptToPrompt
from .errors import check
from .invert import HoldSource
from .store import AttentionStore

M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -4, -3, -1  # glibc's malloc.h


def keep_memory(keep: bool = True) -> bool:
    """Keep freed memory in the process; with False, return it to the system again.

    The system fills every new page with zeros, and a UNet frees and takes its largest tensors
    hundreds of times in a call: that costs a tenth of the time. The setting is the whole
    process's, so programs decide on it and not libraries. Returns False where the allocator is not
    glibc's, which alone has the setting.
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
        (M_MMAP_THRESHOLD, 32 << 20),  # the value that glibc reaches by itself
        (M_TRIM_THRESHOLD, 64 << 20),
    ):
        libc.mallopt(option, value)
    libc.malloc_trim(0)
    return True


# --- on a CPU -------------------------------------------------------------------------------------


def pack(weight: Tensor) -> Tensor:
    """Reorder a matrix, o c, as oneDNN's kernels read it. Only `multiply` can use the result."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1024)


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a packed matrix. x: … c → … o"""
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
        self.filters = [pack(matrix) for matrix in filters.float()]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x, b c h w → b o h w."""
        b, c, h, w = x.shape
        m, n, o = self.m, self.m + 2, self.out_channels
        r, s = -(-h // m), -(-w // m)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, m * s - w + 1, 1, m * r - h + 1))
        out = x.new_empty(b, r, m, s, m, o)
        pictures = max(1, 256 // (r * s))  # as many tiles at once as fit into the cache
        for part, y in zip(x.split(pictures), out.split(pictures), strict=True):
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
    """A linear layer or 1x1 convolution whose weights are packed for oneDNN's kernels."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.channels = -1 if isinstance(layer, nn.Linear) else 1
        self.weight, self.bias = pack(layer.weight.detach().flatten(1)), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        x = multiply(x.movedim(self.channels, -1), self.weight, self.bias)
        return x.movedim(-1, self.channels)


class PackedConv(nn.Module):
    """A 3x3 convolution of padding 1 with packed weights. It is slow with few channels."""

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
    """Return a faster module that computes what `layer` computes, or the layer itself."""
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
    are packed. A prepared UNet can't be saved, moved or trained: load the model again for that.
    Raises UserError unless the UNet is on the CPU, in float32 or a bfloat16 that the CPU has, and
    torch is built with oneDNN.
    """
    weight = next(unet.parameters())
    check(
        weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu",
        "fast.prepare (--fast) takes a UNet in float32 or bfloat16 on the CPU, not in "
        f"{weight.dtype} on {weight.device}: leave it out.",
    )
    check(
        torch.backends.mkldnn.is_available(),
        "fast.prepare (--fast) needs a torch that is built with oneDNN: leave it out.",
    )
    check(
        weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "fast.prepare (--fast): this CPU does not compute in bfloat16; use float32.",
    )
    for parent in list(unet.modules()):
        for name, layer in list(parent.named_children()):
            setattr(parent, name, faster(layer))
    unet.is_packed = True  # type: ignore[assignment]  # for StableDiffusion.identity
    return unet


# --- on a GPU -------------------------------------------------------------------------------------


def record(unet: nn.Module) -> nn.Module:
    """Make a UNet replay its calls as CUDA graphs, in place. Returns it.

    A GPU waits for Python where its kernels are short; a graph starts all of a call's kernels at
    once. The calls of a run with the same open windows share a graph, which is recorded at the
    second such call. All other calls run as before: the first one of each state, calls with
    gradients, and calls with hooks that are not the package's linear ones or that keep each call's
    maps apart, since a graph runs no Python.
    Raises UserError unless the UNet is on a CUDA device.
    """
    device = next(unet.parameters()).device
    check(device.type == "cuda", f"fast.record takes a UNet on a CUDA device, not on {device}.")
    unet.forward = Recorder(unet.forward)
    return unet


class Recorder:
    """The forward of a recorded UNet. It keeps the graphs of one run, known by its context."""

    def __init__(self, forward: Callable[..., Tensor]):
        self.forward = forward
        self.context: CachedContext | None = None
        self.graphs: dict[Hashable, Any] = {}
        self.parts: list[Any] = []  # they must live as long as the keys that hold their ids

    def __call__(
        self, x: Tensor, t: int | Tensor, context: Any, hook: PromptRows | None = None
    ) -> Tensor:
        """Call the UNet, or replay its recording. Shapes are those of UNet.forward."""
        parts = [] if hook is None else parts_of(hook.hook)
        if parts is None or not isinstance(context, CachedContext) or torch.is_grad_enabled():
            return self.forward(x, t, context, hook)
        if context is not self.context:  # another run
            self.context, self.graphs, self.parts = context, {}, []
            self.pool = torch.cuda.graph_pool_handle()
        key = (x.shape, x.dtype, *map(id, parts))
        if key not in self.graphs:
            # This call makes what a graph only uses: cached keys and values, and sums of maps.
            self.graphs[key] = None
            self.parts.append(parts)
            return self.forward(x, t, context, hook)
        if self.graphs[key] is None:
            inputs = x.clone(), torch.as_tensor(t, device=x.device).clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                eps = self.forward(*inputs, context, hook)
            self.graphs[key] = graph, inputs, eps
        graph, inputs, eps = self.graphs[key]
        inputs[0].copy_(x)
        inputs[1].copy_(torch.as_tensor(t))
        graph.replay()
        return eps.clone()


def parts_of(hook: Hook) -> list[Any] | None:
    """List what a call's graph depends on besides its inputs; None: it can't be recorded.

    It can be where all that a hook does at any layer is linear, and its sums are added in place.
    """
    hooks = hook.hooks if isinstance(hook, Chain) else [hook]
    parts: list[Any] = []
    for single in hooks:
        if type(single) is PromptToPrompt:
            parts += [single.cross, single.self_attn, single.blends]
        elif type(single) is AttentionStore and single.columns is not None:
            if single.kinds[False] or single.before_edit or single.by_call:
                return None
            parts.append(single)
        elif type(single) is not HoldSource:  # which acts at no layer
            return None
    return parts
