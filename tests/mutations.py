"""Break the package on purpose, one line at a time, and check that the tests see it.

    python tests/mutations.py            all, and print a table of what was caught and what escaped
    python tests/mutations.py blend pndm those whose name contains one of these words

Each mutation replaces a text that stands once in a file, in a temporary copy of the repository, and
names the tests that must fail: a file, and with " -k " an expression. The copy's tests run in a
forked process, so that torch and its companions are imported once.
"""

import contextlib
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    name: str
    file: str  # of minip2p
    old: str
    new: str
    tests: str


P2P = "test_prompt_to_prompt.py -k "
REFERENCE = P2P + "test_the_reference_ends_at_the_same_latents and "

MUTATIONS = [
    # Prompts, words and tokens
    Mutation("a shared token is not divided", "align.py", "= 1 / len(new)", "= 1",
             "test_align.py -k test_word_swap"),
    Mutation("the shift is forgotten", "align.py", "min(target.end + i - source.end, LENGTH - 1)",
             "i", "test_align.py -k test_word_swap"),
    Mutation("a mismatch counts as a match", "align.py", "(1 if a == b else -1)", "1",
             "test_align.py -k test_refinement"),
    Mutation("padding takes over the source's words", "align.py",
             "exists[target.end + 1 : padding] = 0", "pass", "test_align.py -k test_refinement"),
    Mutation("windows are not rounded first", "align.py", ".round(decimals=9).floor()", ".floor()",
             "test_align.py -k test_calls_of"),
    Mutation("windows are rounded up", "align.py", ".floor().long()", ".ceil().long()",
             "test_align.py -k test_calls_of"),
    Mutation("case counts in words", "words.py", ", text, re.IGNORECASE)", ", text)",
             "test_align.py -k test_find"),
    Mutation("a part of a word is found", "words.py", "if start >= end and is_whole:",
             "if start >= end:", "test_align.py -k test_find"),
    # The edit
    Mutation("a window one call too short", "edit.py", "(call < end)", "(call < end - 1)",
             REFERENCE + "swap_1_to_1"),
    Mutation("a window one call too long", "edit.py", "(call < end)", "(call <= end)",
             REFERENCE + "swap_1_to_1"),
    Mutation("added words take over attention", "edit.py", "share = alpha * self.exists",
             "share = alpha * 1.0", REFERENCE + "refine_adds_words"),
    Mutation("weights end with their window", "edit.py", "alpha | self.everywhere", "alpha",
             REFERENCE + "reweight_without_any_window"),
    Mutation("self-attention is kept at finer maps only", "edit.py",
             "layer.height * layer.width <= self.coarse[0]",
             "layer.height * layer.width < self.coarse[0]", REFERENCE + "swap_1_to_1"),
    Mutation("self windows are not read", "edit.py",
             "torch.tensor(window(self_window), dtype", "torch.tensor((0.0, 1.0), dtype",
             REFERENCE + "swap_1_to_1"),
    Mutation("every edit has the first one's windows", "edit.py",
             "r, edit, alignment = row\n", "r, edit, alignment = row\n    r = 1\n",
             REFERENCE + "a_list_of_different"),
    # Attention and its linear form
    Mutation("a wrong scale of the map", "attention.py", "q.shape[-1] ** -0.5",
             "q.shape[-1] ** -0.4", "test_hooks.py -k is_word_swap"),
    Mutation("hooks act in reverse", "attention.py",
             "for hook in self.at_layer(layer):\n            probs",
             "for hook in reversed(self.at_layer(layer)):\n            probs",
             "test_hooks.py -k test_each_hook_sees"),
    Mutation("unconditional rows come first", "attention.py", "torch.cat([edited, plain])",
             "torch.cat([plain, edited])", "test_hooks.py -k is_word_swap"),
    Mutation("a mapper transposed where no map is written", "linear_edit.py",
             "self.mappers[:, None].to(", "self.mappers.mT[:, None].to(",
             REFERENCE + "swap_1_to_2"),
    Mutation("a mapper transposed on maps", "linear_edit.py",
             "edited[rows] @ mappers[:, None].to", "edited[rows] @ mappers.mT[:, None].to",
             P2P + "test_every_layer_with_guidance"),
    Mutation("rows keep their maps as a whole", "linear_edit.py",
             "values = v if self.keep is None else scale_tokens(self.keep, v)", "values = v",
             REFERENCE + "refine_adds_words"),
    Mutation("maps come from the edited row", "linear_edit.py",
             "rows[: len(from_source)][from_source] = 0", "pass", REFERENCE + "swap_1_to_1"),
    Mutation("stored words are read before the weights", "linear_edit.py",
             "if weights is not None:\n            probes", "if False:\n            probes",
             P2P + "test_words_are_columns or test_every_layer_with_guidance"),
    Mutation("weights act on the map that a blend reads", "linear_edit.py",
             "replace(self, token_weights=None, probes=())", "replace(self, probes=())",
             REFERENCE + "blend_where_a_silenced"),
    # The blend
    Mutation("the mask is not widened", "blend.py", "3, stride=1, padding=1", "1, stride=1",
             REFERENCE + "blend"),
    Mutation("nothing is subtracted", "blend.py", " & ~self.above(subtract)", "",
             REFERENCE + "subtracts"),
    Mutation("the threshold is not of the maximum", "blend.py", "self.spec.threshold * highest",
             "self.spec.threshold", REFERENCE + "blend"),
    Mutation("the blend looks at the edit alone", "blend.py", "self.maps[[0, self.r]]",
             "self.maps[[self.r, self.r]]", REFERENCE + "blend"),
    Mutation("the blend begins at once", "edit.py", "calls_of((blend.spec.start, 1.0)",
             "calls_of((0.0, 1.0)", REFERENCE + "starts_late"),
    # Samplers
    Mutation("pndm does not average its first step", "scheduler.py", "(eps + e[0]) / 2", "eps",
             "test_schedulers.py -k diffusers_to_the_bit"),
    Mutation("pndm remembers the run before", "scheduler.py", "self.history, self.first_x = [], x",
             "self.first_x = x", "test_known_bugs.py -k b08"),
    Mutation("ddim ends at a clean latent", "scheduler.py", "else self.alpha_bar[0]",
             "else self.alpha_bar.new_ones(())", "test_schedulers.py -k diffusers_to_the_bit"),
    Mutation("new noise adds to the variance", "scheduler.py", "(1 - a_next - sigma**2)",
             "(1 - a_next)", "test_schedulers.py -k with_new_noise"),
    Mutation("trailing steps begin one later", "scheduler.py", "round(n + i * stride) - 1",
             "round(n + i * stride) - 2", "test_schedulers.py -k by_hand"),
    Mutation("every prompt has its own noise in eta", "scheduler.py", "shape = 1, *x.shape[1:]",
             "shape = x.shape", "test_parity.py -k eta_draws"),
    # The loop
    Mutation("guidance on row 0", "pipeline.py", "model_input = torch.cat([x, x[rows - n :]])",
             "model_input = torch.cat([x, x[:n]])", "test_hooks.py -k unguided"),
    Mutation("guidance is added twice", "pipeline.py", "guidance_scale * (eps[rows - n :]",
             "(1 + guidance_scale) * (eps[rows - n :]", REFERENCE + "negative_prompt"),
    Mutation("a hook counts one call more", "pipeline.py", "hook.at(call, calls, int(t))",
             "hook.at(call, calls + 1, int(t))", REFERENCE + "windows_of_words"),
    Mutation("each prompt has its own noise", "pipeline.py", "torch.randn(1, 4, h, w,",
             "torch.randn(len(prompts), 4, h, w,", "test_known_bugs.py -k b09"),
    Mutation("the store always comes last", "pipeline.py", "insert(1 if store.before_edit else",
             "insert(len(in_order) if store.before_edit else",
             P2P + "test_stored_maps"),
    # The networks
    Mutation("sines first", "unet.py", "[angles.cos(), angles.sin()]",
             "[angles.sin(), angles.cos()]", "test_parity.py -k test_unet"),
    Mutation("the gate is a relu", "unet.py", "x * F.gelu(gate)", "x * F.relu(gate)",
             "test_parity.py -k test_unet"),
    Mutation("the encoder pads on the left", "vae.py", "nn.ZeroPad2d((0, 1, 0, 1))",
             "nn.ZeroPad2d((1, 0, 1, 0))", "test_parity.py -k test_vae"),
    Mutation("pixels are cut off", "vae.py", ".round()", "", "test_known_bugs.py -k b19"),
    # Maps, pictures and files
    Mutation("stored maps are views", "store.py", "kept.append(maps.clone())", "kept.append(maps)",
             "test_known_bugs.py -k b10"),
    Mutation("a store forgets nothing", "store.py", "self.maps: dict[Layer, list[Tensor]] = {}",
             "self.maps = getattr(self, 'maps', {})", "test_store.py -k leaves_the_first_result"),
    Mutation("a file is not replaced atomically", "saved.py", "temporaries[path].replace(path)",
             "path.write_bytes(files[path])", "test_store.py -k whole_or_not_at_all"),
    Mutation("a picture is not turned", "picture.py", "image = upright(image)", "pass",
             "test_picture.py -k exif"),
    Mutation("transparency is black", "picture.py", "PAPER = (255, 255, 255)", "PAPER = (0, 0, 0)",
             "test_picture.py -k transparency"),
    Mutation("grey of half is selected", "mask.py", "latent_size)[0] > half",
             "latent_size)[0] >= half", "test_masks.py -k diffusers_takes or selects_nothing"),
    # Inversion
    Mutation("the inverse step goes forwards", "scheduler.py",
             "return a_t**0.5 * x_0 + (1 - a_t) ** 0.5 * eps",
             "return a_next**0.5 * x_0 + (1 - a_next) ** 0.5 * eps", "test_parity.py -k inverse"),
    Mutation("the source is put back one call late", "invert.py", "self.ahead[call:]",
             "self.ahead[max(call - 1, 0) :]", "test_invert.py -k row_0_is_the_reconstruction"),
    Mutation("the source row is not held", "invert.py",
             "torch.cat([self.ahead[:1].to(latents), latents[1:]])", "latents",
             "test_invert.py -k row_0_is_the_reconstruction"),
    # Weights
    Mutation("an unrelated average is taken", "weights/ema.py",
             "LEAST_CORRELATION = 0.95", "LEAST_CORRELATION = -2.0",
             "test_weights.py -k which_of_two_unets"),
    Mutation("distilled models begin too late", "weights/schedule.py", 'spacing = "trailing"',
             "pass", "test_schedulers.py -k distilled"),
    # Runs and sweeps
    Mutation("settings that are None change an id", "run.py",
             "settled(weights).items() if v is not None}", "settled(weights).items()}",
             "test_run.py -k ids_stay"),
]  # fmt: skip


