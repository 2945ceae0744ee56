"""A result as one HTML file to explore: hover a word to see where each picture looks at it.

`page` fills page.html, which draws. Pictures and maps are in the file; nothing is ever fetched.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..align import LENGTH, Alignment, Prompt, bounds
from ..attention import Hook, Layer
from ..edit import PromptEdit
from ..errors import UserError
from ..explain import Line, calls_text, explain_row
from ..pipeline import Result
from ..show import COLOURS
from ..store import AttentionStore
from ..words import bare
from .template import data_uri, fill, script_json

TEMPLATE = Path(__file__).with_name("page.html")
MAP_BYTES = 2**21  # of all maps; beyond, not every UNet call is on the page


class PageStore(AttentionStore):
    """Keep what a page shows: every UNet call's cross-attention, of the coarse size alone."""

    def __init__(self) -> None:
        super().__init__(by_call=True)

    def applies_to(self, layer: Layer) -> bool:
        return layer.is_cross and (layer.height, layer.width) == self.size


def page(result: Result, edit: Hook | None = None, names: Sequence[str] = ()) -> str:
    """The text of an HTML file with the pictures, where they look, and what was swapped when.

    result: of a run with store=PageStore(). edit: as it was bound to the prompts.
    names: of the pictures, instead of "Source", "Edit 1", …
    Raises ValueError if the maps of every token at every UNet call were not kept.
    """
    store = result.store
    if store is None or store.words is not None or not store.by_call:
        raise UserError(
            "A page shows every token's maps at every UNet call: keep them with store=PageStore()."
        )
    names = names or ["Source", *(f"Edit {r}" for r in range(1, len(store.prompts)))]
    words = [_words(prompt) for prompt in store.prompts]

    per_call = sum(map(len, words)) * math.prod(store.size)
    shown = range(0, store.calls, math.ceil(store.calls * per_call / MAP_BYTES))
    maps = torch.stack([store.average(), *(store.average(call=call) for call in shown)]).cpu()
    run: dict[str, Any] = {
        "size": store.size,
        "calls": store.calls,
        "shown": list(shown),
        "colours": COLOURS.tolist(),
        "rows": [
            {"words": [{"text": w.text} | _pack(maps[:, r, ..., w.tokens]) for w in words[r]]}
            for r in range(len(words))
        ],
    }
    for r in range(1, len(words)):
        for entry, word in zip(run["rows"][r]["words"], words[r], strict=True):
            entry |= _link(word, r, words[0], store, edit)

    values = {
        "title": escape(f"minip2p · {store.prompts[0].text}"),
        "calls": str(store.calls),
        "gradient": ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in COLOURS.tolist()),
        "figures": _given(result)
        + "\n".join(
            _figure(r, name, image, prompt, of_prompt)
            for r, (name, image, prompt, of_prompt) in enumerate(
                zip(names, result.images, store.prompts, words, strict=True)
            )
        ),
        "maps": escape(_about(store, shown)),
        "tables": _tables(edit, names, words, store.calls),
        "settings": _settings(result.run),
        "run": script_json(run),
    }
    return fill(TEMPLATE, values)


# --- words and maps ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Word:
    """A word that can be pointed at: prompt.text[start:stop], without surrounding punctuation."""

    text: str
    tokens: list[int]
    start: int = 0  # 0 to 0: the begin token, or the end token with its padding
    stop: int = 0


def _words(prompt: Prompt) -> list[_Word]:
    """<begin>, every word that the model sees, and <end>."""
    words = [_Word("<begin>", [0])]
    for match in re.finditer(r"\S+", prompt.text[: prompt.cut]):
        text = bare(match[0])
        start = match.start() + match[0].index(text)
        if tokens := prompt.positions(start, start + len(text)):
            words.append(_Word(text, tokens, start, start + len(text)))
    return [*words, _Word("<end>", list(range(prompt.end, LENGTH)))]


def _pack(maps: Tensor) -> dict[str, Any]:
    """The maps of a word's tokens as bytes. maps: 1 + calls, h w n; the average comes first.

    A byte of 255 is the `scale`: of the average its maximum, of the calls the maximum of them all.
    """
    maps = maps.sum(dim=-1).nan_to_num().clamp(min=0).double()  # 1 + calls, h w
    parts = [(part, part.max().item()) for part in (maps[:1], maps[1:])]
    quantised = [(part / (top or 1) * 255).round().to(torch.uint8) for part, top in parts]
    return {
        "maps": base64.b64encode(torch.cat(quantised).numpy().tobytes()).decode(),
        "scale": [float(f"{top:.6g}") for _, top in parts],
    }


def _link(
    word: _Word, r: int, source: Sequence[_Word], store: AttentionStore, edit: Hook | None
) -> dict[str, Any]:
    """Which of the source's words a word of prompt r belongs to, and when it takes their map."""
    control = edit
    if control is None or not control.exists[r].any():
        # Without control, words still belong together: as "auto" would align them.
        alignment = PromptEdit().align(store.prompts[0], store.prompts[r])
        fate = "without control: its own map" if control else ""
        return {"from": _belongs(word, source, alignment), "taken": [], "fate": fate}
    belongs = _belongs(word, source, Alignment(control.mapper[r], control.exists[r]))
    replaced = [j for j in word.tokens if control.exists[r, j]]
    windows = bounds(control.windows[r, replaced], store.calls).unique(dim=0)
    calls = [[start, stop] for start, stop in windows.tolist() if start < stop]
    names = " ".join(source[i].text for i in belongs)
    fate = f"where the source looks at “{names}”" if calls else "its own map"
    return {"from": belongs, "taken": calls, "fate": fate}


