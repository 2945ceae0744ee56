"""How a predicted noise turns one latent into the next, less noisy one.

    timesteps                   which noise levels to visit, noisiest first: one UNet call each
    step(eps, t, x)             the latent at the next level
    inverse_step(eps, t, x)     the latent at timestep t, from the one at the level after it

ᾱ_t is the share of clean signal that is left at timestep t: x_t = √ᾱ_t · x_0 + √(1-ᾱ_t) · noise.
The formulas keep diffusers' order of operations, so that float32 results are equal to the bit.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import check, describe, is_number, is_whole

SPACINGS = ("leading", "trailing", "linspace")


def spaced(steps: int, spacing: str, num_train_timesteps: int, steps_offset: int) -> list[int]:
    """List the training timesteps that a run visits, noisiest first (Lin et al. 2024, table 2).

    leading: equal strides up from `steps_offset`, as SD has it, which leave out the noisiest.
    trailing: down from the noisiest, which suits few steps. linspace: from the noisiest to 0.
    """
    n = num_train_timesteps
    check(1 <= steps < n, f"The number of steps must be from 1 to {n - 1}, not {steps}.")
    names = ", ".join(SPACINGS)
    check(spacing in SPACINGS, f"The spacing of timesteps is one of {names}, not {spacing!r}.")
    if spacing == "leading":
        timesteps = [i * (n // steps) + steps_offset for i in reversed(range(steps))]
    elif spacing == "trailing":  # in numpy's arithmetic: halves are to fall on the same side
        stride = (n - n / steps) - n
        timesteps = [round(n + i * stride) - 1 for i in range(steps)]
    else:
        stride = (n - 1) / max(steps - 1, 1)
        timesteps = [round(i * stride) for i in reversed(range(steps))]
    within = timesteps[-1] >= 0 and timesteps[0] < n
    check(within, f"With steps_offset {steps_offset} the run would leave timesteps 0 to {n - 1}.")
    return timesteps


def alpha_bars(
    num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Tensor:
    """Compute ᾱ_t of every training timestep t. In SD's "scaled linear" schedule √β is linear."""
    root = torch.linspace(
        beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32, device="cpu"
    )
    return torch.cumprod(1 - root**2, dim=0)


@runtime_checkable
class Scheduler(Protocol):
    """A sampler of predicted noise: DDIM, PNDM, or an object of your own with these two members."""

    @property
    def timesteps(self) -> Sequence[int]:
        """The noise levels to visit, noisiest first: one UNet call each."""
        ...

    def step(self, eps: Tensor, t: int, x: Tensor) -> Tensor:
        """Return the latent at the next level.

        eps, x: b 4 h w, the predicted noise and the latent at timestep t.
        """
        ...


