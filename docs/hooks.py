"""Extends Markdown for the documentation site: formulas as MathML, notebooks, and documents from elsewhere.

MkDocs calls the functions ``on_...`` while it builds (``mkdocs.yml``). Nothing is loaded from a network, then or later.
"""

from __future__ import annotations

import base64
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: Documents outside of ``docs`` that are pages of the site, by their path in the repository.
ELSEWHERE = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "experiments/LOG.md": "log.md",
}
#: Pages whose tables take the place of their table of contents.
WIDE = {"scores.md"}
#: The picture in the place of ARCHITECTURE.md's diagram, which only GitHub and a script from elsewhere can draw.
DIAGRAM = "![The rooms of the library, and which uses which](pictures/architecture.svg)"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each document of ``ELSEWHERE``, with its pictures, and for each notebook."""
    for source, page in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=re.sub(r"```mermaid\n.*?```", DIAGRAM, text, flags=re.S)))
        for picture in re.findall(r"!\[[^]]*\]\((?!https?:)([^)\s]+)\)", text):
            content = (ROOT / source).parent.joinpath(picture).read_bytes()
            files.append(File.generated(config, picture, content=content))
    for path in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        text, pictures = convert_notebook(json.loads(path.read_text(encoding="utf-8")), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turn links to documents of ``ELSEWHERE``, and links from them, into links between pages of the site."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    origin = next(
        (source for source, uri in ELSEWHERE.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}"
    )

    def redirect(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = (ROOT / origin).parent.joinpath(target).resolve()
        if not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        uri = ELSEWHERE.get(name, name.removeprefix("docs/") if name.startswith("docs/") else None)
        if uri is None:
            return match[0]
        depth = page.file.src_uri.count("/")
        return f"]({'../' * depth}{uri}{anchor})"

    return re.sub(r"\]\(((?!https?:|mailto:)[^)#\s]+)(#[^)\s]*)?\)", redirect, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Write formulas as MathML, which browsers draw by themselves."""

    def inline(match: re.Match[str]) -> str:
        return convert(unescape(match[1]), display="inline")

    def block(match: re.Match[str]) -> str:
        return f'<div class="formula">{convert(unescape(match[1]).strip(), display="block")}</div>'

    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, html, flags=re.S)
    return re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', block, html, flags=re.S)


def on_post_build(config: MkDocsConfig) -> None:
    """Remove the page for wrong addresses, the only one whose own addresses hold at the root of a host alone."""
    Path(config.site_dir, "404.html").unlink()


def convert_notebook(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by file name."""
    blocks: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        blocks.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                blocks.append(f"![]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
                blocks.append(f"```text {{.output}}\n{text}\n```")
    note = f"*The notebook is `docs/notebooks/{stem}.ipynb`; the tests run it.*"
    return "\n\n".join([*blocks, note]) + "\n", pictures
