"""Try faults and hostile inputs, and count by group what held: python tests/trials.py [GROUP ...]

A trial fell unless it ended in time with the right result, or with one sentence and nothing
changed. What was mended has tests of its own; this looks for its neighbours. Full disks need root.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that is forked has one thread

import test_cli
import test_invert
import test_report
import test_store
import test_studio
import test_sweep
import test_weights
import torch
from helpers import Outcome, save_toy
from PIL import Image
from test_studio import BIRD, FILE, JOIN, Server, a_change

import minip2p
from minip2p import AttentionStore, Inversion, UserError, WordSwap, sample
from minip2p.outputs import png
from minip2p.run import Run
from minip2p.sweep import __main__ as sweep
from minip2p.sweep.study import SETTINGS, read

Trials = Iterator[tuple[Any, ...]]  # a name, a function that raises an error, its arguments
TRASH: list[Any] = [None, True, -1, 0, 1.5, 1e308, math.inf, math.nan, 2**70, "", "x", "\x1b[2J"]
TRASH += [[], ["x"], {}, {"x": {}}]
DEEP = "[" * 10**5
NOISE = random.Random(0)
STEP = ["--steps", "1", "--device", "cpu"]


def attempt(call: Callable[..., object], *arguments: Any) -> str:
    """Return what went wrong, or "" if the call ends in a minute or raises a UserError."""
    signal.alarm(60)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            call(*arguments)
    except Exception as error:
        return "" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"[:400]
    finally:
        signal.alarm(0)
    return ""


def judge(outcome: Outcome, *statuses: int) -> None:
    """Raise AssertionError unless a program ended as it should, by default with 0 or 2."""
    assert outcome.status in (statuses or (0, 2)) and "Traceback" not in outcome.err, outcome
    assert "\x1b[2J" not in outcome.out + outcome.err, "an escape sequence is printed"
    assert outcome.status == 0 or len(outcome.messages) == 1, outcome.messages


def run(main: Callable[..., int], words: list[Any], *statuses: int) -> None:
    """Run a program in this process, and judge it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(map(str, words)))
    judge(Outcome(status, out.getvalue(), err.getvalue()), *statuses)


def sweeps(folder: Path, toy: Path) -> Trials:
    def content(out: Path) -> Any:
        rows = sorted(test_sweep.rows_of(out), key=lambda row: row["id"])
        rows = [{k: v for k, v in row.items() if k not in test_sweep.MAKING} for row in rows]
        return rows, {path.name: path.read_bytes() for path in out.glob("*.png")}

    def finish(out: Path) -> None:
        run(sweep.main, [*words, out], 0)
        assert content(out) == expected, "rows or pictures differ"

    out, line = folder / "out", folder / "line.jsonl"
    (folder / "study.toml").write_text(f'model = "{toy}"\n' + test_sweep.STUDY)
    words = [folder / "study.toml", "--batch", "2", "--out"]
    began = time.perf_counter()
    yield "undisturbed", run, sweep.main, [*words, folder / "whole"], 0
    took, expected = time.perf_counter() - began, content(folder / "whole")
    for _ in range(20):
        shutil.rmtree(out, ignore_errors=True)
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=attempt, args=(run, sweep.main, [*words, out]))
        process.start()
        process.join(NOISE.uniform(0, took))
        process.kill()
        process.join()
        yield "SIGKILL", finish, out
    for size in (8, 40, 64, 100, 140) if os.geteuid() == 0 else ():  # KiB; the sweep needs 190
        disk = folder / f"{size}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "tmpfs", disk, "-o"]
        subprocess.run([*mount, f"size={size}k"], check=True)
        try:
            yield f"disk of {size} KiB", run, sweep.main, [*words, disk / "out"], 2
            subprocess.run([*mount, "remount,size=4m"], check=True)
            yield f"disk of {size} KiB, enlarged", finish, disk / "out"
        finally:
            subprocess.run(["umount", disk], check=True)

    def refuse(place: Path, text: str) -> None:
        command = ["report"] if place.name == "report.html" else words
        run(sweep.main, [*command, place.parent], 2)
        assert place.read_text() == text, "touched"

    for name in ("results.jsonl", "report.html", ".lock"):
        for text in ('{"experiment": 7}\n', "mine", DEEP, '{"id": "x"}\n', "[1, 2]\n"):
            place = shutil.copytree(folder / "whole", folder / f"{name}{len(text)}") / name
            if name == ".lock":
                place.unlink()
                place.symlink_to("thesis.tex")
            place.write_text(text)
            yield f"foreign {name}", refuse, place, text
    texts = [json.dumps({"prompt": "a"} | {n: v}) for n in (*SETTINGS, "nosuch") for v in TRASH]
    for text in (*texts, DEEP, "\ufeffprompt = 'a'", "\0", "", "a = " + DEEP, "a." * 10**5 + "b=1"):
        for path in (line, folder / "line.toml"):
            path.write_text(text)
            yield f"study of {text[:60]}", read, path


