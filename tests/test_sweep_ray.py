"""Sweeps on a real Ray cluster of two nodes on the loopback address, and what stops them there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pie import pie
from test_sweep import SQUIRREL, assert_complete, resolved, rows_of

import minip2p
from minip2p.sweep.ray import map_unordered
from minip2p.sweep.study import SweepRun

# Ray reads these when it is imported, here and in the commands; without them, 127.0.0.1 becomes the
# machine's own address.
os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'minip2p[ray]'")
pytestmark = pytest.mark.slow

ROOT = Path(minip2p.__file__).parents[1]
SWEEP = ["-m", "minip2p.sweep", "study.toml", "--out"]
RUNS = 24
STUDY = f"""
prompt = "{SQUIRREL}"
swap = ["squirrel=lion", "burger=cake"]
cross_replace_steps = [0.0, 0.5, 1.0]
seed = [1, 2, 3, 4]
num_inference_steps = 4
"""
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Start two nodes with a core each; each actor has one, and one thread."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **NODE})
    try:
        cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def folder(tmp_path: Path, toy_folder: Path) -> Path:
    (tmp_path / "study.toml").write_text(f'model = "{toy_folder}"\n{STUDY}')
    return tmp_path


def start(*words: str, cwd: Path = ROOT, threads: int = 1) -> subprocess.Popen[str]:
    """Start Python in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(table: Path, n: int, process: subprocess.Popen[str]) -> None:
    while not table.exists() or table.read_bytes().count(b"\n") < n:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def begin(folder: Path, nodes: Any, *options: str) -> subprocess.Popen[str]:
    """Start a sweep with two edits and their source in each of twelve calls of generate."""
    words = ["out", "--batch", "3", "--address", nodes.address, *options]
    return start(*SWEEP, *words, cwd=folder, threads=2)


def ends(process: subprocess.Popen[str], status: int = 0) -> str:
    try:
        out, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == status, errors
    return out + errors


def pids(folder: Path) -> list[int]:
    return [int(row["worker"].split(":")[1]) for row in rows_of(folder / "out")]


def test_the_same_as_in_one_process(folder: Path, nodes: Any):
    """Ids, and latents: to 1e-6 of the largest where both use one thread; pixels are the same."""
    ends(begin(folder, nodes, "--latents"))
    ends(start(*SWEEP, "here", "--batch", "3", "--latents", cwd=folder))
    assert_complete(folder / "out", RUNS)
    assert len(set(pids(folder))) == 2
    on_ray, in_process = (
        {row["id"]: row for row in rows_of(folder / out)} for out in ("out", "here")
    )
    assert on_ray.keys() == in_process.keys()
    for id in on_ray:
        x, y = (np.load(folder / out / f"{id}.npy") for out in ("out", "here"))
        assert abs(x - y).max() <= 1e-6 * abs(y).max()
        assert on_ray[id]["changed"] == in_process[id]["changed"]


def test_workers_of_its_own_on_this_machine(folder: Path):
    ends(start(*SWEEP, "out", "--workers", "2", cwd=folder, threads=2))
    assert_complete(folder / "out", RUNS)
    assert len(set(pids(folder))) == 2


def test_pie_bench_among_workers(tmp_path: Path, toy_folder: Path, nodes: Any):
    pie.make_set(tmp_path / "set", n=4, pixels=128)
    settings = ["--model", str(toy_folder), "--steps", "2", "--device", "cpu"]
    words = [str(tmp_path / "set"), *settings, "--out"]
    pie.main([*words, str(tmp_path / "process")])
    on_nodes = [*words, str(tmp_path / "ray"), "--address", nodes.address]
    ends(start("benchmarks/pie.py", *on_nodes))
    rows = {}
    for name in ("process", "ray"):
        lines = (tmp_path / name / "results.jsonl").read_text().splitlines()[1:]
        rows[name] = {row["id"]: row for row in map(json.loads, lines)}
        assert len(lines) == len(rows[name]) == 4
    for id, row in rows["process"].items():
        on_ray = rows["ray"][id]
        assert on_ray.keys() == row.keys()
        assert on_ray["psnr"] == pytest.approx(row["psnr"], rel=1e-3)


def test_a_worker_killed_in_a_run(folder: Path, nodes: Any):
    process = begin(folder, nodes)
    wait_for_rows(folder / "out" / "results.jsonl", 4, process)
    killed = pids(folder)[-1]
    os.kill(killed, signal.SIGKILL)
    ends(process)
    assert_complete(folder / "out", RUNS)
    assert len(set(pids(folder)) - {killed}) == 2  # another has come in its place


def test_a_node_stopped(folder: Path, nodes: Any):
    """If no place is free, its runs wait until the other worker has ended, and are made there."""
    process = begin(folder, nodes)
    wait_for_rows(folder / "out" / "results.jsonl", 4, process)
    (second,) = nodes.list_all_nodes()[1:]
    nodes.remove_node(second, allow_graceful=False)
    try:
        ends(process)
    finally:
        nodes.add_node(**NODE)
        nodes.wait_for_nodes()
    assert_complete(folder / "out", RUNS)


def test_the_driver_killed_and_started_again(folder: Path, nodes: Any):
    process = begin(folder, nodes)
    wait_for_rows(folder / "out" / "results.jsonl", 4, process)
    process.kill()
    process.communicate()
    assert 4 <= len(rows_of(folder / "out")) < RUNS
    ends(begin(folder, nodes))
    assert_complete(folder / "out", RUNS)


def test_a_model_that_is_not_there_is_a_sentence(folder: Path, nodes: Any):
    (folder / "study.toml").write_text(f'model = "{folder}/none"\n{STUDY}')
    printed = ends(begin(folder, nodes), status=2)
    assert "A worker can't load the model: " in printed and "Traceback" not in printed


def test_a_run_that_always_loses_its_worker_is_an_error_and_the_others_go_on(nodes: Any):
    class Fragile:
        def describe(self) -> dict[str, str]:
            return {"id": "m"}

        def run(self, runs: list[SweepRun]) -> list[tuple[dict[str, str], dict[str, bytes]]]:
            if runs[0].id == "deadly":
                os._exit(1)
            return [(run.row, {}) for run in runs]

    run = resolved().run
    groups = [[SweepRun(id, "s", run, {"id": id})] for id in ("a", "deadly", "b", "c", "d")]
    ray.init(nodes.address, log_to_driver=False)
    try:
        make = ray.remote(max_restarts=1, max_task_retries=-1, num_cpus=1)(Fragile).remote
        starting = {(actor := make()).describe.remote(): actor for _ in range(2)}
        outcomes = list(map_unordered(ray, make, starting, {"id": "m"}, groups))
    finally:
        ray.shutdown()
    rows = {row["id"]: row for group in outcomes for row, _ in group}
    assert len(outcomes) == 5 and set(rows) == {"a", "deadly", "b", "c", "d"}
    assert [id for id in rows if "error" in rows[id]] == ["deadly"]