def _belongs(word: _Word, source: Sequence[_Word], alignment: Alignment) -> list[int]:
    taken = (alignment.mapper * alignment.exists)[:, word.tokens]  # k n
    return [i for i, other in enumerate(source) if taken[other.tokens].any()]


# --- HTML ----------------------------------------------------------------------------------------


def _figure(r: int, name: str, image: Image.Image, prompt: Prompt, words: Sequence[_Word]) -> str:
    parts, done = [], 0
    for n, word in enumerate(words):
        if word.stop:
            parts.append(escape(prompt.text[done : word.start]))
            done = word.stop
        elif n:  # <end>: before it, what is left of the text
            parts.append(escape(prompt.text[done : prompt.cut]))
            if prompt.cut < len(prompt.text):
                title = f"beyond the {LENGTH} tokens that the model sees"
                parts.append(f'<s title="{title}">{escape(prompt.text[prompt.cut :])}</s>')
            parts.append(" ")
        parts.append(
            f'<button class="word{"" if word.stop else " special"}" data-row="{r}" data-word="{n}" '
            f'aria-pressed="false">{escape(word.text)}</button>'
        )
        parts.append("" if n else " ")
    h, w = image.height, image.width
    enlarged = max(1, round(512 / max(h, w)))
    return f"""<figure id="picture-{r}">
<div class="picture">
<img src="{data_uri(image)}" width="{w}" height="{h}" alt="{escape(f"{name}: {prompt.text}")}">
<canvas width="{w * enlarged}" height="{h * enlarged}" role="img" hidden></canvas>
</div>
<figcaption>
<p class="role">{escape(name)}</p>
<p class="prompt" dir="auto">{"".join(parts)}</p>
<p class="state"></p>
</figcaption>
</figure>"""


def _given(result: Result) -> str:
    """The picture that was given, as it is; without one, nothing."""
    if result.source is None:
        return ""
    image = result.source.picture.image
    return f"""<figure>
<div class="picture">
<img src="{data_uri(image)}" width="{image.width}" height="{image.height}" alt="the given picture">
</div>
<figcaption><p class="role">Given</p></figcaption>
</figure>
"""


def _tables(
    edit: Hook | None, names: Sequence[str], words: Sequence[Sequence[_Word]], calls: int
) -> str:
    """For each edited prompt, what table.lines says."""
    control = edit
    if control is None:
        return ""
    tables = []
    for r in range(1, len(words)):
        of_row = explain_row(control, r, calls)
        if not of_row:
            continue
        weighed = any(line.weight != 1 for line in of_row)
        cells = ["Token", "Looks where the source looks at", "In the UNet’s calls", "Weight"]
        head = "".join(f'<th scope="col">{cell}</th>' for cell in cells[: 3 + weighed])
        body = "\n".join(_line(line, r, words[r], calls, weighed) for line in of_row)
        name = escape(names[r])
        tables.append(f"""<div class="scroll" role="region" tabindex="0" aria-label="{name}">
<table>
<caption><b>{name}</b> · {escape(control.prompts[r].text)}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>""")
    body = "\n".join(tables)
    return body and f'<h2>What is swapped, and when</h2>\n<div id="tables">\n{body}\n</div>'


def _line(line: Line, r: int, words: Sequence[_Word], calls: int, weighed: bool) -> str:
    what = re.sub(r"(\d) x (\d)", r"\1 × \2", line.source) if line.token is None else line.source
    cells = [escape(what), _bar(line.calls, calls)]
    if line.token is None:
        head, data = f"<em>{line.name}</em>", ""
    else:
        n = next((n for n, word in enumerate(words) if line.token in word.tokens), "")
        head, data = escape(line.name), f' data-row="{r}" data-word="{n}"'
        cells += [f"{line.weight:g}"] * weighed
    body = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr{data}><th scope="row">{head}</th>{body}</tr>'


def _bar(when: range | None, calls: int) -> str:
    if when is None:
        return ""
    bar = f'<span class="bar"><i style="--from:{when.start};--to:{when.stop}"></i></span>'
    return bar + calls_text(when, calls)


def _about(store: AttentionStore, shown: range) -> str:
    """What the maps of the page are, in one or two sentences."""
    layers = sum(
        layer.is_cross and (layer.height, layer.width) == store.size for layer in store.maps
    )
    edited = "before the edit changed them" if store.before_edit else "as the edit left them"
    text = (
        f"Maps are cross-attention of {store.size[0]} × {store.size[1]}, the mean over "
        f"{layers} layers and their heads, {edited}."
    )
    return text if shown.step == 1 else f"{text} To keep the file small, one call in {shown.step}."


def _settings(settings: Mapping[str, Any]) -> str:
    lines = []
    for name, value in settings.items():
        is_list = isinstance(value, list | tuple)
        text = "\n".join(map(str, value)) if is_list else str(value)
        shown = escape(text).replace("\n", "<br>") or "none"
        lines.append(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{shown}</dd>")
    return "\n".join(lines)
