"""Prompt-to-Prompt written out on diffusers' own UNet: plain, slow, and independent of minip2p.

Every attention map is written down in float64 and edited as the paper has it (Hertz et al. 2022,
section 3). Row 0 is the source, row e an edit of it, α_j is 1 while token j is in its window:

    replace     M̂_e = M_0 mapper        a new word's tokens look where the old word's looked
    refine      M̂_e = M_0[:, gather]    tokens of both prompts look where the source's looked
    windows     M̂_e[:, j] = α_j M̂_e[:, j] + (1 - α_j) M_e[:, j];  α_j = 0 for an added word
    reweight    M̂_e[:, j] *= w_j        at every call, in and out of the windows; or within them
    self        M̂_e = M_0               in its window, at feature maps up to the coarse size

With guidance, the blank half of the batch is not edited. A window is a fraction of the UNet calls
and ends before call floor(fraction · calls). The blend looks at the maps after the edit and before
the weights, which say how loud a word is and not where it is.

Shapes:  b prompts · i heads · q query pixels · k keys: 77 tokens, or pixels
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LENGTH = 77
Window = tuple[float, float]


# --- words and tokens ----------------------------------------------------------------------------


def words_of(tokenizer: Any, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, split at spaces, with the positions of their tokens; begin is 0."""
    words, at = [], 1
    for word in prompt.split():
        n = len(tokenizer.tokenize(word))
        words.append((word, list(range(at, at + n))))
        at += n
    return words


def positions(tokenizer: Any, prompt: str, words: Sequence[str]) -> list[int]:
    """List the positions of the tokens of `words` in the prompt, every occurrence."""
    spans = words_of(tokenizer, prompt)
    assert {word for word, _ in spans}.issuperset(words), (prompt, words)
    return [at for word, tokens in spans for at in tokens if word in words]


def replace(tokenizer: Any, source: str, target: str) -> tuple[Tensor, Tensor]:
    """Word by word → mapper: k k, each row sums to 1; and which tokens take part: all of them."""
    mapper = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    mapper[0, 0] = 1
    i = j = 1
    pairs = zip(words_of(tokenizer, source), words_of(tokenizer, target), strict=True)
    for (_, old), (_, new) in pairs:
        for n, a in enumerate(old):
            for m, b in enumerate(new):
                if len(old) != len(new):
                    mapper[a, b] = 1 / len(new)  # n -> 1 sums up, 1 -> n divides
                elif n == m:
                    mapper[a, b] = 1
        i, j = old[-1] + 1, new[-1] + 1
    for a in range(i, LENGTH):  # end and padding move along; what finds no room joins the last
        mapper[a, min(j + a - i, LENGTH - 1)] = 1
    return mapper, torch.ones(LENGTH, dtype=torch.bool)


def refine(tokenizer: Any, source: str, target: str) -> tuple[Tensor, Tensor]:
    """Token by token → mapper: k k, a gather; and which tokens take part: those of both prompts."""
    x, y = (tokenizer(p, add_special_tokens=False)["input_ids"] for p in (source, target))

    @cache
    def shared(i: int, j: int) -> tuple[tuple[int, int], ...]:
        """The longest common subsequence of x[i:] and y[j:], as pairs."""
        if i == len(x) or j == len(y):
            return ()
        if x[i] == y[j]:
            return ((i, j), *shared(i + 1, j + 1))
        return max(shared(i + 1, j), shared(i, j + 1), key=len)

    mapper = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    mapper[0, 0] = 1
    for i, j in shared(0, 0):
        mapper[i + 1, j + 1] = 1
    mapper[len(x) + 1, len(y) + 1] = 1  # the end
    for j in range(max(len(x), len(y)) + 2, LENGTH):  # the padding of both, in its place
        mapper[j, j] = 1
    return mapper, mapper.sum(dim=0) > 0


# --- edits ---------------------------------------------------------------------------------------


