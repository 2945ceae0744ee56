"""Tables that explain an edit before it is made: which tokens take over whose attention, and when.

`explain_row` collects what there is to say. `explain` and the interactive page lay it out.
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
    """A line of a table: a token of the edited prompt, its layout, or its blend."""

    name: str  # the token's text, "layout" or "blend"
    source: str  # the tokens whose attention it takes over; in brackets, where the others act
    calls: range | None  # the UNet calls in which it acts; None: it takes over nothing
    weight: float = 1.0
    token: int | None = None  # its position


def explain_row(edit: PromptToPrompt, r: int, calls: int) -> list[Line]:
    """Return a line for each token of prompt r, one for self-attention and one for each blend.

    Without an edit of that prompt there are none.
    """
    if not edit.exists[r].any():
        return []
    source, target = edit.prompts[0], edit.prompts[r]
    mapper, lines = edit.mapper[r] * edit.exists[r], []
    for j in range(1, target.end):
        names = []
        for i in mapper[:, j].nonzero().flatten().tolist():
            share, name = mapper[i, j].item(), token_name(source, i)
            names.append(name if share == 1 else f"1/{1 / share:.0f} {name}")
        acts = range(*bounds(edit.windows[r, j], calls).tolist()) if names else None
        sources = " + ".join(names) or "(nothing: new)"
        lines.append(Line(token_name(target, j), sources, acts, edit.weights[r, j].item(), j))
    h, w = edit.coarse
    acts = range(*bounds(edit.self_windows[r], calls).tolist())
    lines.append(Line("layout", f"(self-attention up to {h} x {w})", acts))
    for blend in edit.blends:
        if blend.r == r:
            words = ", ".join(blend.spec.words) or "your own mask"
            if blend.spec.subtract:
                words += f" without {', '.join(blend.spec.subtract)}"
            lines.append(Line("blend", f"({words})", calls_of((blend.spec.start, 1.0), calls)))
    return lines


def token_name(prompt: Prompt, i: int) -> str:
    """Return the text of the token at position i."""
    if 0 < i < prompt.end:
        return prompt.text[slice(*prompt.spans[i - 1])]
    return "<end>" if i else "<begin>"


def calls_text(acts: range, calls: int) -> str:
    """Return "1 to 40 of 50" for the first 40 of 50 UNet calls."""
    return f"{acts.start + 1} to {acts.stop} of {calls}" if acts else f"none of {calls}"


def table(edit: PromptToPrompt, calls: int) -> str:
    """Return a table for each edited prompt, below the source prompt."""
    tables = [f"Source: {edit.prompts[0].text}"]
    for r, prompt in enumerate(edit.prompts[1:], 1):
        lines = explain_row(edit, r, calls)
        if not lines:
            tables.append(f"Edit {r}: without control.")
            continue
        where = "in all" if edit.everywhere[r] else "in its window"
        rows = [("token", "looks where the source looks at", "in the UNet's calls", "")]
        for line in lines:
            if line.token is None and line.name == "layout":
                rows.append(("", "", "", ""))
            weight = "" if line.weight == 1 else f"weight {line.weight:g} {where}"
            acts = "" if line.calls is None else calls_text(line.calls, calls)
            rows.append((line.name, line.source, acts, weight))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = ("  ".join(map(str.ljust, row, widths)) for row in rows)
        tables.append(
            "\n".join([f"Edit {r}: {prompt.text}", "", *(f"  {row}".rstrip() for row in padded)])
        )
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
    """Return tables of which tokens take over whose attention, in which UNet calls.

    The arguments are those of `generate`, which takes the same edit with them.
    Raises UserError if the edit does not fit the prompts, or if there is none.
    """
    size = latent_size(model, height, width, None)
    _, hook = bind_edit(model, list_of(prompts), edit, size)
    if hook is None:
        raise UserError("There is no edit to explain: give a WordSwap, Refine or Reweight.")
    sampler = make_scheduler(model, num_inference_steps, scheduler)
    calls, skip = len(sampler.timesteps), getattr(sampler, "skip", 0)
    note = (
        f"\n\nThe first {skip} of the {skip + calls} steps are skipped: windows are fractions of "
        f"the {calls} calls that are left."
    )
    return table(hook, calls) + (note if skip else "")