def files(folder: Path, toy: Path) -> Trials:
    model, file, out = minip2p.load(toy, device="cpu"), folder / "file", folder / "out"
    inversion = minip2p.invert(model, BIRD, "a bird", num_inference_steps=2)
    inversion.save(file)
    changes: list[Any] = [({n: v}, {}) for n in (*inversion.settings, "model") for v in TRASH]
    for name, kept in minip2p.saved.read(file, "inversion")[1].items():
        tensors = kept[:0], kept[:1], kept[None], kept.half(), kept.double() * math.nan
        changes += [({}, {name: tensor.clone()}) for tensor in tensors] + [({}, {name: None})]

    def follow() -> None:
        minip2p.generate(model, ["a bird", "a cat"], source=Inversion.load(file))

    for change in changes:
        inversion.save(file)
        test_invert.rewrite(file, *change)
        yield f"inversion with {str(change)[:60]}", follow
    minip2p.generate(model, "a", num_inference_steps=1, store=True).attention.save(file)
    for name in ("size", "calls", "prompts", "sites", "options"):
        for change in ({name: value} for value in TRASH):
            test_store.changed(file, out, change.__ror__)
            yield f"store with {change}", AttentionStore.load, out

    damaged = folder / "damaged"
    for path in [p for p in toy.rglob("*.json") if p.name not in ("vocab.json", "tokenizer.json")]:
        table = json.loads(path.read_text())
        for name, value in [(n, v) for n in table for v in [65536, *NOISE.sample(TRASH, 5)]]:
            shutil.copytree(toy, damaged, copy_function=os.link)
            (damaged / path.relative_to(toy)).unlink()
            (damaged / path.relative_to(toy)).write_text(json.dumps(table | {name: value}))
            yield f"{path.relative_to(toy)} with {name} = {value!r}", minip2p.load, damaged
            shutil.rmtree(damaged)
    shutil.copytree(toy, damaged)
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(100):
        length, header, size = test_weights.mutate(NOISE, whole[8:end], len(whole))
        weights.write_bytes((length.to_bytes(8, "little") + header + whole[end:])[:size])
        yield "weights with another header", minip2p.load, damaged

    Image.new("1", (16384, 10800)).save(folder / "bomb.png")
    (folder / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "cut.png").write_bytes(BIRD.read_bytes()[:500])
    os.mkfifo(folder / "pipe.png")
    words = ["--out", folder / "drawn", "--model", toy, *STEP, "--image"]
    for path in (*folder.glob("*.png"), folder, "/dev/zero", "/dev/null", "/proc/self/mem"):
        yield f"--image {path}", run, sample.main, ["a bird", *words, path]
        yield f"--repeat {path}", run, sample.main, ["--repeat", path], 2
    good = Run(["a cat", "a dog"], [WordSwap()], num_inference_steps=1, model=str(toy)).to_dict()
    records = [*test_cli.RECORDS.values()]
    records += [{"run": good | {n: v}} for n in good for v in NOISE.sample(TRASH, 4)]
    records += [{"run": good, "options": {n: v}} for n in ("html", "maps") for v in TRASH]
    words = ["--out", folder / "drawn", "--repeat", folder / "record.png"]
    for record in records:
        words[-1].write_bytes(png(Image.new("RGB", (8, 8)), record))
        yield f"--repeat of {str(record)[:100]}", run, sample.main, words


