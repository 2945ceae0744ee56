"""Write a result as one HTML file: hover a word to see where each picture looks at it.

`page` fills page.html, which draws. Pictures and maps are in the file; it fetches nothing.

Shapes:  h w height and width of a map · k tokens of the source · n tokens of a word
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
from ..attention import Layer
from ..edit import PromptEdit, PromptToPrompt
from ..errors import check, is_number
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


def page(result: Result, edit: PromptToPrompt | None = None, names: Sequence[str] = ()) -> str:
    """Return the HTML of a page with the pictures, their word maps, and what was swapped when.

    result: of a run with store=PageStore(). edit: as bound to the prompts, `result.edit`.
    names: of the pictures, instead of "Source", "Edit 1", …
    Raises UserError if the run did not keep the maps of every token at every UNet call.
    """
    store = result.store
    check(
        store is not None and store.words is None and store.by_call,
        "A page shows every token's maps at every UNet call: keep them with store=PageStore().",
    )
    names = names or ["Source", *(f"Edit {r}" for r in range(1, len(store.prompts)))]
    words = [_words(prompt) for prompt in store.prompts]

    bytes_per_call = sum(map(len, words)) * math.prod(store.size)
    shown = range(0, store.calls, math.ceil(store.calls * bytes_per_call / MAP_BYTES))
    maps = torch.stack([store.average(), *(store.average(call=call) for call in shown)]).cpu()
    rows: list[list[dict[str, Any]]] = [
        [{"text": word.text} | _pack(maps[:, r, ..., word.tokens]) for word in words[r]]
        for r in range(len(words))
    ]
    for r in range(1, len(words)):
        for entry, word in zip(rows[r], words[r], strict=True):
            entry |= _link(word, r, words[0], store, edit)
    run = {
        "size": store.size,
        "calls": store.calls,
        "shown": list(shown),
        "colours": COLOURS.tolist(),
        "rows": [{"words": row} for row in rows],
    }
    figures = [] if result.source is None else [_given_figure(result.source.picture.image)]
    for r, prompt in enumerate(store.prompts):
        figures.append(_figure(r, names[r], result.images[r], prompt, words[r]))
    values = {
        "title": escape(f"minip2p · {store.prompts[0].text}"),
        "calls": str(store.calls),
        "gradient": ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in COLOURS.tolist()),
        "figures": "\n".join(figures),
        "maps": escape(_describe_maps(store, shown)),
        "tables": _tables(edit, names, words, store.calls),
        "settings": _settings(result.run),
        "run": script_json(run),
    }
    return fill(TEMPLATE, values)


# --- words and maps ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Word:
    """A word to point at: prompt.text[start:stop], without the punctuation around it."""

    text: str
    tokens: list[int]
    start: int = 0  # 0 to 0 for <begin>, and for <end> with its padding
    stop: int = 0


def _words(prompt: Prompt) -> list[_Word]:
    """List <begin>, every word that the model sees, and <end>."""
    words = [_Word("<begin>", [0])]
    for match in re.finditer(r"\S+", prompt.text[: prompt.cut]):
        text = bare(match[0])
        start = match.start() + match[0].index(text)
        if tokens := prompt.positions(start, start + len(text)):
            words.append(_Word(text, tokens, start, start + len(text)))
    return [*words, _Word("<end>", list(range(prompt.end, LENGTH)))]


def _pack(maps: Tensor) -> dict[str, Any]:
    """Return the sum of a word's maps as bytes. maps: 1 + calls, h w n; the average comes first.

    "scale" says what a byte of 255 means: the maximum of the average, and that of all the calls.
    """
    maps = maps.sum(dim=-1).nan_to_num().clamp(min=0).double()  # 1 + calls, h w
    parts = [(part, part.max().item()) for part in (maps[:1], maps[1:])]
    quantised = [(part / (top or 1) * 255).round().to(torch.uint8) for part, top in parts]
    return {
        "maps": base64.b64encode(torch.cat(quantised).numpy().tobytes()).decode(),
        "scale": [float(f"{top:.6g}") for _, top in parts],
    }


def _link(
    word: _Word,
    r: int,
    source: Sequence[_Word],
    store: AttentionStore,
    edit: PromptToPrompt | None,
) -> dict[str, Any]:
    """Return which of the source's words a word of prompt r belongs to, and when it has their map.

    "from" are indices of the source's words, "taken" the calls, "fate" is the page's sentence.
    """
    if edit is None or not edit.exists[r].any():
        # Words belong together without control, too: as "auto" would align them.
        alignment = PromptEdit().align(store.prompts[0], store.prompts[r])
        fate = "without control: its own map" if edit else ""
        return {"from": _source_words(word, source, alignment), "taken": [], "fate": fate}
    indices = _source_words(word, source, Alignment(edit.mapper[r], edit.exists[r]))
    replaced = [j for j in word.tokens if edit.exists[r, j]]
    windows = bounds(edit.windows[r, replaced], store.calls).unique(dim=0)
    calls = [[start, stop] for start, stop in windows.tolist() if start < stop]
    names = " ".join(source[i].text for i in indices)
    fate = f"where the source looks at “{names}”" if calls else "its own map"
    return {"from": indices, "taken": calls, "fate": fate}


def _source_words(word: _Word, source: Sequence[_Word], alignment: Alignment) -> list[int]:
    mapped = (alignment.mapper * alignment.exists)[:, word.tokens]  # k n
    return [i for i, source_word in enumerate(source) if mapped[source_word.tokens].any()]


# --- HTML ----------------------------------------------------------------------------------------


def _figure(r: int, name: str, image: Image.Image, prompt: Prompt, words: Sequence[_Word]) -> str:
    parts, written = [], 0
    for n, word in enumerate(words):
        if word.stop:
            parts.append(escape(prompt.text[written : word.start]))
            written = word.stop
        elif n:  # <end>, after the rest of the text
            parts.append(escape(prompt.text[written : prompt.cut]))
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


def _given_figure(image: Image.Image) -> str:
    return f"""<figure>
