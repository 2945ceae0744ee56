"""Mistakes in the use of the library are UserErrors, raised before any time is spent on the UNet.

Each is one plain sentence that names the mistake and what is possible instead.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LION, SQUIRREL

import minip2p
from minip2p import AttentionStore, LocalBlend, Refine, Reweight, WordSwap, show
from minip2p.unet import UNet

LONG = "cat " * 75 + "and a "  # as many tokens as fit, and a bit
THEIR_WORDS = "a, photo, of, squirrel, eating, burger, lion"


@dataclass
class Setup:
    """A model and stores of runs with it, for calls that are mistakes."""

    model: minip2p.StableDiffusion
    result: minip2p.Result  # of two prompts, with every token's maps
    lion: AttentionStore  # the lion's maps alone, at 8 x 8 pixels and below


@pytest.fixture(scope="module")
def setup(toy) -> Setup:
    stored = minip2p.generate(toy, [SQUIRREL, LION], num_inference_steps=1, store=True)
    store = AttentionStore(words=["lion"], max_pixels=64, places=["down", "up"], by_call=True)
    settings = {"num_inference_steps": 2, "scheduler": "ddim", "store": store}
    lion = minip2p.generate(toy, [SQUIRREL, LION], **settings).attention
    return Setup(toy, stored, lion)


TABLE = []


def mistake(name: str, call: Callable[[Setup], object], *says: str) -> None:
    """One row: what somebody does, and what the sentence has to say."""
    TABLE.append(pytest.param(call, says, id=name))


def generate(name: str, says: list[str], *prompts: Any, **settings: Any) -> None:
    prompts = prompts or (SQUIRREL, LION)
    mistake(name, lambda setup: minip2p.generate(setup.model, list(prompts), **settings), *says)


def edit(name: str, edit: Any, *says: str, prompts: Sequence[str] = (SQUIRREL, LION)) -> None:
    """edit: as `generate` takes it, or a function that makes it."""

    def call(setup: Setup) -> object:
        value = edit() if isinstance(edit, FunctionType) else edit
        return minip2p.generate(setup.model, prompts, edit=value)

    mistake(name, call, *says)


def explain(name: str, says: list[str], prompts: Any, *args: Any, **settings: Any) -> None:
    mistake(name, lambda setup: minip2p.explain(setup.model, prompts, *args, **settings), *says)


# --- words ---------------------------------------------------------------------------------------

edit("window of an unknown word", WordSwap({"tiger": 0.4}), "'tiger'", THEIR_WORDS)
edit("window of the fourth of three", WordSwap({"a#4": 0.4}), "'a#4'", THEIR_WORDS)
edit("window of no word", WordSwap({5: 0.4}), "5", "string")
edit("weight of an unknown word", Reweight({"tiger": 2.0}), "'tiger'", THEIR_WORDS)
edit("weight of default_", Reweight({"default_": 2.0}), "'default_'", THEIR_WORDS)
edit("word that no edited prompt has", Reweight({"tiger": 2.0}), "'tiger'", "squirrel, lion, panda",
     prompts=("a squirrel", "a lion", "a panda"))  # fmt: skip
edit("blend of an unknown word", lambda: WordSwap(local_blend=LocalBlend("tiger")), "'tiger'",
     THEIR_WORDS)  # fmt: skip
generate(
    "store of an unknown word", ["'tiger'", THEIR_WORDS], store=AttentionStore(words=["tiger"])
)
edit("window of a word that was removed", Refine({"squirrel": 0.4}), "'squirrel'",
     "source", "'a burger'", prompts=(SQUIRREL, "a burger"))  # fmt: skip
for kind, changed in {
    "window": WordSwap({"pizza": 0.4}),
    "weight": Reweight({"pizza": 2.0}),
    "blend": WordSwap(local_blend=LocalBlend("pizza")),
}.items():
    edit(f"{kind} of a word that was cut off", changed, "'pizza' is beyond", "77", "shorten",
         prompts=(LONG + "burger", LONG + "pizza"))  # fmt: skip
generate("store of a word that was cut off", ["'pizza' is beyond", "77"], LONG + "pizza",
         store=AttentionStore(words=["pizza"]))  # fmt: skip
edit("unequal numbers of words", WordSwap(), "'a cat' has 2", "'a big black cat' has 4", "Refine",
     prompts=("a cat", "a big black cat"))  # fmt: skip
edit("two windows for a token", WordSwap({"lion": 0.2, "squirrel": 0.3}), "'lion'", "'squirrel'",
     "0.2", "0.3", "once")  # fmt: skip
edit("two weights for a token", Reweight({"LION": 2, "lion": 3}), "'LION'", "'lion'", "2", "3",
     "once")  # fmt: skip

# --- windows and weights -------------------------------------------------------------------------

for wrong in (1.5, math.nan, True, "0.8", None, (0.8, 0.1), (0.1,), (False, 1), {"lion": 0.4}):
    says = ["from 0 to 1", "(start, end)", str(wrong)]
    name = f"{wrong!r:.20}"
    edit(f"word's window {name}", WordSwap({"lion": wrong}), *says)
    edit(f"default window {name}", WordSwap({"default_": wrong}), *says)
    if wrong is not None:  # None is the model's own
        edit(f"self window {name}", WordSwap(0.8, wrong), *says)
        if not isinstance(wrong, dict):
            edit(f"cross window {name}", Refine(wrong), *says)

for wrong in ("2", True, None, math.nan, math.inf, (1, 2)):
    edit(f"weight {wrong!r}", lambda wrong=wrong: Reweight({"lion": wrong}), "'lion'", "number",
         repr(wrong))  # fmt: skip
edit("no weights", lambda: Reweight({}), '{"word": 2.0}', "{}")
edit("weights that are no dict", lambda: Reweight([("lion", 2)]), '{"word": 2.0}', "('lion', 2)")
edit("weights on top of a blend", lambda: Reweight({"lion": 2}, LocalBlend("lion")), "WordSwap",
     "Refine", "LocalBlend")  # fmt: skip

# --- blends --------------------------------------------------------------------------------------

edit("empty blend", lambda: LocalBlend(), "word", "mask")
edit("blend of an empty word", lambda: WordSwap(local_blend=LocalBlend("")), "''", THEIR_WORDS)
edit("blend of numbers", lambda: LocalBlend(["lion", 5]), "words", "5")
edit("blend of words and a mask", lambda: LocalBlend("lion", mask=torch.ones(16, 16)), "word",
     "mask", "not both")  # fmt: skip
edit("mask that words are subtracted from",
     lambda: LocalBlend(mask=torch.ones(16, 16), subtract="lion"), "mask", "subtract")  # fmt: skip
for wrong in (1, -0.1, math.nan, "0.3", None):
    edit(f"threshold {wrong!r}", lambda wrong=wrong: LocalBlend("lion", threshold=wrong),
         "threshold", "0", "1", repr(wrong))  # fmt: skip
for wrong in (1.1, -0.1, math.nan, "0.3", None, True, (0.2, 0.5)):
    edit(f"blend from {wrong!r}", lambda wrong=wrong: LocalBlend("lion", start=wrong), "0 to 1",
         repr(wrong))  # fmt: skip
for name, mask, size in (
    ("mask of the wrong size", torch.ones(15, 16), "15 x 16"),
    ("mask of the wrong shape", torch.ones(16, 32), "16 x 32"),
    ("mask with channels", np.ones((64, 64, 3)), "64 x 64 x 3"),
    ("mask without pixels", torch.ones(0, 0), "0 x 0"),
):
    edit(name, WordSwap(local_blend=LocalBlend(mask=mask)), "16 x 16", size)
edit("mask that is a file's name", WordSwap(local_blend=LocalBlend(mask="mask.png")), "image",
     "'mask.png'")  # fmt: skip
edit("mask of unequal rows", WordSwap(local_blend=LocalBlend(mask=[[1, 0], [1]])), "mask", "array")
edit("blend that is a word", lambda: WordSwap(local_blend="lion"), "LocalBlend", "'lion'")

# --- edits ---------------------------------------------------------------------------------------

KINDS = '"auto"', "WordSwap", "Refine", "Reweight", "list"
edit("edit of another name", "swap", *KINDS, "'swap'")
edit("edit that is a class", WordSwap, *KINDS, "class WordSwap")
edit("edit that is a dict", {"lion": 0.4}, *KINDS, "{'lion': 0.4}")
edit("edit that is a function", lambda: lambda probs, layer: probs, *KINDS, "function")
edit("too few edits", [WordSwap()], "2", "1", prompts=(SQUIRREL, LION, LION))
edit("list of the wrong edits", [LocalBlend("lion")], *KINDS[1:4], "None", "LocalBlend")
edit("hook in place of an edit", minip2p.Hook(), "hooks=[...]")
edit("edit without an edited prompt", WordSwap(), "edited prompt", prompts=(SQUIRREL,))

# --- generate ------------------------------------------------------------------------------------

mistake("no prompts", lambda setup: minip2p.generate(setup.model, []), "prompt", "[]")
for wrong, name in ((None, "None"), ({"cat": 1}, "cat"), (np.array([5]), "5"), (iter("a"), "iter")):
    mistake(f"prompts in {name}", lambda setup, wrong=wrong: minip2p.generate(setup.model, wrong),
              "prompt", name)  # fmt: skip
generate("prompt that is no string", ["prompt", "5"], SQUIRREL, 5)
for wrong in (5, ["a", "b"]):
    generate(f"negative prompt {wrong!r}", ["negative prompt", "string"], negative_prompt=wrong)
for wrong in (0, -1, 1000, 1.5, True, "50"):
    generate(f"steps {wrong!r}", ["steps", repr(wrong)], num_inference_steps=wrong)
for wrong in (-1, 2**63, 1.0, True, "1", None):
    generate(f"seed {wrong!r}", ["seed", "0 to 9223372036854775807", repr(wrong)], seed=wrong)
for wrong in ([1, 2], (1, 2), range(3), np.arange(3), torch.arange(3)):
    generate(f"seeds {wrong!r}", ["seed", "call generate once for each seed"], seed=wrong)
generate("seed that is a generator", ["seed", "initial_seed()"], seed=torch.Generator())
for wrong in (5, "print", [print]):
    generate(f"callback {wrong!r}", ["callback", "function of call, calls and latents"],
             callback=wrong)  # fmt: skip
for wrong in (math.nan, math.inf, "7.5", True, (1, 2)):
    generate(
        f"guidance {wrong!r}", ["guidance", "from -1000 to 1000", repr(wrong)], guidance_scale=wrong
    )
for wrong in (0, -8, 102, "64", 64.0, True):
    generate(f"height {wrong!r}", ["height", "8 pixels", repr(wrong)], height=wrong)
    generate(f"width {wrong!r}", ["width", "8 pixels", repr(wrong)], width=wrong)
for shape in ((3, 4, 16, 16), (1, 3, 16, 16), (4, 16, 16), (16,), (1, 4, 0, 16), (0, 4, 16, 16)):
    generate(f"latents of shape {shape}", ["1 or 2, 4, height, width", str(shape)],
             latents=torch.zeros(shape))  # fmt: skip
for wrong in (np.array(["a"]), np.array([{}]), [[0.0]], "noise", np.zeros((1, 4, 16, 16), complex)):
    generate(f"latents that are {wrong!r:.30}", ["latents", "tensor or an array of real numbers"],
             latents=wrong)  # fmt: skip
generate(
    "latents that are nan", ["latents", "finite"], latents=torch.full((1, 4, 16, 16), math.nan)
)
generate("latents and another height", ["height", "128", "64"], latents=torch.zeros(1, 4, 16, 16),
         height=64)  # fmt: skip
generate("unknown scheduler", ["ddim", "pndm", "'euler'"], scheduler="euler")
generate("scheduler that is a class", ["ddim", "pndm", "class DDIM"], scheduler=minip2p.DDIM)
generate("scheduler of one's own and steps", ["scheduler", "steps"], scheduler=minip2p.DDIM(2),
         num_inference_steps=3)  # fmt: skip
generate("scheduler of one's own and eta", ["scheduler", "eta"], scheduler=minip2p.DDIM(2), eta=0.5)
for wrong in (2, -0.1, math.nan, "1", None, True):
    generate(f"eta {wrong!r}", ["eta", "0", "1", repr(wrong)], eta=wrong, scheduler="ddim")
generate("eta with PNDM", ["PNDM", "DDIM", "0.5"], eta=0.5, scheduler="pndm")

# --- stores and maps -----------------------------------------------------------------------------

for wrong in (1, "lion", ["lion"], AttentionStore):
    generate(f"store {wrong!r}", ["store", "True", "AttentionStore"], store=wrong)
mistake("unknown place", lambda setup: AttentionStore(places=["left"]), "'left'", "down, mid, up")


def store(name: str, call: Callable[[AttentionStore], object], *says: str) -> None:
    mistake(name, lambda setup: call(setup.result.attention), *says)


def store_lion(name: str, call: Callable[[AttentionStore], object], *says: str) -> None:
    mistake(name, lambda setup: call(setup.lion), *says)


def pictures(name: str, draw: Callable, wrong: Any, *says: str) -> None:
    """draw: a function of minip2p.show. wrong: what it is asked for."""
    mistake(name, lambda setup: draw(setup.result.images[0], setup.result.attention, *wrong), *says)


store("map of a size that was not kept", lambda s: s.average(size=(64, 48)), "64x48",
      "down 16x16 cross", "up 8x8 cross")  # fmt: skip
store("map of a place that was not kept", lambda s: s.average(places=["left"]), "left",
      "down 16x16 cross")  # fmt: skip
store("map of self-attention that was not kept", lambda s: s.average(is_cross=False),
      "self", "down 16x16 cross")  # fmt: skip
store("map of one call, with all in one sum", lambda s: s.average(call=0), "call 0",
      "by_call=True")  # fmt: skip
store_lion("map of a call there was not", lambda s: s.average(size=(8, 8), call=2), "call 2",
           "0 to 1")  # fmt: skip
store_lion("map above the largest size", lambda s: s.word("lion", 1), "16x16", "8x8")
store_lion("map of a word that was not kept", lambda s: s.word("burger", 1, size=(8, 8)),
           "'burger'", "lion")  # fmt: skip
store("map of an unknown word", lambda s: s.word("tiger"), "'tiger'", "squirrel, eating")
store("map of no word", lambda s: s.word(5), "string", "5")
store("map of a word in self-attention", lambda s: s.word("lion", 1, is_cross=False),
      "cross")  # fmt: skip
for wrong in (2, "lion", 0.5):
    store(f"map of prompt {wrong!r}", lambda s, wrong=wrong: s.word("a", wrong),
          repr(wrong), "2", "from 0")  # fmt: skip
pictures("pictures of prompt 2", show.word_maps, [2], "2", "from 0")
pictures("pictures of an unknown word", show.word_maps, [0, ["tiger"]], "'tiger'", "squirrel")
pictures("pictures of calls in one sum", show.map_over_calls, ["lion", 1], "by_call=True")
mistake("map of a store that saw no run", lambda setup: AttentionStore().average(), "nothing")

# --- explain -------------------------------------------------------------------------------------


explain("explain no prompts", ["prompt", "[]"], [])
explain("explain one prompt", ["edited prompt"], [SQUIRREL])
explain("explain no edit", ["There is no edit"], [SQUIRREL, LION], None)
explain("explain a hook", ["hooks=[...]"], [SQUIRREL, LION], minip2p.Hook())
explain(
    "explain an unknown word", ["'tiger'", THEIR_WORDS], [SQUIRREL, LION], WordSwap({"tiger": 1})
)


def is_one_plain_sentence(message: str) -> bool:
    return (
        "\n" not in message
        and message.endswith(".")
        and 20 <= len(message) <= 300
        and not re.search(
            r"<(class|function|\w+(\.\w+)* object)|\bat 0x|tensor\(|\w+Error", message
        )
    )


@pytest.mark.filterwarnings("ignore:A prompt has room:UserWarning")
@pytest.mark.parametrize(("call", "says"), TABLE)
def test_mistake(setup, monkeypatch, call, says):
    def too_late(*_, **__):
        raise AssertionError("The UNet ran before the mistake was found.")

    monkeypatch.setattr(UNet, "forward", too_late)
    with pytest.raises(minip2p.UserError) as error:
        call(setup)
    message = str(error.value)
    assert is_one_plain_sentence(message), message
    assert [fragment for fragment in says if fragment not in message] == [], message
