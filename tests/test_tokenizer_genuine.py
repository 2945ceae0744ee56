"""The CLIP tokenizer the other tests compare with is the genuine one: ids known from elsewhere."""

import pytest

START, END = 49406, 49407

KNOWN_IDS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a painting of a squirrel eating a burger": [320, 3086, 539, 320, 14004, 4371, 320, 6548],
    "a painting of a lion eating a burger": [320, 3086, 539, 320, 5567, 4371, 320, 6548],
    "a photo of an astronaut riding a horse on mars": (
        [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496]
    ),
    "a cat's toy, isn't it?": [320, 2368, 568, 5988, 267, 2923, 713, 585, 286],
    "photo of a 1950s car!!!": [1125, 539, 320, 272, 280, 276, 271, 338, 1615, 995],
    "": [],
}


@pytest.mark.parametrize("prompt", KNOWN_IDS)
def test_known_ids(clip_tokenizer, prompt):
    ids = [START, *KNOWN_IDS[prompt], END]
    assert clip_tokenizer(prompt).input_ids == ids

    padded = clip_tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    assert padded == ids + [END] * (77 - len(ids))


def test_size_and_limits(clip_tokenizer):
    assert len(clip_tokenizer) == 49408
    assert clip_tokenizer.model_max_length == 77
    assert clip_tokenizer.bos_token_id == START
    assert clip_tokenizer.eos_token_id == clip_tokenizer.pad_token_id == END
