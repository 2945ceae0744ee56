"""`explain` against tables by hand: whose attention each token takes over, at which calls."""

import pytest

import minip2p
from minip2p import LocalBlend, Refine, Reweight, WordSwap

CASES = {
    # "motorcycle" is two tokens, the lion has a window of its own.
    "swap": (
        ["a lion riding a bicycle", "a cat riding a motorcycle"],
        WordSwap({"default_": 0.8, "lion": (0.1, 0.4)}, 0.4),
        {"num_inference_steps": 50, "scheduler": "ddim"},
        """
Source: a lion riding a bicycle

Edit 1: a cat riding a motorcycle

  token   looks where the source looks at  in the UNet's calls
  a       a                                1 to 40 of 50
  cat     lion                             6 to 20 of 50
  riding  riding                           1 to 40 of 50
  a       a                                1 to 40 of 50
  motor   1/2 bicycle                      1 to 40 of 50
  cycle   1/2 bicycle                      1 to 40 of 50

  layout  (self-attention up to 16 x 16)   1 to 20 of 50
""",
    ),
    "refinement, weights and a blend; and a prompt without control": (
        ["a photo of a cat", "a photo of a cat in the snow", "a photo of a dog"],
        [
            Reweight({"snow": 3, "cat": -0.5}, Refine(0.6, 0.0, LocalBlend("snow", start=0.2))),
            None,
        ],
        {"num_inference_steps": 10, "scheduler": "ddim"},
        """
Source: a photo of a cat

Edit 1: a photo of a cat in the snow

  token   looks where the source looks at  in the UNet's calls
  a       a                                1 to 6 of 10
  photo   photo                            1 to 6 of 10
  of      of                               1 to 6 of 10
  a       a                                1 to 6 of 10
  cat     cat                              1 to 6 of 10         weight -0.5 in all
  in      (nothing: new)
  the     (nothing: new)
  snow    (nothing: new)                                        weight 3 in all

  layout  (self-attention up to 16 x 16)   none of 10
  blend   (snow)                           3 to 10 of 10

Edit 2: without control.
""",
    ),
    # 50 steps of PNDM are 51 UNet calls; commas and capitals are as in the prompt.
    "two tokens become one, with a mask": (
        ["A motorcycle, at night", "a Car, at night"],
        WordSwap(1.0, (0.5, 1.0), LocalBlend(mask=[[1] * 16] * 16)),
        {"num_inference_steps": 50, "scheduler": "pndm"},
        """
Source: A motorcycle, at night

Edit 1: a Car, at night

  token   looks where the source looks at  in the UNet's calls
  a       A                                1 to 51 of 51
  Car     motor + cycle                    1 to 51 of 51
  ,       ,                                1 to 51 of 51
  at      at                               1 to 51 of 51
  night   night                            1 to 51 of 51

  layout  (self-attention up to 16 x 16)   26 to 51 of 51
  blend   (your own mask)                  1 to 51 of 51
""",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_explain(toy, name):
    prompts, edit, settings, table = CASES[name]
    assert minip2p.explain(toy, prompts, edit, **settings) == table.strip()


def test_without_settings_the_models_own(toy):
    """The table is of what `generate` would do with the same arguments."""
    table = minip2p.explain(toy, ["a cat", "a dog"])
    assert "dog     cat                              1 to 40 of 50\n" in table  # 0.8 of 50
    assert table.endswith("1 to 30 of 50")  # 0.6 of 50