@dataclass
class Blend:
    """x_e ← x_0 outside the mask: where the words' maps exceed the threshold of their maximum."""

    source: Sequence[str] = ()  # words of the source prompt
    target: Sequence[str] = ()  # words of the edited prompt
    subtract_source: Sequence[str] = ()
    subtract_target: Sequence[str] = ()
    threshold: float = 0.3
    start: float = 0.0
    mask: Tensor | None = None  # h w, instead of all words


@dataclass
class Edit:
    """The edit of one prompt. All words are the edited prompt's."""

    align: Callable[[Any, str, str], tuple[Tensor, Tensor]]  # replace or refine
    cross: Window
    self_: Window
    word_windows: dict[str, Window] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    blend: Blend | None = None
    everywhere: bool = True  # the weights, also out of the windows


class Run:
    """The edits of one run in tokens, the number of the UNet call, and the maps seen so far."""

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[str],
        edits: Sequence[Edit | None],
        calls: int,
        coarse: tuple[int, int],
    ):
        self.tokenizer, self.prompts, self.edits = tokenizer, prompts, edits
        self.call, self.calls, self.coarse = 0, calls, coarse
        self.rows = [self.in_tokens(*row) for row in zip(prompts[1:], edits, strict=True)]
        self.before: Any = 0  # b q k: coarse cross-attention, mean over heads, sum over all so far
        self.unweighed: Any = 0  # the same once edited, where a blend looks
        self.after: Any = 0  # and once the words' weights are in, as they are used
        self.layers = 0  # of which these are the sums
        self.margin = math.inf  # how near to its threshold a pixel of a blend's mask came

    def in_tokens(self, prompt: str, edit: Edit | None) -> tuple[Tensor, Tensor, list, Tensor]:
        if edit is None:  # nothing is taken over
            none = torch.zeros(LENGTH, dtype=torch.bool)
            return torch.eye(LENGTH).double(), none, [(0, 0)] * LENGTH, torch.ones(LENGTH).double()
        mapper, takes_part = edit.align(self.tokenizer, self.prompts[0], prompt)
        windows, weights = [edit.cross] * LENGTH, torch.ones(LENGTH, dtype=torch.float64)
        for word, window in edit.word_windows.items():
            for j in positions(self.tokenizer, prompt, [word]):
                windows[j] = window
        for word, weight in edit.weights.items():
            weights[positions(self.tokenizer, prompt, [word])] = weight
        return mapper, takes_part, windows, weights

    def inside(self, window: Window) -> bool:
        start, end = (math.floor(fraction * self.calls + 1e-9) for fraction in window)
        return start <= self.call < end

    def edited(self, probs: Tensor, is_cross: bool) -> Tensor:
        """probs: b i q k of the prompts → the maps to use."""
        small = probs.shape[2] <= math.prod(self.coarse)
        if not is_cross:
            inside = [
                False,
                *(e is not None and small and self.inside(e.self_) for e in self.edits),
            ]
            return torch.where(torch.tensor(inside).view(-1, 1, 1, 1), probs[0], probs)

        edited, weighed = probs.clone(), probs.clone()
        for e, (edit, row) in enumerate(zip(self.edits, self.rows, strict=True), 1):
            mapper, takes_part, windows, weights = row
            inside = torch.tensor([self.inside(window) for window in windows])
            edited[e] = torch.where(inside & takes_part, probs[0] @ mapper, probs[e])
            is_weighted = inside | (edit is not None and edit.everywhere)
            weighed[e] = edited[e] * torch.where(is_weighted, weights, 1)
        if probs.shape[2] == math.prod(self.coarse):
            self.before = self.before + probs.mean(dim=1)
            self.unweighed = self.unweighed + edited.mean(dim=1)
            self.after = self.after + weighed.mean(dim=1)
            self.layers += 1
        return weighed

    def blended(self, x: Tensor) -> Tensor:
        """x: b 4 h w, after the scheduler's step → the latents to go on with."""
        x = x.clone()
        for e, edit in enumerate(self.edits, 1):
            if edit and edit.blend and self.inside((edit.blend.start, 1.0)):
                mask = self.mask(e, edit.blend, x.shape[2:])
                x[e] = torch.where(mask, x[e], x[0])
        return x

    def mask(self, e: int, blend: Blend, size: torch.Size) -> Tensor:
        if blend.mask is not None:
            return blend.mask
        mask = self.above(e, blend, blend.source, blend.target, size, pool=True)
        if blend.subtract_source or blend.subtract_target:
            taken_out = self.above(
                e, blend, blend.subtract_source, blend.subtract_target, size, pool=False
            )
            mask = mask & ~taken_out
        return mask

    def above(
        self,
        e: int,
        blend: Blend,
        source: Sequence[str],
        target: Sequence[str],
        size: torch.Size,
        pool: bool,
    ) -> Tensor:
        """Mark where the source's words or the edit's exceed the threshold. → h w"""
        above = torch.zeros(size, dtype=torch.bool)
        for row, words in ((0, source), (e, target)):
            if not words:
                continue
            at = positions(self.tokenizer, self.prompts[row], words)
            maps = self.unweighed[row][:, at].sum(dim=1).view(1, 1, *self.coarse)
            if pool:
                maps = F.max_pool2d(maps, 3, stride=1, padding=1)
            maps = F.interpolate(maps, size=size, mode="nearest")[0, 0]
            maps = maps / maps.max()
            above |= maps > blend.threshold
            self.margin = min(self.margin, (maps - blend.threshold).abs().min().item())
        return above


