"""Fixtures that all tests share, and which tests are run and may be skipped.

Everything is offline, deterministic and on one thread; the models are loaded once a session.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# torch and the hub client read these when they are imported, so they stand before the imports.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of pytest-xdist share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # do not spin on cores shared with others
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums on every CUDA run

import hypothesis
import pytest
import torch
from helpers import Outcome, save_toy

import minip2p
from minip2p import sample
from minip2p.text import Tokenizer
from minip2p.weights.clip import load_tokenizer

# TF32 keeps 10 bits of the mantissa, too few for parity in float32. cuDNN has it on by default.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.deterministic = True

# The same examples in every run, and none is too slow for a busy machine.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=100
)
hypothesis.settings.load_profile("repeatable")


# --- which tests run ------------------------------------------------------------------------------

NO_GPU = "needs a CUDA device"

# These files take longest and begin first, in this order: started last, one would keep a single
# worker busy. Each worker has its next file at once, so short ones follow the two longest.
LONG = ["docs", "sweep_ray", "train", "prompt_to_prompt", "world", "weights", "studio", "invert"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rest",
        action="store_true",
        help="run the tests that the last run left out: the slow ones and those that it skipped. "
        "A skip is an error then, unless the test needs a CUDA device",
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many workers `-n auto` means: a core each, at most eight, one for a single file.

    Tests of one file stay in one worker (`--dist loadfile`), so a single file needs no workers.
    """
    files = {argument.split("::")[0] for argument in config.args}
    if all(file.endswith(".py") for file in files) and len(files) == 1:
        return 0
    return min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1, 8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))
    if config.getoption("rest"):
        skipped = tuple(config.cache.get("minip2p/skipped", []))  # tests, and files as a whole
        rest = [
            item
            for item in items
            if item.get_closest_marker("slow") or item.nodeid.startswith(skipped)
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in rest])
        items[:] = rest


class Skips:
    """Remember the skipped tests for `--rest`, list them, and fail that run because of them."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.reasons: dict[str, str] = {}  # of each test, or of a file that is skipped as a whole

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.add(report)

    def add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):  # an xfail has none
            self.reasons[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")

    def errors(self) -> list[str]:
        strict = self.config.getoption("rest")
        return [test for test, reason in self.reasons.items() if strict and reason != NO_GPU]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        skipped = [test for test, reason in self.reasons.items() if reason != NO_GPU]
        if hasattr(self.config, "cache"):  # not with -p no:cacheprovider
            self.config.cache.set("minip2p/skipped", skipped)
        if self.errors() and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for test in self.errors():
            terminalreporter.write_line(f"ERROR {test} was skipped: {self.reasons[test]}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the workers report to the process that started them
        config.pluginmanager.register(Skips(config))


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model() -> minip2p.StableDiffusion:
    """Load the bundled model. A test that changes it takes a copy."""
    return minip2p.load(device="cpu")


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a narrow model with random weights, for tests that only need a run to end."""
    return save_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def toy(toy_folder: Path) -> minip2p.StableDiffusion:
    """Load the narrow model: the bundled one's tokenizer and sizes, and pictures of nonsense."""
    return minip2p.load(toy_folder, device="cpu")


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save one random model in every layout of files: see models.py."""
    from models import make_layouts

    return make_layouts(tmp_path_factory.mktemp("layouts"))


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def run(
    toy: minip2p.StableDiffusion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Callable[..., Outcome]:
    """Run the command line in this process and in an empty folder, with the narrow model.

    Another model than the bundled one, or another way to load it, is loaded as asked for.
    """
    usual = {"tokenizer": None, "device": None, "dtype": torch.float32, "ema": None}

    def load(source: str, **how: Any) -> minip2p.StableDiffusion:
        return toy if source == "emoji" and how == usual else minip2p.load(source, **how)

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        status = sample.main(words)
        return Outcome(status, *capsys.readouterr())

    monkeypatch.setattr(sample, "load", load)
    monkeypatch.setattr(sample.fast, "keep_memory", lambda: None)  # it is for whole processes
    monkeypatch.setattr("warnings.formatwarning", None)  # main() sets it: it is to be set back
    monkeypatch.chdir(tmp_path)
    return run


# --- the genuine tokenizer ------------------------------------------------------------------------

# The genuine vocabulary of 49,408 tokens comes from the wheel of open_clip_torch (MIT), which has
# OpenAI's list of merges in it. The four files made of it are, byte for byte, those of the Stable
# Diffusion 1.5 repository on the hub.
CLIP_WHEEL = "open_clip_torch==3.3.0"
CLIP_MERGES = "open_clip/bpe_simple_vocab_16e6.txt.gz"
SHA256 = {
    "wheel": "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
    CLIP_MERGES: "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
    "vocab.json": "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
    "special_tokens_map.json": "c4864a9376a8401918425bed71fc14fc0e81f9b59ec45c1cf96cccb2df508eac",
    "tokenizer_config.json": "00439066fcba73de57644cf41e4e3b9f2dbb09d7f3fc2005898ba52399045882",
}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
START, END = "<|startoftext|>", "<|endoftext|>"


def check(name: str, content: bytes) -> bytes:
    """Return `content` unchanged. Raises ValueError if it is not the file we know by that name."""
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != SHA256[name]:
        raise ValueError(f"{name} of {CLIP_WHEEL}: sha256 {sha256}, expected {SHA256[name]}")
    return content


def download_clip_merges(folder: Path) -> list[str]:
    """Download the wheel into `folder` and return its 48,894 merges, e.g. "i n"."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "-d", str(folder), CLIP_WHEEL], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    check("wheel", wheel.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(check(CLIP_MERGES, archive.read(CLIP_MERGES))).decode().split("\n")
    return lines[1:48895]  # the first line is a version, the rest CLIP does not use