def pages(folder: Path, toy: Path) -> Trials:
    def report(results: Path) -> None:
        run(sweep.main, ["report", results])
        for page in results.glob("report.html"):  # or it is refused
            assert not re.search("<script>alert|javascript:", page.read_text()), "a script in it"

    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "secret.png")
    ids = ["../secret", "javascript:alert(1)", "x" * 300, "\0", "0" * 15 + "/", *TRASH]
    rows = [{name: value} for name in ("id", "source") for value in ids]
    for name in ("prompt", "to", "swap", "seed", "blend", "file", "image", "error", "looks_iou"):
        rows += [{name: value} for value in ("</script><script>alert(1)", *TRASH)]
    for i, row in enumerate(rows):
        results = test_report.write_results(folder / f"{i}", [{}, {}])
        with (results / "results.jsonl").open("a") as table:
            text = json.dumps({"id": "f" * 16, "source": "e" * 16} | test_report.ROW | row)
            table.write(text + "\n")
        yield f"report of {row}", report, results
    for data in (b"", BIRD.read_bytes()[:300], b"%!PS-Adobe-3.0 EPSF\n"):
        results = test_report.write_results(folder / f"picture{len(data)}", [{}, {}])
        (results / f"{0:016x}.png").write_bytes(data)
        yield f"report with a picture of {len(data)} bytes", report, results


def studio(folder: Path, toy: Path) -> Trials:
    def start() -> Server:
        return Server(Path(tempfile.mkdtemp(dir=folder)), toy)

    def refuse(path: str, body: Any, **headers: str) -> None:
        began, answer = time.perf_counter(), 0
        with contextlib.suppress(OSError):  # it may close the connection before all of it is sent
            answer = server.post(path, body, **headers)
        seconds = time.perf_counter() - began
        print(f"    status {answer} after {seconds:.2f} s", flush=True)
        time.sleep(1)  # Gradio opens files after its answer
        urllib.request.urlopen(server.address + "/config", timeout=15).close()
        assert answer // 100 in (0, 4) and seconds < 3, f"{answer} after {seconds:.2f} s"

    bomb = io.BytesIO()
    Image.new("1", (16384, 10800)).save(bomb, "PNG")
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    form += BIRD.read_bytes() + b"\r\n--x--\r\n"
    multipart, evil = {"Content-Type": "multipart/form-data; boundary=x"}, "http://evil.example"
    nested = b'{"fn_index": 0, "data":' + b"[" * 30000 + b"]" * 30000 + b"}"
    server = start()
    for name, path, body, headers in [
        ("a path outside", JOIN, a_change(FILE | {"path": str(BIRD)}), {}),
        ("/dev/zero", JOIN, a_change(FILE), {}),
        ("a URL", JOIN, a_change(FILE | {"path": "http://127.0.0.1:9/x.png"}), {}),
        ("another function", JOIN, a_change({}) | {"fn_index": 999}, {}),
        ("deep nesting", JOIN, nested, {}),
        ("another Host", JOIN, a_change({}), {"Host": "evil.example"}),
        ("another Origin", JOIN, a_change({}), {"Origin": evil}),
        ("its upload", "/gradio_api/upload", form, multipart | {"Origin": evil}),
        ("a huge upload", "/gradio_api/upload", form + bytes(2**25), multipart),
        ("a huge picture", "/picture", bytes(2**25), {}),
        ("a bomb", "/picture", bomb.getvalue(), {}),
        ("no picture", "/picture", b"text", {}),
    ]:
        yield name, lambda: refuse(path, body, **headers)  # noqa: B023
    with ThreadPoolExecutor(30) as pool:
        turns = [pool.submit(test_studio.visit, server, f"visitor-{n}") for n in range(30)]
        yield from (("30 visitors at once", turn.result) for turn in turns)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield f"{number.name} with an open page", server.stop, number
        server.process.kill()
        server = start() if number != signal.SIGHUP else server


