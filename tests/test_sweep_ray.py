"""Sweeps on a real Ray cluster of two nodes on the loopback address, and what stops them there."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_sweep import SQUIRREL, complete_and_once, limited, rows_of, start, wait_for_rows

from minip2p.sweep import ray as cluster
from minip2p.sweep.worker import Job

# Read when Ray is imported, here and in the commands: or 127.0.0.1 would become the machine's own
# address.
os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'minip2p[ray]'")

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
    """Two nodes with a core each; each actor has one, and one thread."""
    from ray.cluster_utils import Cluster

    both = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **NODE})
    try:
        both.add_node(**NODE)
        both.wait_for_nodes()
        yield both
    finally:
        both.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


def begin(folder: Path, nodes: Any, *more: str, **how: Any) -> Any:
    """Two edits with their source a call of generate: twelve calls."""
    words = ["study.toml", "--out", "out", "--batch", "3", "--address", nodes.address, *more]
    return start(*words, cwd=folder, **how)


def ends(process: Any, status: int = 0) -> str:
    try:
        out, said = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == status, said
    return out + said


def pids(folder: Path) -> list[int]:
    return [int(row["worker"].split(":")[1]) for row in rows_of(folder / "out")]


def test_the_same_as_in_one_process(folder: Path, nodes: Any):
    """Ids, and latents: to 1e-6 of the largest where both use one thread; pixels are the same."""
    ends(begin(folder, nodes, "--latents"))
    words = ["study.toml", "--out", "here", "--batch", "3", "--latents"]
    ends(start(*words, cwd=folder, threads=1))
    complete_and_once(folder / "out", RUNS)
    assert len(set(pids(folder))) == 2
    there, here = ({row["id"]: row for row in rows_of(folder / out)} for out in ("out", "here"))
    assert there.keys() == here.keys()
    for id in there:
        x, y = (np.load(folder / out / f"{id}.npy") for out in ("out", "here"))
        assert abs(x - y).max() <= 1e-6 * abs(y).max()
        assert there[id]["changed"] == here[id]["changed"]


def test_workers_of_its_own_on_this_machine(folder: Path):
    words = ["--out", "out", "--workers", "2"]
    ends(start("study.toml", *words, cwd=folder))
    complete_and_once(folder / "out", RUNS)
    assert len(set(pids(folder))) == 2


def run_script(*words: str, threads: int = 1) -> None:
    """A command of the repository's, which the package does not install."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_emojibench_among_workers(tmp_path: Path):
    """The figures, but for the intervals' own draws, are those of one process."""
    told = {}
    for name, more in (("here", []), ("there", ["--workers", "2"])):
        words = ["captions", "sweep", "refine", "--quick", "--steps", "2"]
        run_script("-m", "world", *words, "--out", str(tmp_path / name), *more)
        told[name] = json.loads((tmp_path / name).read_text())["parts"]
    assert told["here"].keys() == told["there"].keys()
    for part, rows in told["here"].items():
        assert rows.keys() == told["there"][part].keys()
        for row, figures in rows.items():
            for name, figure in figures.items():
                there = told["there"][part][row][name]
                assert there["n"] == figure["n"]
                assert there["value"] == pytest.approx(figure["value"], rel=1e-4), (part, row, name)


def test_pie_bench_among_workers(tmp_path: Path):
    run_script("benchmarks/pie.py", "--make", str(tmp_path / "set"))
    rows = {}
    for name, more in (("here", []), ("there", ["--workers", "2"])):
        words = ["benchmarks/pie.py", str(tmp_path / "set"), "--steps", "2", "--device", "cpu"]
        run_script(*words, "--out", str(tmp_path / name), *more)
        lines = (tmp_path / name / "results.jsonl").read_text().splitlines()[1:]
        rows[name] = {row["id"]: row for row in map(json.loads, lines)}
        assert len(lines) == len(rows[name]) == 6
    for id, row in rows["here"].items():
        there = rows["there"][id]
        assert there.keys() == row.keys()
        assert there["psnr"] == pytest.approx(row["psnr"], rel=1e-3)


