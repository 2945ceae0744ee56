"""The training loop of both stages: optimizers, processes, checkpoints, and the log."""

import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

BRANCH = 0.25  # share of the samples, at the end, in which the rate falls to nothing


@dataclass
class Stage:
    """The modules that are trained, and how their loss is computed."""

    name: str
    modules: nn.ModuleDict
    draw: Callable[[torch.Generator, float], list[Tensor]]  # progress 0 to 1 → a batch, on the CPU
    loss: Callable[..., dict[str, Tensor]]  # of a batch: "loss" and more
    check: Callable[[], dict[str, float]]  # with averaged weights: on scenes that were never seen
    samples: int
    batch: int  # of all processes together
    rate: float
    longest: float = 1.0  # of the gradient: what is longer is shortened
    falling: float = BRANCH  # the last part, in which the rate falls to nothing
    recorded: bool = False  # by a GPU: draw's tensors always have the same shapes


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix of each weight's momentum (Jordan et al. 2024).

    A convolution's kernel counts as a matrix of outputs and all else. Steps are as long as AdamW's
    (Liu et al. 2025, eq. 4), so that both share a rate.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float | Tensor):
        super().__init__(weights, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    same.setdefault(tuple(p.flatten(1).shape), []).append(p)
            for shape, weights in same.items():
                momentum = []
                for p in weights:
                    assert p.grad is not None
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    kept = self.state[p]["momentum"]
                    kept.lerp_(p.grad, 1 - group["momentum"])
                    momentum.append(p.grad.lerp(kept, group["momentum"]).flatten(1))
                steps = orthogonal(torch.stack(momentum))
                length = 0.2 * max(shape) ** 0.5 * group["lr"]
                for p, direction in zip(weights, steps, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(direction.view_as(p) * length)


def orthogonal(x: Tensor) -> Tensor:
    """Compute about U V^T of each x = U S V^T, by five Newton-Schulz steps. x: n rows columns"""
    wide = x.shape[1] <= x.shape[2]
    y = x if wide else x.mT
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    y = y.bfloat16()
    for _ in range(5):
        square = y @ y.mT
        y = 3.4445 * y + (-4.7750 * square + 2.0315 * square @ square) @ y
    return (y if wide else y.mT).to(x)


def fit(stage: Stage, work: Path, minutes: float = 4.0) -> None:
    """Train until `samples` were seen, and leave the average of the weights over the last steps.

    minutes: between checkpoints, by the clock; and between checks, of this process's own time, lest
    a run that has to wait for others does little else.
    """
    parameters = list(stage.modules.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizers = make_optimizers(stage)
    file = work / f"{stage.name}.pt"
    step, seconds = restore(file, stage, optimizers, average)

    rate = torch.zeros((), device=parameters[0].device)  # a tensor: a recorded step reads it again
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate

    def take(*batch: Tensor) -> dict[str, Tensor]:
        losses = stage.loss(*batch)
        for p in parameters:
            p.grad = None
        losses["loss"].backward()
        share_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, stage.longest)
        for optimizer in optimizers:
            optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def batch_of(step: int) -> list[Tensor]:
        # A seed for each step and process: a run that was interrupted goes on as it would have.
        seed = (step * processes() + rank()) * 2 + (stage.name == "unet")
        batch = stage.draw(torch.Generator().manual_seed(seed), step / steps)
        return [t.pin_memory() if rate.is_cuda else t for t in batch]

    take_step = Recorded(take) if rate.is_cuda and stage.recorded else take
    steps = math.ceil(stage.samples / stage.batch)
    log = Log(work / "log.csv", stage, steps, step, seconds) if main_process() else None
    kept, checked = time.monotonic(), time.process_time()
    batch = batch_of(step)
    while step < steps:
        rate.fill_(stage.rate * min(1, (step + 1) / 100, (1 - step / steps) / stage.falling))
        losses = take_step(*(t.to(rate.device, non_blocking=True) for t in batch))
        batch = batch_of(step + 1)  # while a GPU is at work on this one
        check_finite(losses["loss"], stage, step, steps, file)
        step += 1
        keep = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - keep)
        if log:
            log.add(step, losses)
        is_last = step == steps
        if is_last or (step % 20 == 0 and first_says(time.monotonic() - kept > 60 * minutes)):
            if log and (is_last or time.process_time() - checked > 60 * minutes):
                swap(parameters, average)
                log.check(step, stage.check())
                swap(parameters, average)
                checked = time.process_time()
            if log:
                save(file, stage, optimizers, average, step, log.seconds())
            kept = time.monotonic()
    swap(parameters, average)


def restore(
    file: Path, stage: Stage, optimizers: Sequence[torch.optim.Optimizer], average: list[Tensor]
) -> tuple[int, float]:
    """Go on from the checkpoint, if there is one, and return its step and its seconds."""
    if not file.exists():
        return 0, 0.0
    saved = torch.load(file, weights_only=True, map_location=average[0].device)
    stage.modules.load_state_dict(saved["modules"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    for mean, value in zip(average, saved["average"], strict=True):
        mean.copy_(value)
    return saved["step"], saved["seconds"]


def save(
    file: Path,
    stage: Stage,
    optimizers: Sequence[torch.optim.Optimizer],
    average: list[Tensor],
    step: int,
    seconds: float,
) -> None:
    """Write the checkpoint that `restore` reads."""
    checkpoint = {
        "modules": stage.modules.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "average": average,
        "step": step,
        "seconds": seconds,
    }
    torch.save(checkpoint, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def check_finite(loss: Tensor, stage: Stage, step: int, steps: int, file: Path) -> None:
    """Raise FloatingPointError if the loss is infinite or nan. file: of the checkpoint"""
    if not loss.isfinite():
        where = f"{file} has the weights of the last checkpoint" if file.exists() else "no file"
        raise FloatingPointError(
            f"{stage.name}: the loss is {loss.item()} at step {step} of {steps}; "
            f"{where}: try a lower rate than {stage.rate}."
        )


class Recorded:
    """A step that a GPU records, as a CUDA graph, and repeats: else it would wait for Python.

    take: a batch, on the GPU → the losses, which the next step overwrites. The UNet's step of 128
    samples takes 42 ms instead of 284, on an H100 whose host is busy.
    """

    def __init__(self, take: Callable[..., dict[str, Tensor]]):
        self.take, self.calls = take, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *batch: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        # What is made once, such as momenta, has to be there before the recording, and comes from
        # a stream beside the main one, as the recording does.
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = self.take(*batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses
        if self.calls == 4:
            self.batch = [t.clone() for t in batch]
            with torch.cuda.graph(self.graph):
                self.losses = self.take(*self.batch)
        for old, new in zip(self.batch, batch, strict=True):
            old.copy_(new)
        self.graph.replay()
        return self.losses


def make_optimizers(stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels; AdamW for what is a vector, or looked up."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in stage.modules.named_parameters():
        (matrices if p.ndim > 1 and "embeddings." not in name else others).append(p)
    adamw = torch.optim.AdamW(
        others,
        lr=stage.rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=True,
        capturable=others[0].is_cuda,
    )
    return [Muon(matrices, stage.rate), adamw]


@torch.no_grad()
def swap(parameters: list[nn.Parameter], average: list[Tensor]) -> None:
    for p, a in zip(parameters, average, strict=True):
        kept = p.clone()
        p.copy_(a)
        a.copy_(kept)


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def processes() -> int:
    return dist.get_world_size() if distributed() else 1


def main_process() -> bool:
    return rank() == 0


def first_says(answer: bool) -> bool:
    """Return the first process's answer in all processes: it keeps the time."""
    shared = torch.tensor(float(answer))
    if distributed():
        dist.broadcast(shared, src=0)
    return bool(shared)


def share_gradients(parameters: list[nn.Parameter]) -> None:
    """Every process gets the mean of all processes' gradients."""
    if not distributed():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= processes()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Log:
    """Rows of stage, samples seen, seconds, name of a number, the number; and a progress bar."""

    def __init__(self, path: Path, stage: Stage, steps: int, step: int, seconds: float):
        self.path, self.stage = path, stage
        self.start = time.monotonic() - seconds
        self.bar = tqdm(total=steps, initial=step, desc=stage.name, mininterval=5)
        self.sums: dict[str, list[float]] = {}

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        """Note the numbers of a step; every 50 their means are written."""
        self.bar.update()
        for name, value in losses.items():
            self.sums.setdefault(name, []).append(value.item())
        if step % 50 == 0:
            means = {name: sum(values) / len(values) for name, values in self.sums.items()}
            self.write(step, means)
            self.bar.set_postfix_str(" ".join(f"{k} {v:.4f}" for k, v in means.items()))
            self.sums.clear()

    def check(self, step: int, measures: dict[str, float]) -> None:
        self.write(step, measures)
        tqdm.write(f"{self.stage.name} {step * self.stage.batch}: {measures}")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        seen, seconds = step * self.stage.batch, f"{self.seconds():.0f}"
        with self.path.open("a", newline="") as file:
            for name, value in numbers.items():
                csv.writer(file).writerow([self.stage.name, seen, seconds, name, f"{value:.6g}"])
