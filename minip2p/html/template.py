"""One way to fill an HTML template, shared by the interactive page and the report."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def fill(template: Path, values: Mapping[str, str]) -> str:
    """Return the template's text with each {{name}} replaced by its value.

    Values are HTML: escape text, and write data for a script with `script_json`.
    """
    # One pass, so that "{{name}}" inside a prompt is not replaced in turn.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template.read_text("utf-8"))


def script_json(data: Any) -> str:
    """Return the data as JSON that can stand inside a script element."""
    # "</script>" would end the element: JSON may write every < as an escape.
    return json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")


def data_uri(image: Image.Image, png_bytes: int = 2**17, quality: int = 92) -> str:
    """Return the image as a data URI: a PNG of at most `png_bytes`, else a JPEG of `quality`."""
    for kind, options in (("png", {}), ("jpeg", {"quality": quality})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        if kind == "jpeg" or file.tell() <= png_bytes:
            break
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
