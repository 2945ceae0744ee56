"""The studio, python -m minip2p.studio: a page in the browser to drag windows in.

`Studio` draws what visitors wish (wish.py); a newer change of the same visitor ends an older run at
its next step. `make_app` is the page: Gradio is imported there and nowhere else. studio.js and
studio.css are what Gradio has no widget for.
Nothing is written outside of a temporary folder, and nothing is fetched from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from .. import fast
from ..align import window
from ..errors import check, describe, is_number
from ..html.page import PageStore, page
from ..invert import Inversion, invert
from ..pipeline import Result, generate
from ..program import Parser, fail, number
from ..run import EXAMPLE
from ..settings import Bounds
from ..weights import StableDiffusion, load
from ..words import swap_word
from .wish import LIMITS, PROMPT, Wish, make_wish, rows

HERE = Path(__file__).parent
NAMES = "Source", "Edited prompt, without control", "Edit"
# The browser itself is told to fetch nothing from elsewhere. Gradio's templates are functions.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
# Changes can overtake each other on their way here: the browser says when it sent each.
STAMP = "(visitor, sent, ...more) => [visitor, performance.timeOrigin + performance.now(), ...more]"


# --- drawing it, the latest change first ---------------------------------------------------------


class OutdatedError(Exception):
    """The same visitor asks for something else by now."""


class Visitor:
    """When the browser sent its latest change, and the last picture given, with the way to it."""

    sent = 0.0
    given: tuple[tuple[str, str, float], Inversion] | None = None

    def check(self, sent: float) -> None:
        """Raises OutdatedError if a change came after the one that was sent then."""
        if sent < self.sent:
            raise OutdatedError


class Drawn(NamedTuple):
    result: Result
    page: str
    heard: list[str]  # what there is to warn of


class Studio:
    """A model that draws for one visitor at a time. loaded: what `load` was given.

    hand: one thread for all of torch's work, loading included. Where two have a team of OpenMP's
    threads, none waits awake for the next piece, and a run takes 2.6 s instead of 1.6.
    """

    def __init__(self, model: StableDiffusion, loaded: Mapping[str, str], hand: Executor):
        self.model, self.loaded, self.hand = model, loaded, hand

    def draw(self, wish: Wish, visitor: Visitor, sent: float) -> Drawn:
        """In turn. Raises OutdatedError as soon as the visitor asks for something else."""
        turn = self.hand.submit(self.draw_now, wish, visitor, sent)
        try:
            while not wait([turn], timeout=0.05).done:
                visitor.check(sent)
            return turn.result()
        finally:
            turn.cancel()  # of those that wait; one that draws ends by itself

    def draw_now(self, wish: Wish, visitor: Visitor, sent: float) -> Drawn:
        visitor.check(sent)
        # Before each UNet call, for invert has no callback.
        watch = self.model.unet.register_forward_pre_hook(lambda *_: visitor.check(sent))
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always", UserWarning)
                asked: dict[str, Any] = {"source": self.source(wish, visitor), "store": PageStore()}
                result = generate(self.model, **wish.settings(), **asked)
        finally:
            watch.remove()
        text = page(result, result.edit, NAMES[: len(wish.prompts)])
        return Drawn(result, text, list(dict.fromkeys(str(w.message) for w in heard)))

    def source(self, wish: Wish, visitor: Visitor) -> Inversion | None:
        """The given picture, inverted once for all edits of it."""
        if not wish.picture:
            return None
        asked = wish.picture, wish.prompt, wish.numbers["steps"]
        if visitor.given is None or visitor.given[0] != asked:
            found = invert(self.model, *asked[:2], num_inference_steps=int(asked[2]))
            visitor.given = asked, found
        return visitor.given[1]

    def answer(
        self,
        visitor: Visitor,
        sent: Any,
        said: Any,
        prompt: Any,
        edited: Any,
        picture: str | None,
        *numbers: Any,
    ) -> Iterator[dict[str, Any]]:
        """What changes on the page: the words' rows at once, later pictures and what repeats them.

        said: of the words, as studio.js keeps it. picture: a file. numbers: steps, guidance, seed.
        """
        started = time.perf_counter()
        try:
            check(is_number(sent), f"When a change was sent is a number, not {describe(sent)}.")
            visitor.check(sent)
            visitor.sent = sent
            words = rows(self.model, prompt, edited)
            yield {"words": {"rows": words}}
            named = dict(zip(("steps", "guidance", "seed"), numbers, strict=True))
            wish = make_wish(self.model, prompt, edited, named, said, picture)
            yield {"state": "Drawing …"}
            drawn = self.draw(wish, visitor, sent)
            yield {
                "words": {"rows": words},  # what older answers said of them may have come later
                "state": " ".join([f"{time.perf_counter() - started:.1f} s.", *drawn.heard]),
                "frame": {"page": drawn.page},
                "command": wish.command(self.loaded),
                "python": wish.python(self.loaded),
            }
        except OutdatedError:
            yield {}
        except ValueError as error:
            yield {"state": str(error)}


# --- the page ------------------------------------------------------------------------------------


def make_app(studio: Studio) -> Any:
    """The page, as an ASGI application."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI()
    # Another layer's page can't ask by giving this address a name of its own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    css, js = (HERE.joinpath(f"studio.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return gr.mount_gradio_app(
        app,
        make_blocks(gr, studio),
        "/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        max_file_size="10mb",
        theme=gr.themes.Base(primary_hue="fuchsia", font=["system-ui"], font_mono=["monospace"]),
        head=f"<style>{css}</style><script>{js}</script>",  # css= loses container queries
    )