def memory(folder: Path, toy: Path) -> Trials:
    def megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    def repeat(call: Callable[..., object], *arguments: Any, **settings: Any) -> None:
        sizes = [megabytes() for _ in range(40) if call(*arguments, **settings)]
        assert sizes[-1] - sizes[9] < 15, f"{sizes[-1] - sizes[9]:.0f} MB more"

    model, once = minip2p.load(toy, device="cpu"), {"num_inference_steps": 1}
    yield "40 pictures", lambda: repeat(minip2p.generate, model, ["a cat", "a dog"], **once)
    yield "40 inversions", lambda: repeat(minip2p.invert, model, BIRD, "a bird", **once)
    yield "40 models", repeat, minip2p.load, toy


LINES = """
PYTHONIOENCODING=ascii RUN --out bücher
PYTHONIOENCODING=latin-1 RUN --out 猫
LC_ALL=C PYTHONUTF8=0 RUN --out bücher
RUN --out $(printf 'a\\377')
RUN --out $(printf 'a\\033[2J')
python -W error -m minip2p.sample 'a zyx' MODEL
umask 777; RUN
RUN | true
RUN --explain | head -1
RUN >&-
RUN 2>&-
RUN </dev/null >/dev/full
ulimit -n 40; RUN
ulimit -f 8; RUN
ulimit -v 1200000; RUN --width 1024
ulimit -v 1600000; RUN --width 1024
RUN --out /proc/1/x
mkdir l; ln -s l l/l; RUN --out l/l/l/l
ln -s no d; RUN --out d
env -i PATH=$PATH PYTHONPATH=$PYTHONPATH RUN
HOME=/no TMPDIR=/no RUN
TERM=dumb COLUMNS=1 RUN
mkdir gone; cd gone; rmdir ../gone; RUN
"""  # RUN stands for a run of the command line


def environment(folder: Path, toy: Path) -> Trials:
    variables = os.environ | {"PYTHONPATH": str(test_cli.PACKAGE.parent)}
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    pipes: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
    for n, line in enumerate(LINES.strip().splitlines()):
        command = line.replace("RUN", "python -m minip2p.sample 'a cat' --swap cat=dog MODEL")
        command = command.replace("MODEL", f"--model {toy} {' '.join(STEP)}")
        command = f"mkdir {n}; cd {n}; {command}"
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=variables, **pipes)
        yield line, judge, Outcome(done.returncode, done.stdout, done.stderr)
    for program in ("minip2p", "minip2p.sample", "minip2p.sweep", "minip2p.studio"):
        for module in ("numpy", "torch._C", "torch", "minip2p.weights"):
            interrupt = test_cli.test_an_interruption_of_the_imports
            yield f"SIGINT after {module} of {program}", interrupt, folder, program, module

    def compare() -> None:
        inversion = minip2p.invert(model, BIRD, "a bird", num_inference_steps=1)
        edited = minip2p.generate(model, ["a bird", "a cat"], edit=WordSwap(), source=inversion)
        drawn = minip2p.generate(minip2p.load(toy, device="cpu"), "a cat", num_inference_steps=1)
        results.append([inversion.trajectory, edited.latents, drawn.latents])
        assert all(map(torch.equal, results[0], results[-1])), "another picture"

    model, results = minip2p.load(toy, device="cpu"), list[Any]()
    compare()
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        torch.set_default_dtype(dtype)
        yield f"default dtype {dtype}", compare
    with torch.device("meta"):
        yield "default device", compare


GROUPS = {group.__name__: group for group in (sweeps, files, pages, studio, memory, environment)}


def late(*_: object) -> None:
    raise TimeoutError("no end in a minute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, late)
    warnings.simplefilter("ignore")
    table = ["group        tried  held  fell"]
    for name in options.groups or GROUPS:
        faults = []
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            toy, work = save_toy(Path(folder) / "toy"), Path(folder) / "work"
            work.mkdir()
            for trial, *call in GROUPS[name](work, toy):
                faults.append(attempt(*call))
                print(
                    f"FELL {name}: {trial}: {faults[-1]}\n" * bool(faults[-1]), end="", flush=True
                )
        held = faults.count("")
        table.append(f"{name:12} {len(faults):5} {held:5} {len(faults) - held:5}")
        print(table[-1], flush=True)
    print(*table, sep="\n")


if __name__ == "__main__":
    main()
