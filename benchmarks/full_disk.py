"""Let disks of several sizes become full under a sweep, enlarge them, and let the sweep go on.

    sudo python benchmarks/full_disk.py         mounts a tmpfs for each size, so it needs root

Every sweep must end with one sentence, and its rows and files must in the end be those of a sweep
that had room. The unit test with a simulated full disk is in tests/test_sweep.py.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = [8, 40, 64, 100, 140]  # KiB; a whole sweep needs about 190
STUDY = """
prompt = "a squirrel eating a burger"
swap = ["squirrel=lion", "burger=cake"]
seed = [1, 2, 3]
num_inference_steps = 1
"""


def sweep(study: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minip2p.sweep", str(study), "--out", str(out)]
    return subprocess.run([*command, "--batch", "2"], capture_output=True, text=True)


def content(folder: Path) -> tuple[list[dict], dict[str, bytes]]:
    """Return the rows, without what differs between two sweeps, and the pictures."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").open()]
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "worker")} for row in rows]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    del files["results.jsonl"]
    return sorted(rows, key=lambda row: row["id"]), files


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study, disk = folder / "study.toml", folder / "disk"
        study.write_text(STUDY)
        disk.mkdir()
        sweep(study, folder / "whole")
        for size in SIZES:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True
            )
            try:
                stopped = sweep(study, disk / "out")
                table = disk / "out" / "results.jsonl"
                n_rows = table.read_text().count("\n") if table.exists() else 0
                subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
                resumed = sweep(study, disk / "out")
                is_equal = content(disk / "out") == content(folder / "whole")
            finally:
                subprocess.run(["umount", disk], check=True)
            sentence = stopped.stderr.splitlines()[-1]
            print(
                f"{size} KiB: exit status {stopped.returncode} after {n_rows} rows: {sentence}\n"
                f"    then exit status {resumed.returncode}, equal to the whole sweep: {is_equal}"
            )


if __name__ == "__main__":
    main()
