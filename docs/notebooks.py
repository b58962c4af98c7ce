"""Runs the notebooks of the documentation: ``python docs/notebooks.py`` writes their outputs into ``docs/notebooks``.

With names, only those; with ``--check``, nothing is written. A cell that fails ends the program. Needs the extra
``docs``.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
#: Longest output of a cell, in characters of its JSON, and of all cells of a notebook.
LONGEST_CELL, LONGEST = 60_000, 200_000


def run(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with new outputs, without what changes from run to run.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
        ValueError: If an output is too long to be committed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tempfile.gettempdir()}}
    )
    client.execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = list(clean(cell.outputs))
        if len(str(cell.get("outputs", ""))) > LONGEST_CELL:
            raise ValueError(
                f"the output of cell {number} of {path.name} is longer than {LONGEST_CELL} characters; draw less"
            )
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    if len(nbformat.writes(notebook)) > LONGEST:
        raise ValueError(f"{path.name} is longer than {LONGEST} characters; draw less")
    return notebook


def clean(outputs: list[nbformat.NotebookNode]) -> Iterator[nbformat.NotebookNode]:
    """Yield a cell's outputs: all printed text as one, and pictures; progress bars and logs (stderr) are left out."""
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    if printed:
        yield nbformat.v4.new_output("stream", name="stdout", text=re.sub(r"/tmp/\w+", "/tmp/folder", printed))
    for output in outputs:
        if output.output_type != "stream":
            output.metadata = {}
            yield output


def main(arguments: list[str]) -> None:
    """Run notebooks."""
    names = [a for a in arguments if not a.startswith("--")]
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook = run(path)
        if "--check" not in arguments:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
