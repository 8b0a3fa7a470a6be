"""Fill the templates of a page and its Markdown twin, and write both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepmsi.data.files import write_text


def write_both(page: Path, name: str, context: Mapping[str, Any]) -> Path:
    """Write a page of the template `name` and, beside it, its Markdown twin; returns the page's path."""
    # The Markdown first: where the page is, its twin is.
    write_text(page.with_suffix(".md"), _render(f"{name}.md.j2", context))
    write_text(page, _render(f"{name}.html.j2", context))
    return page


def _render(template: str, context: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("deepmsi.report"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(score=_score, md=_markdown, heat=_heat)
    return environment.get_template(template).render(context)


def _score(value: Any, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _heat(share: float) -> str:
    """Background of a confusion cell: white at 0, blue at 1; the text turns white on dark cells."""
    weight = min(max(share, 0.0), 1.0)
    red, green, blue = (round(255 - weight * (255 - end)) for end in (38, 92, 158))
    return f"background:rgb({red},{green},{blue});color:{'#fff' if weight > 0.55 else '#2b2f36'}"


def _markdown(value: Any) -> str:
    """Make any text inert inside a Markdown table: no markup, no cell or line breaks, no link."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#!|~" else c for c in text)
