"""Compare what an edit costs over plain sampling in two editions of minip2p.

    git worktree add ../second 6d1bafa
    python benchmarks/editions.py --other ../second                 the bundled model
    python benchmarks/editions.py --other ../second --size 32 64    SD 1.5's size, random weights

Each edition runs in a process of its own. They take turns call by call, and each call is timed in
its process. Printed are medians of the rounds' ratios to the plain call of the same edition in the
same round, and of this edition's seconds to the other's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
PROMPTS = ["a painting of a squirrel eating a burger", "a painting of a lion eating a burger"]
SIDES = ("plain", "swap", "per-word windows", "outside of the windows", "swap and blend")


def worker(size: int) -> None:
    """Make one guided UNet call for each name that is read, and answer with its seconds."""
    import torch

    import minip2p
    from minip2p import LocalBlend, WordSwap, text
    from minip2p.edit import bind

    attention: Any = minip2p.attention

    # The names of this edition, and those of the editions before it.
    cached_context = getattr(attention, "CachedContext", None) or attention.Words
    prompt_rows = getattr(attention, "PromptRows", None) or attention.Guided
    place = (25, 50, 0) if hasattr(attention, "PromptRows") else (25, 50)  # call, calls, timestep

    torch.set_num_threads(os.cpu_count() or 1)
    model: Any = minip2p.load(device="cpu")
    tokens = [text.tokenize(model.tokenizer, prompt) for prompt in PROMPTS]
    unet, n, side = model.unet, len(PROMPTS), size or 16
    if size:
        torch.manual_seed(0)
        unet = minip2p.unet.UNet().eval().requires_grad_(False)
    width = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.in_features
    context = cached_context(
        torch.randn(2 * n, 77, width, generator=torch.Generator().manual_seed(1))
    )
    x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(2))
    x = x.expand(2 * n, -1, -1, -1)
    edits = {
        "plain": None,
        "swap": WordSwap(1.0, 1.0),
        "per-word windows": WordSwap({"default_": 1.0, "lion": 0.2}, 1.0),
        "outside of the windows": WordSwap(0.2, 0.2),
        "swap and blend": WordSwap(1.0, 1.0, LocalBlend("lion")),
    }
    coarse = (side, side) if side <= 16 else (16, 16)  # a UNet of three levels that attend
    bound: dict[str, Any] = {
        name: bind(edit, tokens, latent_size=(side, side), coarse=coarse, defaults=model.defaults)
        for name, edit in edits.items()
    }

    @torch.inference_mode()
    def call(name: str) -> float:
        start = time.perf_counter()
        step_hook = bound[name] and bound[name].at(*place)
        unet(x, 501, context, step_hook and prompt_rows(step_hook, n))
        return time.perf_counter() - start

    for line in sys.stdin:
        print(call(line.strip()), flush=True)


def start(package: Path, size: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", str(size)],
        env={**os.environ, "PYTHONPATH": str(package)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def compare(
    editions: dict[str, Path], size: int, rounds: int, sides: tuple[str, ...] = SIDES
) -> None:
    running = {name: start(path, size) for name, path in editions.items()}
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for side in sides if turn % 2 else sides[::-1]:
            for name in list(running) if turn % 2 else list(running)[::-1]:
                process = running[name]
                assert process.stdin and process.stdout
                time.sleep(0.02)  # the other process's threads still spin for some milliseconds
                print(side, file=process.stdin, flush=True)
                took = float(process.stdout.readline())
                if turn:  # the first only warms up
                    seconds.setdefault((name, side), []).append(took)
    for process in running.values():
        process.communicate()
    this, other = editions
    print(f"{size or 16} x {size or 16} latents, {rounds} rounds: medians")
    for side in sides:
        shares = {
            name: statistics.median(
                a / b for a, b in zip(seconds[name, side], seconds[name, "plain"], strict=True)
            )
            for name in editions
        }
        pairs = zip(seconds[this, side], seconds[other, side], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        row = {"side": side, **{f"{k} / plain": round(v, 3) for k, v in shares.items()}}
        print(json.dumps(row | {f"{this} / {other}": round(ratio, 3)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, help="the other edition's folder")
    parser.add_argument(
        "--size", type=int, nargs="*", default=[0], help="latents; 0: bundled model"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--few", action="store_true", help="plain and swap alone")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker)
        return
    if not args.other or not (args.other / "minip2p").is_dir():
        parser.error("--other names a folder with another edition's minip2p/ in it")
    for size in args.size:
        sides = SIDES[:2] if args.few else SIDES
        compare({"this": HERE, "other": args.other.resolve()}, size, args.rounds, sides)


if __name__ == "__main__":
    main()