def make_blocks(gr: Any, studio: Studio) -> Any:
    """What is on the page, and that every change asks for an answer. gr: the module gradio."""
    with gr.Blocks(title="minip2p studio", analytics_enabled=False, fill_width=True) as blocks:
        shown, asked = make_widgets(gr, studio)
        visitor, sent = gr.State(Visitor()), gr.Number(0, visible=False)

        def answer(*values: Any) -> Iterator[dict[Any, Any]]:
            for changes in studio.answer(*values):
                changed = {shown[name]: value for name, value in changes.items()}
                yield changed or {shown["state"]: gr.skip()}

        words, *others = asked  # whose value answers change, too: that asks for none
        gr.on(
            [blocks.load, words.input, *(widget.change for widget in others)],
            answer,
            [visitor, sent, *asked],
            list(shown.values()),
            js=STAMP,
            trigger_mode="multiple",
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
    return blocks


def make_widgets(gr: Any, studio: Studio) -> tuple[dict[str, Any], list[Any]]:
    """What an answer changes, by name, and what it is asked with, in order."""
    source, target = EXAMPLE[0], swap_word(EXAMPLE[0], *EXAMPLE[1].split("="))
    said = first_said(studio.model, source, target)
    scale = studio.model.defaults["guidance_scale"]

    def html(name: str, value: Any) -> Any:  # studio.js fills it
        call = f"studio{name.title()}(element, props, trigger, watch)"
        return gr.HTML(
            value,
            html_template="<div></div>",
            js_on_load=call,
            apply_default_css=False,
            elem_id=name,
        )

    def box(name: str, value: str, label: str, **more: Any) -> Any:
        return gr.Textbox(value, label=label, elem_id=name, min_width=280, **more)

    with gr.Row():
        prompt = box("prompt", source, "Prompt", max_length=PROMPT)
        edited = box("edited", target, "Edited prompt", max_length=PROMPT)
    shown = {"state": box("state", "", "", show_label=False, container=False, interactive=False)}
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            shown["frame"] = html("frame", {})
        with gr.Column(scale=2, min_width=320):
            shown["words"] = html("words", said)
            with gr.Row():
                wide = {"min_width": 200}  # narrower ones would scroll
                steps = gr.Slider(
                    *LIMITS["steps"], 20, step=1, label="Steps", elem_id="steps", **wide
                )
                guidance = gr.Slider(*LIMITS["guidance"], scale, step=0.5, label="Guidance", **wide)
                seed = gr.Number(8888, precision=0, minimum=0, label="Seed", elem_id="seed")
            picture = gr.File(
                label="Your own picture, which the prompt describes",
                elem_id="picture",
                height=150,
                file_types=["image"],
            )
            look = {"lines": 3, "max_lines": 16, "interactive": False, "buttons": ["copy"]}
            shown["command"] = box("command", "", "Copy as command", **look)
            shown["python"] = box("python", "", "Copy as Python", **look)
    return shown, [shown["words"], prompt, edited, picture, steps, guidance, seed]


def first_said(model: StableDiffusion, source: str, target: str) -> dict[str, Any]:
    """What studio.js keeps of the words, before anything is changed."""
    return {
        "rows": rows(model, source, target),
        "all": window(model.defaults["cross_replace_steps"]),
        "layout": window(model.defaults["self_replace_steps"]),
        **{name: {} for name in ("windows", "weights", "blend")},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 for a mistake of the user's."""
    parser = Parser(
        prog="python -m minip2p.studio",
        description="A page in the browser to edit prompts and drag windows in.",
    )
    parser.add_argument("--model", default="emoji", help="emoji (bundled), a folder, a hub id")
    parser.add_argument("--device", help="cpu, cuda, mps; by default the fastest that is there")
    parser.add_argument(
        "--port", type=number(Bounds(0, 65535, is_whole=True)), default=7860, help="0: any free one"
    )
    try:
        args = parser.parse_args(argv)
        with tempfile.TemporaryDirectory(prefix="minip2p-studio-") as folder:
            os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
            os.environ["MPLCONFIGDIR"] = folder  # Gradio imports matplotlib, which keeps fonts
            serve(args)
    except (OSError, ValueError) as error:
        return fail(error)
    except KeyboardInterrupt:
        pass
    return 0


def serve(args: argparse.Namespace) -> None:
    """Load, say the address, and answer until Ctrl+C."""
    try:
        import gradio  # noqa: F401
        import uvicorn
    except ImportError:
        raise ValueError("The studio needs Gradio: pip install 'minip2p[studio]'.") from None
    given = {"source": args.model, "device": args.device}
    loaded = {name: value for name, value in given.items() if value not in (None, "emoji")}
    with socket.create_server(("127.0.0.1", args.port)) as listening, ThreadPoolExecutor(1) as hand:
        model = hand.submit(load, args.model, device=args.device).result()
        if model.device.type == "cpu":
            fast.keep_memory()
        app = make_app(Studio(model, loaded, hand))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        print(f"The studio is at {address} until Ctrl+C.", flush=True)
        policy = [("Content-Security-Policy", POLICY)]
        config = uvicorn.Config(app, log_level="warning", headers=policy)
        uvicorn.Server(config).run(sockets=[listening])
