"""One run as plain data: JSON, ids, commands and Python that all mean the same pictures."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minip2p
from minip2p import (
    DDIM,
    PNDM,
    LocalBlend,
    PromptEdit,
    Refine,
    Reweight,
    Run,
    SourcePicture,
    UserError,
    WordSwap,
    generate,
)
from minip2p.command import quoted
from minip2p.options import make_parser, make_run
from minip2p.settings import defaults_of

SQUIRREL, LION = "a squirrel eating a burger", "a lion eating a burger"
CAT, DOG = "a photo of a cat", "a photo of a dog"
PAIR = [SQUIRREL, LION]


# --- ids -----------------------------------------------------------------------------------------

DEFAULTS = {
    "num_inference_steps": 50,
    "guidance_scale": 4.0,
    "scheduler": "ddim",
    "cross_replace_steps": 0.8,
    "self_replace_steps": 0.6,
    "height": 64,
    "width": 64,
}
PIXELS = {"num_inference_steps": 4, "height": 128, "width": 96}
BLEND = LocalBlend("lion", 0.4, 0.2, "burger")
WINDOWS = {"lion": (0.1, 0.5), "default_": 0.8}
# Written down by the second edition: another id would have every older study made again.
IDS: list[tuple[str, dict[str, Any]]] = [
    ("b437bf411c421296", {"prompts": SQUIRREL}),
    ("cb5b81fe26621b6e", {"prompts": PAIR, "edits": [PromptEdit()]}),
    ("5b370c024d18a677", {"prompts": PAIR}),
    ("03db044860fa1cc0", {"prompts": PAIR, "edits": [Refine(WINDOWS)]}),
    ("464e82472dbd2e5a", {"prompts": [SQUIRREL] * 2, "edits": [Reweight({"burger": 2})]}),
    ("634cf425b082b25a", {"prompts": PAIR, "edits": [WordSwap(None, 0.3, BLEND)]}),
    ("5b7e128392754ec9",
     {"prompts": SQUIRREL, "negative_prompt": "dog", "seed": 3, "guidance_scale": 7,
      "scheduler": "pndm", **PIXELS}),
    ("619276cb8edd2ca0", {"prompts": PAIR, "edits": [Reweight({"lion": -1.5})], "eta": 1}),
    ("96b98b478efa8fcf", {"prompts": PAIR, "edits": [PromptEdit()], "seed": 5, "source": "direct"}),
    ("bf98f9730a798373",
     {"prompts": PAIR, "edits": [PromptEdit()], "seed": 5, "guidance_scale": 3.5,
      "source": "edit-friendly"}),
]  # fmt: skip


@pytest.mark.parametrize(("id", "arguments"), IDS, ids=[id for id, _ in IDS])
def test_ids_stay_what_they_were(tmp_path: Path, id: str, arguments: dict[str, Any]):
    if "source" in arguments:
        (tmp_path / "a.png").write_bytes(b"the bytes of a picture")
        source = SourcePicture(str(tmp_path / "a.png"), arguments["source"])
        arguments = arguments | {"source": source}
    run = Run(**arguments)
    assert run.resolved(DEFAULTS).id("0123456789abcdef") == id
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert run.resolved(DEFAULTS).resolved(DEFAULTS) == run.resolved(DEFAULTS)


def test_what_has_no_effect_is_not_in_the_id():
    def id_of(*prompts: str, **settings: Any) -> str:
        return Run(prompts, **settings).resolved(DEFAULTS).id("0123456789abcdef")

    assert id_of(SQUIRREL, SQUIRREL) == id_of(SQUIRREL)
    spelled = PromptEdit([0, np.float64(0.8)], 0.6)
    assert id_of(*PAIR, edits=[spelled]) == id_of(*PAIR, edits=[PromptEdit()], height=64)
    assert id_of(*PAIR, edits=[spelled]) != id_of(*PAIR, edits=[Reweight({"lion": 2}, spelled)])
    weights = [Reweight({"lion": 2}, everywhere=everywhere) for everywhere in (True, False)]
    assert len({id_of(*PAIR, edits=[edit]) for edit in weights}) == 2
    edited = Run(PAIR, [PromptEdit()]).resolved(DEFAULTS)
    assert edited.alone() == Run(SQUIRREL).resolved(DEFAULTS)


def test_how_a_picture_is_inverted_is_in_the_id(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"the bytes of a picture")

    def id_of(**settings: Any) -> str:
        source = SourcePicture(str(tmp_path / "a.png"), **settings)
        return Run(SQUIRREL, source=source).resolved(DEFAULTS).id("")

    same = [id_of(), id_of(guidance_scale=1), id_of(skip=0, fit="crop")]
    assert len(set(same)) == 1
    others = [{"skip": 3}, {"fit": "pad"}, {"refinements": 2}, {"guidance_scale": 2}]
    others += [{"method": "edit-friendly"}, {"method": "edit-friendly", "guidance_scale": 3.5}]
    assert len({id_of(**settings) for settings in [{}, *others]}) == 1 + len(others)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "A run is a dictionary"),
        ({}, "needs prompts"),
        ({"prompts": None}, "needs prompts"),
        ({"prompts": []}, "Give a prompt"),
        ({"prompts": CAT, "sed": 1}, "no 'sed' in a run"),
        ({"prompts": [CAT, 3]}, "A prompt is a string"),
        ({"prompts": [CAT] * 1000}, "at most 256"),
        ({"prompts": [CAT], "edits": [None]}, "1, not 0|0, not 1"),
        ({"prompts": [CAT, DOG], "edits": [{"edit": "wrap"}]}, "auto, swap, refine"),
        ({"prompts": [CAT, DOG], "edits": [{"blend": {"mask": 1}}]}, "no 'mask' in a blend"),
        ({"prompts": [CAT, DOG], "edits": [{"cross_replace_steps": "x"}]}, "A window"),
        ({"prompts": [CAT, DOG], "edits": [{"reweight": {"cat": "x"}}]}, "finite number"),
        ({"prompts": CAT, "seed": -1}, "seed must be a whole number from 0"),
        ({"prompts": CAT, "num_inference_steps": 1e3}, "from 1 to 999, not 1000.0"),
        ({"prompts": CAT, "scheduler": ["ddim"]}, "ddim, pndm"),
        ({"prompts": CAT, "dtype": "int8"}, "float32"),
        ({"prompts": CAT, "model": 5}, "model must be a text"),
        ({"prompts": CAT, "source": {"method": "x"}}, "direct, edit-friendly, ddim"),
        ({"prompts": CAT, "source": {}, "eta": 1}, "leave out scheduler and eta"),
        ({"prompts": CAT, "callers_own": ["the latents"]}, "lacks the latents"),
    ],
    ids=str,
)
def test_what_is_no_run(data: Any, message: str):
    with pytest.raises(UserError, match=message):
        Run.from_dict(data)


# --- what generate records -----------------------------------------------------------------------


def test_a_run_is_recorded_as_what_repeats_it(toy):
    edits = [PromptEdit({"cat": (0, 0.5)}, 0.25), Reweight({"dog": np.float32(2)}, Refine()), None]
    run = Run([CAT, DOG, DOG, CAT], edits, "a car", 3, 2, 3.5, "pndm", 0, 64, 96)
    result = run.generate(toy)
    record = json.loads(json.dumps(result.run))
    assert "callers_own" not in record
    assert Run.from_dict(record) == run
    assert Run.from_dict(record).generate(toy).latents.equal(result.latents)
    settings = run.settings() | {"seed": np.int64(3), "guidance_scale": np.float32(3.5)}
    assert generate(toy, run.prompts, edit=edits, **settings).run == result.run


def test_what_the_model_recommends_is_recorded(toy):
    record = generate(toy, [CAT, DOG], num_inference_steps=1, edit="auto").run
    resolved = Run([CAT, DOG], [PromptEdit()], num_inference_steps=1).resolved(defaults_of(toy))
    assert Run.from_dict(record).resolved(defaults_of(toy)) == resolved


class Louder(minip2p.Hook):
    pass


class MySwap(WordSwap):
    pass


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"latents": torch.zeros(1, 4, 16, 16)}, "the latents"),
        ({"scheduler": DDIM(2)}, "the scheduler DDIM"),
        ({"scheduler": PNDM(2)}, "the scheduler PNDM"),
        ({"hooks": [Louder()]}, "the hook Louder"),
        ({"edit": MySwap()}, "the edit of type MySwap"),
        ({"edit": [Reweight({"dog": 2}, MySwap())]}, "the edit of type MySwap"),
        ({"edit": WordSwap(local_blend=LocalBlend(mask=np.eye(16)))}, "the mask of a blend"),
    ],
)
def test_what_only_the_caller_has_is_named(toy, arguments: dict[str, Any], name: str):
    if "scheduler" not in arguments:
        arguments = arguments | {"num_inference_steps": 1}
    record = generate(toy, [CAT, DOG], **arguments).run
    assert record["callers_own"] == [name] and " at 0x" not in json.dumps(record)
    with pytest.raises(UserError, match=f"lacks {name}"):
        Run.from_dict(record)


def test_a_picture_is_asked_for_again(toy, tmp_path: Path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    source = SourcePicture(str(tmp_path / "red.png"), "edit-friendly", skip=1, guidance_scale=2)
    run = Run([CAT, DOG], [PromptEdit()], seed=4, num_inference_steps=3, source=source)
    result = run.generate(toy)
    assert str(tmp_path) not in json.dumps(result.run)
    again = Run.from_dict(result.run)
    with pytest.raises(UserError, match="name the picture"):
        again.generate(toy)
    assert again.generate(toy, source=run.invert(toy)).latents.equal(result.latents)
    assert result.run["seed"] == 4 and result.run["source"]["guidance_scale"] == 2


# --- commands and Python -------------------------------------------------------------------------


def test_python_makes_the_same_pictures(toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minip2p, "load", lambda **_: toy)
    Image.new("RGB", (64, 64), "red").save("red.png")
    edit = Reweight({"dog": 2}, WordSwap(0.5, None, LocalBlend("dog", 0.4)), everywhere=False)
    for source in (None, SourcePicture("red.png", skip=1)):
        run = Run([CAT, DOG, DOG], [edit, None], "a car", 3, 2, 3.5, source=source)
        names: dict[str, Any] = {}
        exec(run.python(), names)
        assert names["result"].latents.equal(run.generate(toy).latents)
    assert "dtype='float16'" in Run(CAT, dtype="float16").python()


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (Run(CAT), f"'{CAT}'"),
        (Run("-x", negative_prompt="-y", eta=0.5), "--negative=-y --eta 0.5 -- -x"),
        (Run(CAT, (), "", 1, 3, 2.5, "pndm", 0, 64, 96, tokenizer="t", dtype="float16"),
         "--seed 1 --steps 3 --guidance 2.5 --scheduler pndm --height 64 --width 96 "
         f"--tokenizer t --dtype float16 '{CAT}'"),
        (Run([CAT, DOG], [PromptEdit(0.5, (0.1, 1))], model="a b"),
         f"--model 'a b' --to '{DOG}' --cross-replace-steps 0,0.5 "
         f"--self-replace-steps 0.1,1 '{CAT}'"),
        (Run([CAT, DOG, DOG], [None, PromptEdit({"dog": 0.5, "default_": 1})], ema=False),
         f"--no-ema --to '{DOG}' --baseline --cross-replace-steps dog=0,0.5 "
         f"--cross-replace-steps 0,1 '{CAT}'"),
        (Run([CAT, DOG, DOG], [PromptEdit(self_replace_steps=end) for end in (0.5, 1)]),
         f"--to '{DOG}' --sweep self=0.5,1 '{CAT}'"),
        (Run([CAT, CAT], [Reweight({"cat": -2}, PromptEdit(local_blend=LocalBlend("cat")))]),
         f"--to '{CAT}' --reweight cat=-2 --blend cat '{CAT}'"),
        (Run(CAT, source=SourcePicture("a.png", "edit-friendly", 2, "pad", guidance_scale=3.5)),
         "--image a.png --method edit-friendly --skip 2 --fit pad --inversion-guidance 3.5 "
         f"'{CAT}'"),
    ],
)  # fmt: skip
def test_a_run_as_a_command(run: Run, words: str):
    command = run.command("--maps")
    assert command == ["python", "-m", "minip2p.sample", "--maps", *shlex.split(words)]
    assert shlex.split(quoted(command)) == command
    assert make_run(make_parser().parse_args(command[3:])) == run


def test_the_command_line_takes_the_kind_of_edit_that_fits():
    for edited, edit in ((DOG, WordSwap()), ("a photo of a big dog", Refine())):
        assert Run([CAT, edited], [edit]).command()[3:5] == ["--to", edited]


@pytest.mark.parametrize(
    "run",
    [
        Run([CAT, DOG]),
        Run([CAT, DOG], [Refine()]),
        Run([CAT, DOG, CAT], [PromptEdit(0.5), PromptEdit()]),
        Run([CAT, DOG], [PromptEdit(local_blend=LocalBlend("cat", 0.5))]),
        Run([CAT, DOG], [Reweight({"cat": 2}, everywhere=False)]),
        Run(CAT, source=SourcePicture("a.png", refinements=1)),
    ],
)
def test_what_the_command_line_cannot_say(run: Run):
    with pytest.raises(UserError, match="The command line has no option"):
        run.command()


# --- warnings ------------------------------------------------------------------------------------


def test_an_edit_that_changes_nothing_is_named(toy):
    with pytest.warns(UserWarning, match=r"Edit 2 changes nothing: 'A photo of a cat'"):
        generate(toy, [CAT, DOG, "A photo of a cat"], edit="auto", num_inference_steps=1)


def test_a_bound_edit_is_for_its_prompts_and_size(toy):
    bound = generate(toy, [CAT, DOG], edit="auto", num_inference_steps=1, decode=False).edit
    for arguments in ({"prompts": [DOG, CAT]}, {"prompts": [CAT, DOG], "height": 64}):
        with pytest.raises(UserError, match="bound to other prompts or to another size"):
            generate(toy, hooks=[bound], num_inference_steps=1, **arguments)


def test_words_that_the_model_does_not_know_are_named_once(toy):
    with pytest.warns(UserWarning, match="never seen dragon; it knows: .*squirrel") as warned:
        generate(toy, "a photo of a dragon, a Dragon", num_inference_steps=1)
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="never seen café; it knows"):  # é as e and an accent
        generate(toy, "a cat", negative_prompt="a cafe\u0301", num_inference_steps=1)


@pytest.mark.parametrize(
    "edit",
    [WordSwap({"car": 0.4}), WordSwap(local_blend=LocalBlend("car")), Reweight({"car": 2})],
    ids=["window", "blend", "weight"],
)
def test_a_word_acts_on_the_prompts_that_have_it(toy, edit):
    prompts = ["a cat riding a bicycle", "a cat riding a car", "a dog riding a bicycle"]
    settings = {"edit": edit, "num_inference_steps": 2, "decode": False}
    with pytest.warns(UserWarning, match=f"'car' does not act on '{prompts[2]}'"):
        result = generate(toy, prompts, **settings)
        again = Run.from_dict(result.run).generate(toy)
    assert again.latents.equal(result.latents)
    alone = generate(toy, prompts[:2], **settings)
    assert result.latents[:2].allclose(alone.latents, atol=1e-5)