def clip_tokenizer_files(merges: list[str]) -> dict[str, bytes]:
    """Build the hub's tokenizer files from the merges: file name -> content."""
    # Every byte is written as one printable character: itself, or one from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [*map(chr, printable), *(chr(0x100 + n) for n in range(0x100 - len(printable)))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, START, END])}

    def special(content: str, **fields: str) -> dict[str, object]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"content": content, **flags, **fields}

    def special_tokens(**fields: str) -> dict[str, object]:
        start, end = special(START, **fields), special(END, **fields)
        return {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": END}

    config = {
        **special_tokens(__type="AddedToken"),
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }

    def as_json(value: object) -> bytes:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        return text.encode()

    return {
        "vocab.json": as_json(vocab),
        "merges.txt": ("#version: 0.2\n" + "\n".join(merges) + "\n").encode(),
        "tokenizer_config.json": as_json(config),
        "special_tokens_map.json": as_json(special_tokens()),
    }


def is_clip_tokenizer(folder: Path) -> bool:
    try:
        for name in TOKENIZER_FILES:
            check(name, (folder / name).read_bytes())
    except (OSError, ValueError):
        return False
    return True


@pytest.fixture(scope="session")
def clip_tokenizer_dir() -> Path:
    """A folder with the genuine CLIP tokenizer, downloaded once per user and kept in the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minip2p"
    folder = cache / "clip-tokenizer"
    if is_clip_tokenizer(folder):
        return folder

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        try:
            merges = download_clip_merges(Path(temporary))
        except (OSError, subprocess.SubprocessError):
            reason = f"pip cannot download {CLIP_WHEEL}, which holds the genuine CLIP vocabulary"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        ready = Path(temporary) / "ready"
        ready.mkdir()
        for name, content in clip_tokenizer_files(merges).items():
            (ready / name).write_bytes(check(name, content))
        shutil.rmtree(folder, ignore_errors=True)  # there only if it is damaged
        try:
            ready.rename(folder)
        except OSError:  # another run was faster
            if not is_clip_tokenizer(folder):
                raise
    return folder


@pytest.fixture(scope="session")
def clip_tokenizer(clip_tokenizer_dir: Path) -> Tokenizer:
    """Return the genuine CLIP tokenizer as minip2p loads it."""
    return load_tokenizer(clip_tokenizer_dir)


@pytest.fixture(scope="session")
def reference_tokenizer(clip_tokenizer_dir: Path) -> Any:
    """Return the genuine CLIP tokenizer as transformers loads it, for the reference."""
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(clip_tokenizer_dir)
