"""The studio's page, made of Gradio's widgets. studio.js and studio.css are those it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..align import window
from ..run import EXAMPLE
from ..words import swap_word
from .door import Door, make_routes
from .drawing import Studio, Visitor
from .request import PROMPT, word_rows

HERE = Path(__file__).parent
# Changes can overtake each other on their way here: the browser says when it sent each.
STAMP = "(visitor, sent, ...more) => [visitor, performance.timeOrigin + performance.now(), ...more]"


def make_app(studio: Studio) -> Any:
    """Return the page as an ASGI application, behind its door (door.py)."""
    css, js = (HERE.joinpath(f"studio.{kind}").read_text("utf-8") for kind in ("css", "js"))
    app = gr.mount_gradio_app(
        make_routes(studio),
        make_blocks(studio),
        "/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        theme=gr.themes.Base(primary_hue="fuchsia", font=["system-ui"], font_mono=["monospace"]),
        head=f"<style>{css}</style><script>{js}</script>",  # css= loses container queries
    )
    return Door(app)


def make_blocks(studio: Studio) -> Any:
    """Return the page's layout and its one event: every change asks for an answer."""
    with gr.Blocks(title="minip2p studio", analytics_enabled=False, fill_width=True) as blocks:
        blocks.state_session_capacity = 100  # loaded pages whose values Gradio keeps
        outputs, inputs = make_widgets(studio)
        visitor, sent = gr.State(Visitor()), gr.Number(0, visible=False)

        def answer(*values: Any) -> Iterator[dict[Any, Any]]:
            for changes in studio.answer(*values):
                # Updates alone: Gradio keeps every plain value that follows a skipped one.
                changed = {outputs[name]: gr.update(value=v) for name, v in changes.items()}
                yield changed or {outputs["state"]: gr.skip()}

        words, prompt, edited, picture, *numbers = inputs
        changes = [widget.change for widget in (prompt, edited, *numbers)]
        gr.on(
            # An answer changes the words' value, too: that must not ask for another.
            [blocks.load, words.input, picture.input, *changes],
            answer,
            [visitor, sent, *inputs],
            list(outputs.values()),
            js=STAMP,
            trigger_mode="multiple",
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
    return blocks


def make_widgets(studio: Studio) -> tuple[dict[str, Any], list[Any]]:
    """Return the widgets that an answer changes, by name, and those it is asked with, in order."""
    source, target = EXAMPLE[0], swap_word(EXAMPLE[0], *EXAMPLE[1].split("="))
    defaults = studio.model.defaults
    settings: dict[str, Any] = {
        "rows": word_rows(studio.model, source, target),
        "cross_replace_steps": window(defaults["cross_replace_steps"]),
        "self_replace_steps": window(defaults["self_replace_steps"]),
        "windows": {},
        "weights": {},
        "blend": {},
    }

    def html(name: str, value: Any) -> Any:  # studio.js fills it
        return gr.HTML(
            value,
            elem_id=name,
            html_template="<div></div>",
            js_on_load=f"studio{name.title()}(element, props, trigger, watch)",
            apply_default_css=False,
        )

    def box(name: str, value: str, label: str, **arguments: Any) -> Any:
        return gr.Textbox(value, label=label, elem_id=name, min_width=280, **arguments)

    def slider(name: str, low: float, high: float, value: float, step: float, label: str) -> Any:
        # A narrower one would scroll.
        return gr.Slider(low, high, value, step=step, label=label, elem_id=name, min_width=200)

    with gr.Row():
        prompt = box("prompt", source, "Prompt", max_length=PROMPT)
        edited = box("edited", target, "Edited prompt", max_length=PROMPT)
    state = box("state", "", "", show_label=False, container=False, interactive=False)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            frame = html("frame", {})
        with gr.Column(scale=2, min_width=320):
            words = html("words", settings)
            with gr.Row():
                steps = slider("steps", 1, 100, 20, 1, "Steps")
                guidance = slider("guidance", 0, 30, defaults["guidance_scale"], 0.5, "Guidance")
                seed = gr.Number(8888, precision=0, minimum=0, label="Seed", elem_id="seed")
            picture = html("picture", {})
            inversion = slider("inversion", 0, 30, 1, 0.5, "Guidance of your picture's inversion")
            code: dict[str, Any] = {
                "lines": 3,
                "max_lines": 16,
                "interactive": False,
                "buttons": ["copy"],
            }
            command = box("command", "", "Copy as command: the same pictures to the bit", **code)
            python = box("python", "", "Copy as Python: the same but for rounding", **code)
    outputs = {"state": state, "frame": frame, "words": words}
    outputs |= {"command": command, "python": python}
    return outputs, [words, prompt, edited, picture, steps, guidance, seed, inversion]
