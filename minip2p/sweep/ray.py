"""The same work on Ray (Moritz et al. 2018): an actor for each GPU, or for a share of the CPUs.

Placement, retries and restarts are Ray's. Here is only who gets what next.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch

from .. import fast
from ..errors import check
from .results import Files, Row
from .study import Settings

# From groups of jobs to what was made of each. A job has a `row`, as Job does.
Work = Callable[[Sequence[Sequence[Any]]], Iterable[list[tuple[Row, Files]]]]
RESTARTS = 5  # of a worker, before its loss is the error of what it was doing


class Actor:
    """A worker in a process of its own, which is made, and loads its model, when first asked.

    kind: the worker's class; its objects have `tell` and `run`, as Worker does.
    """

    def __init__(self, kind: Callable[..., Any], arguments: tuple[Any, ...], threads: int):
        self.kind, self.arguments = kind, arguments
        torch.set_num_threads(threads)
        fast.keep_memory()

    @cached_property
    def worker(self) -> Any:
        return self.kind(*self.arguments)

    def tell(self) -> Settings:
        return self.worker.tell()

    def run(self, jobs: Sequence[Any]) -> list[tuple[Row, Files]]:
        return self.worker.run(jobs)


@contextmanager
def cluster(
    kind: Callable[..., Any],
    arguments: tuple[Any, ...],
    device: str | None,
    workers: int | None,
    address: str | None,
) -> Iterator[tuple[Settings, Work]]:
    """What a worker of these arguments tells, and a function from groups to what was made.

    kind: Worker, or a class like it. It gets one argument more: how many share its memory.
    device: "cpu" if it is to be that, even on nodes that have GPUs.
    workers: by default one for each GPU, or where there is none for each node.
    address: of a cluster; None: one on this machine alone, for as long as this lasts.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    if not address:  # else Ray takes the machine's own address even for 127.0.0.1
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("--workers and --address need Ray: pip install 'minip2p[ray]'.") from None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address, **quiet)
        else:
            cpus = max(workers or 1, os.cpu_count() or 1)
            here = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
            ray.init("local", num_cpus=cpus, object_store_memory=2**28, **here, **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"There is no Ray cluster at {address}: {error}") from None
    try:
        share, n, threads, beside = shares(ray, workers, cpu=device == "cpu")
        # Retries without an end: while a lost node is not yet known as lost, each fails at once.
        actor_of = ray.remote(max_restarts=RESTARTS, max_task_retries=-1, **share)(Actor)
        make = partial(actor_of.remote, kind, (*arguments, beside), threads)
        telling = {(actor := make()).tell.remote(): actor for _ in range(n)}
        (first,), _ = ray.wait(list(telling))
        model = told(ray, first)
        yield model, partial(spread, ray, make, telling, model)
    finally:
        ray.shutdown()


def shares(ray: Any, workers: int | None, cpu: bool) -> tuple[dict[str, int], int, int, int]:
    """What an actor takes of the cluster, how many there are, its threads, others on its node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
    n = workers or (0 if cpu else gpus) or len(nodes)
    largest = int(max(node.get("CPU", 0) for node in nodes))
    threads = max(1, min(cpus // n, largest))
    if gpus and not cpu:
        return {"num_gpus": 1}, n, threads, 0
    return {"num_cpus": threads}, n, threads, (n - 1) // len(nodes)


def told(ray: Any, ref: Any, task: str = "load the model") -> Any:
    """The result of a task. Raises ValueError if it raised there."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # what a sweep's run raises is in its row
        raise ValueError(f"A worker can't {task}: {error.cause}") from None


def spread(
    ray: Any,
    make: Callable[[], Any],
    telling: Mapping[Any, Any],
    model: Settings,
    groups: Sequence[Sequence[Any]],
) -> Iterator[list[tuple[Row, Files]]]:
    """What was made, as it comes. Each actor has a group at a time, from when it has told.

    make: a new actor. telling: actors by their first task, which tells their model.
    """
    todo, left, busy = iter(groups), len(groups), dict(telling)
    doing: dict[Any, Sequence[Any]] = {}
    while left:
        (ref,), _ = ray.wait(list(busy))
        actor, group = busy.pop(ref), doing.pop(ref, ())
        try:
            made = told(ray, ref, "do its work" if group else "load the model")
        except ray.exceptions.RayError as error:  # its process was lost, again and again
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            check(group, f"A worker can't be started: {said}")
            made = [(job.row | {"error": said}, {}) for job in group]
            ray.kill(actor)
            actor = make()
            busy[actor.tell.remote()] = actor
        else:
            same = group or made["id"] == model["id"]
            check(same, "Two workers have different models in the same place: copy one of them.")
            following = next(todo, None)
            if following is None:  # its place is free, for one that has lost its node
                ray.kill(actor)
            else:
                ref = actor.run.remote(following)
                busy[ref], doing[ref] = actor, following
        if group:
            left -= 1
            yield made