<div class="picture">
<img src="{data_uri(image)}" width="{image.width}" height="{image.height}" alt="the given picture">
</div>
<figcaption><p class="role">Given</p></figcaption>
</figure>"""


def _tables(
    edit: PromptToPrompt | None,
    names: Sequence[str],
    words: Sequence[Sequence[_Word]],
    calls: int,
) -> str:
    """Return a table of what `explain_row` says of each edited prompt."""
    if edit is None:
        return ""
    tables = []
    for r in range(1, len(words)):
        prompt_lines = explain_row(edit, r, calls)
        if not prompt_lines:
            continue
        has_weights = any(line.weight != 1 for line in prompt_lines)
        cells = ["Token", "Looks where the source looks at", "In the UNet’s calls", "Weight"]
        head = "".join(f'<th scope="col">{cell}</th>' for cell in cells[: 3 + has_weights])
        body = "\n".join(_line(line, r, words[r], calls, has_weights) for line in prompt_lines)
        name = escape(names[r])
        tables.append(f"""<div class="scroll" role="region" tabindex="0" aria-label="{name}">
<table>
<caption><b>{name}</b> · {escape(edit.prompts[r].text)}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>""")
    if not tables:
        return ""
    body = "\n".join(tables)
    return f'<h2>What is swapped, and when</h2>\n<div id="tables">\n{body}\n</div>'


def _line(line: Line, r: int, words: Sequence[_Word], calls: int, has_weights: bool) -> str:
    source = re.sub(r"(\d) x (\d)", r"\1 × \2", line.source) if line.token is None else line.source
    cells = [escape(source), _bar(line.calls, calls)]
    if line.token is None:
        head, data = f"<em>{line.name}</em>", ""
    else:
        n = next((n for n, word in enumerate(words) if line.token in word.tokens), "")
        head, data = escape(line.name), f' data-row="{r}" data-word="{n}"'
        cells += [f"{line.weight:g}"] * has_weights
    body = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr{data}><th scope="row">{head}</th>{body}</tr>'


def _bar(window: range | None, calls: int) -> str:
    if window is None:
        return ""
    bar = f'<span class="bar"><i style="--from:{window.start};--to:{window.stop}"></i></span>'
    return bar + calls_text(window, calls)


def _describe_maps(store: AttentionStore, shown: range) -> str:
    layers = sum(
        layer.is_cross and (layer.height, layer.width) == store.size for layer in store.maps
    )
    moment = "before the edit changed them" if store.before_edit else "as the edit left them"
    text = (
        f"Maps are cross-attention of {store.size[0]} × {store.size[1]}, the mean over "
        f"{layers} layers and their heads, {moment}."
    )
    return text if shown.step == 1 else f"{text} To keep the file small, one call in {shown.step}."


def _settings(settings: Mapping[str, Any]) -> str:
    items = []
    for name, value in settings.items():
        text = escape(_value_text(value)).replace("\n", "<br>")
        items.append(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{text}</dd>")
    return "\n".join(items)


def _value_text(value: Any) -> str:
    """Return a setting for people: an edit's parts in a row, a list's in lines, 0 to 0.8."""
    if value in (None, "", [], {}):
        return "none"
    if isinstance(value, Mapping):
        parts = ((name, part) for name, part in value.items() if part not in (None, [], {}))
        return ", ".join(f"{name} {_value_text(part)}" for name, part in parts)
    if isinstance(value, list | tuple):
        is_window = all(is_number(part) for part in value)
        return (" to " if is_window else "\n").join(map(_value_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
