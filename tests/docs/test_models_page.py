"""docs/models.md lists the families that the registry has, and no others."""

from pathlib import Path

from dash_runtime.families import FAMILIES

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "models.md"


def test_the_table_has_a_row_for_each_family_with_its_names() -> None:
    rows = [row.split(" | ") for row in PAGE.read_text().splitlines() if "ForCausalLM" in row]
    listed = {architecture.strip("`"): gguf.strip("`") for _, architecture, gguf, _ in rows}
    in_registry = {family.architecture: family.gguf_architecture for family in FAMILIES}
    assert listed == in_registry | {"MistralForCausalLM": "llama"}  # whose GGUF files say that they are Llama's