class WrittenOut:
    """A diffusers attention processor: the prompts' maps are written down in float64 and edited."""

    def __init__(self, run: Run):
        self.run = run

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        is_cross = encoder_hidden_states is not None
        seen = encoder_hidden_states if is_cross else hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        out = F.scaled_dot_product_attention(q, k, v)  # for the blank rows, which come first

        b = len(self.run.prompts)
        q, k, v = (x[-b:].double() for x in (q, k, v))
        probs = (q / q.shape[-1] ** 0.5 @ k.mT).softmax(dim=-1)
        out[-b:] = self.run.edited(probs, is_cross) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


# --- the run -------------------------------------------------------------------------------------


@dataclass
class Model:
    tokenizer: Any
    text_encoder: Any
    unet: Any

    def context(self, prompts: Sequence[str]) -> Tensor:
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=LENGTH,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        return self.text_encoder(ids).last_hidden_state


def load(folder: Path) -> Model:
    """The same folder as the libraries themselves read it."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    return Model(
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval(),
        UNet2DConditionModel.from_pretrained(folder / "unet").float().eval(),
    )


def make_scheduler(name: str) -> Any:
    """Stable Diffusion's DDIM or PNDM."""
    from diffusers import DDIMScheduler, PNDMScheduler

    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    if name == "ddim":
        return DDIMScheduler(**schedule, clip_sample=False)
    return PNDMScheduler(**schedule, skip_prk_steps=True)


@torch.no_grad()
def prompt_to_prompt(
    model: Model,
    prompts: Sequence[str],
    edits: Sequence[Edit | None],
    latents: Tensor,
    *,
    coarse: tuple[int, int],
    steps: int,
    scheduler: str = "ddim",
    guidance: float = 7.5,
    negative_prompt: str = "",
) -> tuple[Tensor, Run]:
    """latents: 1 or b 4 h w → the final latents b 4 h w, and what was seen on the way."""
    b = len(prompts)
    schedule = make_scheduler(scheduler)
    schedule.set_timesteps(steps)
    run = Run(model.tokenizer, prompts, edits, len(schedule.timesteps), coarse)
    model.unet.set_attn_processor(WrittenOut(run))

    context = model.context([negative_prompt] * b + list(prompts))
    x = latents.expand(b, -1, -1, -1)
    for call, t in enumerate(schedule.timesteps):
        run.call = call
        if guidance == 1:
            eps = model.unet(x, t, context[b:]).sample
        else:
            eps_blank, eps = model.unet(torch.cat([x, x]), t, context).sample.chunk(2)
            eps = eps_blank + guidance * (eps - eps_blank)
        x = run.blended(schedule.step(eps, t, x).prev_sample)
    return x, run
