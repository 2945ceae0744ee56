"""What an edit will do, before it is done: which tokens take over whose attention, and when.

`lines` is the one place that says it; `explain` and the interactive page lay it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .align import Prompt, bounds, calls_of
from .edit import Edits, PromptToPrompt
from .errors import UserError
from .pipeline import bind_edit
from .scheduler import Scheduler, make_scheduler
from .settings import latent_size, list_of
from .weights import StableDiffusion


class Line(NamedTuple):
    name: str  # a token, "layout" or "blend"
    what: str  # whose attention the token takes over; of the others, where they act
    calls: range | None  # of the UNet; None: it takes over nothing
    weight: float = 1.0
    token: int | None = None  # its position


def lines(edit: PromptToPrompt, r: int, calls: int) -> list[Line]:
    """Of prompt r: a line for each token, one for self-attention, one for a blend.

    Without an edit of that prompt there are none.
    """
    if not edit.exists[r].any():
        return []
    source, target = edit.prompts[0], edit.prompts[r]
    taken, found = edit.mapper[r] * edit.exists[r], []
    for j in range(1, target.end):
        names = []
        for i in taken[:, j].nonzero().flatten().tolist():
            part = taken[i, j].item()
            names.append(name(source, i) if part == 1 else f"1/{1 / part:.0f} {name(source, i)}")
        when = range(*bounds(edit.windows[r, j], calls).tolist()) if names else None
        whose = " + ".join(names) or "(nothing: new)"
        found.append(Line(name(target, j), whose, when, edit.weights[r, j].item(), j))
    h, w = edit.coarse
    when = range(*bounds(edit.self_windows[r], calls).tolist())
    found.append(Line("layout", f"(self-attention up to {h} x {w})", when))
    for blend in edit.blends:
        if blend.r == r:
            words = ", ".join(blend.spec.words) or "your own mask"
            if blend.spec.subtract:
                words += f" without {', '.join(blend.spec.subtract)}"
            found.append(Line("blend", f"({words})", calls_of((blend.spec.start, 1.0), calls)))
    return found


def name(prompt: Prompt, i: int) -> str:
    """The text of the token at position i."""
    if 0 < i < prompt.end:
        return prompt.text[slice(*prompt.spans[i - 1])]
    return "<end>" if i else "<begin>"


def said(when: range, calls: int) -> str:
    return f"{when.start + 1} to {when.stop} of {calls}" if when else f"none of {calls}"


def text(edit: PromptToPrompt, calls: int) -> str:
    """A table for each edited prompt."""
    tables = [f"Source: {edit.prompts[0].text}"]
    for r, prompt in enumerate(edit.prompts[1:], 1):
        of_row = lines(edit, r, calls)
        if not of_row:
            tables.append(f"Edit {r}: without control.")
            continue
        where = "in all" if edit.everywhere[r] else "in its window"
        rows = [("token", "looks where the source looks at", "in the UNet's calls", "")]
        for line in of_row:
            if line.token is None and line.name == "layout":
                rows.append(("", "", "", ""))
            weight = "" if line.weight == 1 else f"weight {line.weight:g} {where}"
            when = "" if line.calls is None else said(line.calls, calls)
            rows.append((line.name, line.what, when, weight))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        laid_out = ("  ".join(map(str.ljust, row, widths)) for row in rows)
        table = "\n".join(f"  {row}".rstrip() for row in laid_out)
        tables.append(f"Edit {r}: {prompt.text}\n\n{table}")
    return "\n\n".join(tables)


def explain(
    model: StableDiffusion,
    prompts: Sequence[str],
    edit: Edits = "auto",
    *,
    num_inference_steps: int | None = None,
    scheduler: str | Scheduler | None = None,
    height: int | None = None,
    width: int | None = None,
) -> str:
    """What an edit will do, as a table: which tokens take over whose attention, and when."""
    size = latent_size(model, height, width, None)
    _, hook = bind_edit(model, list_of(prompts), edit, size)
    if hook is None:
        raise UserError("There is no edit to explain: give a WordSwap, Refine or Reweight.")
    return text(hook, len(make_scheduler(model, num_inference_steps, scheduler).timesteps))