def outcome(mutation: Mutation, copy: Path) -> str:
    """Run the mutation's tests in the copy. Return "caught", "ESCAPED", or what kept them away."""
    file = copy / "minip2p" / mutation.file
    source = file.read_text("utf-8")
    if source.count(mutation.old) != 1:
        return f"NOT APPLIED: the text stands there {source.count(mutation.old)} times"
    names, _, expression = mutation.tests.partition(" -k ")
    arguments = [str(copy / "tests" / name) for name in names.split()]
    arguments += ["-x", "-q", "-n", "0", "--rootdir", str(copy)]
    arguments += ["-m", "not slow", *(["-k", expression] if expression else [])]
    if status := status_before(tuple(arguments), copy):
        return f"NOT TESTED: without the mutation pytest's status is {status}"
    file.write_text(source.replace(mutation.old, mutation.new), "utf-8")
    status = run_tests(arguments, copy)
    file.write_text(source, "utf-8")
    return {0: "ESCAPED", 1: "caught"}.get(status, f"NOT TESTED: pytest's status is {status}")


@functools.cache
def status_before(arguments: tuple[str, ...], copy: Path) -> int:
    """Run tests without a mutation, once for all mutations that name them."""
    return run_tests(list(arguments), copy)


def run_tests(arguments: list[str], copy: Path) -> int:
    """Run pytest in a forked process that imports minip2p from the copy; return its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 3
    try:
        import pytest

        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        sys.dont_write_bytecode = True
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            status = int(pytest.main(arguments))
    finally:
        os._exit(status)


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    for library in ("diffusers", "hypothesis", "pytest", "transformers"):
        with contextlib.suppress(ImportError):
            __import__(library)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "minip2p"
        names = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "out", "runs")
        shutil.copytree(ROOT, copy, ignore=names, symlinks=True)
        outcomes = {}
        for mutation in chosen:
            outcomes[mutation.name] = outcome(mutation, copy)
            print(f"{outcomes[mutation.name]:8}  {mutation.file:20} {mutation.name}", flush=True)
    caught = sum(result == "caught" for result in outcomes.values())
    print(f"{caught} of {len(chosen)} were caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
