"""Writes the pages of docs/guide that follow from the package: `make reference`, after a method or model changed."""

from __future__ import annotations

from pathlib import Path

from d4s.methods import METHODS
from d4s.methods.tables import about
from d4s.models.architectures import ARCHITECTURES

GUIDE = Path(__file__).resolve().parent / "guide"


def methods() -> str:
    """Every method's fields and presets, as `d4s methods NAME` prints them."""
    parts = [
        "# Fields and presets of every method",
        "What `d4s methods NAME` prints. `--set FIELD=VALUE` and `config={FIELD: VALUE}` take any field by its name, "
        "those of the target optimiser too. What the methods do, and where they differ from their papers: "
        "[methods](methods.md).",
    ]
    for name in METHODS:
        parts += [f"## {name}", f"```text\n{about(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def models() -> str:
    """Every type of model, and where its blocks and MLP output projections lie, as `d4s models` prints them."""
    rows = [f"| {name} | `{row.blocks}` | `{row.mlp_output}` |" for name, row in ARCHITECTURES.items()]
    return (
        "\n\n".join(
            [
                "# Types of models",
                f"What `d4s models` prints: the {len(rows)} values of `model_type` in config.json that d4s knows, and "
                "where W is. How another one is named: [models and data](models-and-data.md).",
                "\n".join(["| `model_type` | blocks | W, within a block |", "|---|---|---|", *rows]),
            ]
        )
        + "\n"
    )


PAGES = {GUIDE / "presets.md": methods, GUIDE / "model-types.md": models}

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