class DDIM:
    """Guess the clean latent, then noise it again to the next level (Song et al. 2021, eq. 12).

    `eta` 0 is deterministic, 1 draws as much new noise as DDPM: one (1, 4, h, w) sample of
    `generator` for all images of the batch, so that a source and its edits stay comparable.
    For `timestep_spacing` see `spaced`; a step is num_train_timesteps // steps, as in diffusers.
    Raises ValueError for steps that are not within 1 to num_train_timesteps - 1, and the like.
    """

    def __init__(
        self,
        steps: int = 50,
        *,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        steps_offset: int = 1,
        set_alpha_to_one: bool = False,
        timestep_spacing: str = "leading",
    ):
        right_eta = is_number(eta) and 0 <= eta <= 1
        check(right_eta, f"eta must be from 0 (DDIM) to 1 (DDPM), not {eta!r}.")
        self.timesteps = spaced(steps, timestep_spacing, num_train_timesteps, steps_offset)
        self.stride = num_train_timesteps // steps
        self.alpha_bar = alpha_bars(num_train_timesteps, beta_start, beta_end)
        # SD was trained to end at ᾱ_0, a little noise above the clean latent.
        self.last_alpha_bar = self.alpha_bar.new_ones(()) if set_alpha_to_one else self.alpha_bar[0]
        self.eta, self.generator = eta, generator

    def alpha_bar_pair(self, t: int) -> tuple[Tensor, Tensor]:
        """Return ᾱ at t and at the level after it: CPU scalars, which mix with any device."""
        after = t - self.stride
        return self.alpha_bar[t], self.alpha_bar[after] if after >= 0 else self.last_alpha_bar

    def step(self, eps: Tensor, t: int, x: Tensor) -> Tensor:
        """Return the latent at the next level.

        eps, x: b 4 h w, the predicted noise and the latent at timestep t.
        """
        x, sigma = self.mean_step(eps, t, x)
        return x + sigma * self.noise(t, x) if self.eta > 0 else x

    def mean_step(self, eps: Tensor, t: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent of `step` without its new noise, and the deviation σ of that noise."""
        a_t, a_next = self.alpha_bar_pair(t)
        x_0 = (x - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        # eq. 16: σ = η √((1-ᾱ_next)/(1-ᾱ_t)) √(1 - ᾱ_t/ᾱ_next)
        sigma = self.eta * (((1 - a_next) / (1 - a_t)) * (1 - a_t / a_next)) ** 0.5
        return a_next**0.5 * x_0 + (1 - a_next - sigma**2) ** 0.5 * eps, sigma

    def noise(self, t: int, x: Tensor) -> Tensor:
        """Draw the new noise of the step from timestep t, of unit variance. → 1 4 h w"""
        shape = 1, *x.shape[1:]
        rng = self.generator
        return torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu").to(x)

    def inverse_step(self, eps: Tensor, t: int, x: Tensor) -> Tensor:
        """Return the latent at timestep t. x: b 4 h w, the latent at the level after it.

        It is `step` of eta 0 solved for its x, so it is exact only if `eps` was predicted at the
        returned latent. Predicting it at `x` is the usual approximation (Dhariwal & Nichol 2021,
        appendix F).
        """
        a_t, a_next = self.alpha_bar_pair(t)
        x_0 = (x - (1 - a_next) ** 0.5 * eps) / a_next**0.5
        return a_t**0.5 * x_0 + (1 - a_t) ** 0.5 * eps


class PNDM(DDIM):
    """DDIM's step with a noise averaged over the last calls (PLMS; Liu et al. 2022, eq. 9 and 12).

    As SD ships it, without Runge-Kutta steps: the first step is taken twice, the second time with
    the mean of both predictions, so n steps cost n + 1 UNet calls. It remembers a run's last
    predictions, and forgets them when the next run begins.
    """

    def __init__(self, steps: int = 50, **settings: Any):
        super().__init__(steps, **settings)
        check(not self.eta, f"PNDM draws no noise: use DDIM for eta {self.eta}.")
        self.timesteps[1:1] = self.timesteps[1:2]  # 981, 961, 961, 941, …
        self.history: list[Tensor] = []  # predictions, newest first, at most four
        self.first_x: Tensor | None = None  # x_T, kept from the first call for the second

    def step(self, eps: Tensor, t: int, x: Tensor) -> Tensor:
        """Return the latent at the next level.

        eps, x: b 4 h w, the predicted noise and the latent at timestep t.
        """
        if t == self.timesteps[0]:
            self.history, self.first_x = [], x
        e = self.history
        if len(e) == 1 and self.first_x is not None:  # the second call: take the first step again
            x, self.first_x = self.first_x, None
            return self._transfer((eps + e[0]) / 2, t + self.stride, x)
        self.history = e = [eps, *e[:3]]
        if len(e) == 2:
            eps = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            eps = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        elif len(e) == 4:
            eps = (1 / 24) * (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3])
        return self._transfer(eps, t, x)

    def _transfer(self, eps: Tensor, t: int, x: Tensor) -> Tensor:
        """Take DDIM's step with σ = 0, in the form of Liu et al. 2022, eq. 9."""
        a_t, a_next = self.alpha_bar_pair(t)
        denominator = a_t * (1 - a_next) ** 0.5 + (a_t * (1 - a_t) * a_next) ** 0.5
        return (a_next / a_t) ** 0.5 * x - (a_next - a_t) * eps / denominator


SCHEDULERS = {"ddim": DDIM, "pndm": PNDM}


def make_scheduler(
    model: Any,
    steps: int | None = None,
    scheduler: str | Scheduler | None = None,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Scheduler:
    """Make the scheduler of one run; None takes what the model recommends.

    Raises UserError for a name, a number of steps or an eta that there is not.
    """
    names = ", ".join(SCHEDULERS)
    if scheduler is not None and not isinstance(scheduler, str):
        check(
            isinstance(scheduler, Scheduler),
            f"The scheduler must be one of {names}, or an object with timesteps and step, not "
            f"{describe(scheduler)}.",
        )
        check(
            steps is None and not eta,
            "A scheduler of your own has its steps and its eta already: give them to it alone.",
        )
        return scheduler
    name = model.defaults["scheduler"] if scheduler is None else scheduler
    check(name in SCHEDULERS, f"The scheduler must be one of {names}, not {name!r}.")
    steps = model.defaults["num_inference_steps"] if steps is None else steps
    check(is_whole(steps), f"The number of steps must be a whole number, not {steps!r}.")
    eta = float(eta) if is_number(eta) else eta  # numpy has numbers of its own
    return SCHEDULERS[name](int(steps), eta=eta, generator=generator, **model.schedule)