def test_a_worker_killed_in_a_run(folder: Path, nodes: Any):
    process = begin(folder, nodes)
    wait_for_rows(folder / "out" / "results.jsonl", 4, process)
    killed = pids(folder)[-1]
    os.kill(killed, signal.SIGKILL)
    ends(process)
    complete_and_once(folder / "out", RUNS)
    assert len(set(pids(folder)) - {killed}) == 2  # another has come in its place


def test_a_node_stopped(folder: Path, nodes: Any):
    """Where nothing else is free, its run waits for the other worker to end, and is made there."""
    process = begin(folder, nodes)
    wait_for_rows(folder / "out" / "results.jsonl", 4, process)
    (second,) = nodes.list_all_nodes()[1:]
    nodes.remove_node(second, allow_graceful=False)
    try:
        ends(process)
    finally:
        nodes.add_node(**NODE)
        nodes.wait_for_nodes()
    complete_and_once(folder / "out", RUNS)


def test_the_driver_killed_and_started_again(folder: Path, nodes: Any):
    process = begin(folder, nodes)
    wait_for_rows(folder / "out" / "results.jsonl", 4, process)
    process.kill()
    process.communicate()
    assert 4 <= len(rows_of(folder / "out")) < RUNS
    ends(begin(folder, nodes))
    complete_and_once(folder / "out", RUNS)


def test_a_disk_that_refuses(folder: Path, nodes: Any):
    said = ends(begin(folder, nodes, preexec_fn=lambda: limited(9000)), status=2)
    assert "can't be written" in said and "Traceback" not in said
    ends(begin(folder, nodes))
    complete_and_once(folder / "out", RUNS)


def test_a_run_that_raises(folder: Path, nodes: Any):
    target = f"{SQUIRREL} at night"  # too long for a word swap
    (folder / "study.toml").write_text(f'{STUDY}\nedit = ["auto", "swap"]'.replace(
        'swap = ["squirrel=lion", "burger=cake"]', f'to = ["a lion eating a burger", "{target}"]'
    ))  # fmt: skip
    said = ends(begin(folder, nodes), status=1)
    assert f"{2 * RUNS} runs, {2 * RUNS} of them new, {RUNS // 2} with an error" in said
    for row in rows_of(folder / "out"):
        raises = row["to"] == target and row["edit"] == "swap"
        assert ("use Refine" in row["error"]) if raises else "error" not in row


def test_a_model_that_is_not_there_is_a_sentence(folder: Path, nodes: Any):
    study = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(f'model = "{folder}/none"\n{study}')
    said = ends(begin(folder, nodes), status=2)
    assert "A worker can't load the model: " in said and "Traceback" not in said


def test_a_run_that_always_loses_its_worker_is_an_error_and_the_others_go_on(nodes: Any):
    class Fragile:
        def tell(self) -> dict[str, str]:
            return {"id": "m"}

        def run(self, jobs: list[Job]) -> list[tuple[dict[str, str], dict[str, bytes]]]:
            if jobs[0].id == "deadly":
                os._exit(1)
            return [(job.row, {}) for job in jobs]

    groups = [[Job(id, "s", {}, {"id": id})] for id in ("a", "deadly", "b", "c", "d")]
    ray.init(nodes.address, log_to_driver=False)
    try:
        make = ray.remote(max_restarts=1, max_task_retries=-1, num_cpus=1)(Fragile).remote
        telling = {(actor := make()).tell.remote(): actor for _ in range(2)}
        made = list(cluster.spread(ray, make, telling, {"id": "m"}, groups))
    finally:
        ray.shutdown()
    rows = {row["id"]: row for some in made for row, _ in some}
    assert len(made) == 5 and set(rows) == {"a", "deadly", "b", "c", "d"}
    assert [id for id in rows if "error" in rows[id]] == ["deadly"]
