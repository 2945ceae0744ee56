"""The program python -m minip2p.studio: load a model and serve the studio's page until Ctrl+C.

It writes nothing outside of a temporary folder, fetches nothing but a model that --model names on
the hub, and answers this machine alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .. import fast
from ..errors import UserError
from ..program import Parser, number, run_program, say
from ..settings import Bounds
from ..weights import load
from .drawing import Studio

# The browser itself is told to fetch nothing from elsewhere. Gradio's templates are functions.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
PORTS = Bounds(0, 65535, is_whole=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program(run, argv)


def run(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m minip2p.studio",
        description="A page in the browser to edit prompts and drag windows in.",
    )
    parser.add_argument("--model", default="emoji", help="emoji (bundled), a folder, a hub id")
    parser.add_argument("--tokenizer", help="a folder with CLIP's tokenizer, beside a single file")
    parser.add_argument("--device", help="cpu, cuda, mps; by default the fastest that is there")
    parser.add_argument("--port", type=number(PORTS), default=7860, help="0: any free one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="minip2p-", ignore_cleanup_errors=True) as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        # matplotlib, which Gradio imports, and torch keep files of their own.
        os.environ.update(MPLCONFIGDIR=folder, TORCHINDUCTOR_CACHE_DIR=folder)
        serve(args)


def serve(args: argparse.Namespace) -> None:
    """Load the model, print the address, and answer until a signal ends the program."""
    try:
        import uvicorn

        from .app import make_app  # imports Gradio, which the rest of minip2p does without
    except ImportError:
        raise UserError("The studio needs Gradio: pip install 'minip2p[studio]'.") from None
    executor = ThreadPoolExecutor(1)
    try:
        with socket.create_server(("127.0.0.1", args.port)) as listener:
            loading = {"tokenizer": args.tokenizer, "device": args.device}
            model = executor.submit(load, args.model, **loading).result()
            if model.device.type == "cpu":
                fast.keep_memory()
            loaded = {"model": args.model, "tokenizer": args.tokenizer}
            studio = Studio(model, executor, loaded, args.device)
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = studio.record_warning  # type: ignore[assignment]

            class Server(uvicorn.Server):
                def handle_exit(self, *arguments: Any) -> None:
                    studio.is_closing = True  # ends the runs
                    super().handle_exit(*arguments)

            app = make_app(studio)
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            config = uvicorn.Config(
                app,
                log_level="critical",
                headers=[("Content-Security-Policy", POLICY)],
                timeout_graceful_shutdown=1,  # a page that is open listens for ever
            )
            with contextlib.suppress(KeyboardInterrupt):  # the usual way to end it
                say(f"The studio is at {address} until Ctrl+C.")
                Server(config).run(sockets=[listener])
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def exit_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the program as Ctrl+C does, with its temporary folder removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        # By way of SIGTERM, which the server handles while it runs.
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


if __name__ == "__main__":
    exit_on_signals()
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a UNet call of SD's size goes on for seconds, and nobody waits for it
