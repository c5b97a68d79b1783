"""`make reference`: writes docs/reference.md from the docstrings of everything in `dash_client.__all__`.

Reads the sources without importing them. Knows none of the client's names: the exports decide.
"""

import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference.md"
_PACKAGE = "dash_client"
_INTRODUCTION = """\
# Reference

Everything that `dash_client` exports, from its docstrings; [client.md](client.md) is the guide. `make reference` writes
this page, and a test fails where it is not what the sources say. An `await` outside of a function is meant as in
`python -m asyncio`.
"""
_ORDER = ("Clients and streams", "Functions", "Options and prompts", "Answers", "Names", "Errors")
_SIGNATURE_WIDTH = 100


def main() -> None:
    PAGE.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """Returns the page's text."""
    package = griffe.load(_PACKAGE, search_paths=[str(ROOT / "client")])
    groups: dict[str, list[str]] = {title: [] for title in _ORDER}
    names = [str(name) for name in package.exports or ()]
    for name in sorted(names, key=str.lower):
        member = package[name]
        subject = member.final_target if member.is_alias else member
        groups[_group(subject)].append("\n\n".join(_entry(name, subject, set(names))))
    parts = [_INTRODUCTION.rstrip()]
    for title, entries in groups.items():
        if entries:
            parts += [f"## {title}", *entries]
    return "\n\n".join(parts) + "\n"


def _group(subject: griffe.Object) -> str:
    if subject.is_function:
        return "Functions"
    if not isinstance(subject, griffe.Class):
        return "Options and prompts"
    bases = _base_names(subject)
    if any(base.endswith(("Error", "Exception")) for base in bases):
        return "Errors"
    if bases & {"Enum", "IntEnum", "StrEnum"}:
        return "Names"
    if "TypedDict" in bases:
        return "Options and prompts"
    return "Answers" if "dataclass" in subject.labels else "Clients and streams"


def _base_names(subject: griffe.Class) -> set[str]:
    return {str(base).split("[")[0].rsplit(".", 1)[-1] for base in subject.bases}


def _entry(name: str, subject: griffe.Object, exported: set[str]) -> Iterator[str]:
    yield f"### `{name}`"
    if isinstance(subject, griffe.Function):
        yield _signature(name, subject)
    elif isinstance(subject, griffe.Attribute):
        yield f"`{name} = {subject.value}`"
    is_errors = isinstance(subject, griffe.Class) and _group(subject) == "Errors"
    if is_errors and isinstance(subject, griffe.Class):
        yield "A kind of " + " and of ".join(f"`{base}`" for base in subject.bases) + "."
    is_client = isinstance(subject, griffe.Class) and _group(subject) == "Clients and streams"
    members = _public_members(subject, exported) if isinstance(subject, griffe.Class) else {}
    if is_client and "__init__" in subject.all_members:
        constructor = subject.all_members["__init__"]
        if isinstance(constructor, griffe.Function) and not _is_made_by_the_client(subject):
            yield _signature(name, constructor)
    yield from _documentation(subject)
    values = {key: member for key, member in members.items() if isinstance(member, griffe.Attribute)}
    if values and not is_errors:
        yield _table(values, is_enum=_group(subject) == "Names")
    for key, member in members.items():
        if isinstance(member, griffe.Function):
            yield f"#### `{name}.{key}`"
            yield "\n\n".join(_signature(key, function) for function in member.overloads or [member])
            yield from _documentation(member)


def _is_made_by_the_client(subject: griffe.Object) -> bool:
    """True for streams and sessions: users never construct them, and their constructors take gRPC calls."""
    return subject.name.endswith(("Stream", "Session"))


def _public_members(subject: griffe.Class, exported: set[str]) -> dict[str, griffe.Object]:
    """Returns its own members and those of our unexported base classes, in source order."""
    found: dict[str, griffe.Object] = {}
    for owner in [subject, *_bases_of_ours(subject)]:
        if owner is not subject and owner.name in exported:
            continue
        for key, member in owner.members.items():
            if not key.startswith("_") and not member.is_alias and (member.is_function or member.is_attribute):
                found.setdefault(key, member)  # type: ignore[arg-type]
    return found


def _bases_of_ours(subject: griffe.Class) -> list[griffe.Class]:
    try:
        return [base for base in subject.mro() if isinstance(base, griffe.Class)]
    except ValueError:
        return []


def _signature(name: str, function: griffe.Function) -> str:
    parameters: list[str] = []
    has_star = False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind
        if kind is griffe.ParameterKind.keyword_only and not has_star:
            parameters.append("*")
        has_star |= kind in (griffe.ParameterKind.keyword_only, griffe.ParameterKind.var_positional)
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(kind, "")
        text = f"{stars}{parameter.name}"
        if parameter.annotation is not None:
            text += f": {_plain(parameter.annotation)}"
        if parameter.default is not None and not stars:
            text += f"{' = ' if parameter.annotation is not None else '='}{parameter.default}"
        parameters.append(text)
    returns = "" if function.returns is None or name[:1].isupper() else f" -> {_plain(function.returns)}"
    start = "async def " if "async" in function.labels else "def "
    start = "" if name[:1].isupper() else start
    line = f"{start}{name}({', '.join(parameters)}){returns}"
    if len(line) > _SIGNATURE_WIDTH:
        line = f"{start}{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returns}"
    return f"<!-- not run: a signature -->\n```python\n{line}\n```"


def _documentation(subject: griffe.Object) -> Iterator[str]:
    if subject.docstring is None:
        return
    for section in griffe.parse_google(subject.docstring, warnings=False):
        if section.kind is griffe.DocstringSectionKind.text:
            yield section.value
        elif section.kind is griffe.DocstringSectionKind.admonition and section.value.kind == "example":
            yield _example(section.value.contents)
        elif section.kind is griffe.DocstringSectionKind.examples:
            yield _example("\n".join(text for _, text in section.value))
        elif section.kind is griffe.DocstringSectionKind.raises:
            yield "Raises:\n\n" + _items((str(item.annotation), item.description) for item in section.value)
        elif section.kind in (griffe.DocstringSectionKind.returns, griffe.DocstringSectionKind.yields):
            yield "Returns: " + " ".join(item.description for item in section.value)
        elif isinstance(section.value, list):
            yield _items((item.name, item.description) for item in section.value)
        else:
            yield f"{section.value.kind.title()}: {_line(section.value.contents)}"


def _example(code: str) -> str:
    """Returns an example as a block that tests/docs runs, after the lines that all examples presuppose."""
    code = textwrap.dedent(code).strip()
    client = "AsyncDashClient" if re.search(r"\b(async|await)\b", code) else "DashClient"
    return f"<!-- first: from {_PACKAGE} import *; client = {client}() -->\n```python\n{code}\n```"


def _items(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- `{name}`: {_line(text)}" for name, text in pairs)


def _table(members: dict[str, griffe.Attribute], *, is_enum: bool) -> str:
    rows = ["| name | value | |", "| --- | --- | --- |"] if is_enum else ["| name | type | |", "| --- | --- | --- |"]
    for key, member in members.items():
        shown = str(member.value) if is_enum else _type(member)
        rows.append(f"| `{key}` | {f'`{_cell(shown)}`' if shown else ''} | {_cell(_summary(member))} |")
    return "\n".join(rows)


def _type(member: griffe.Attribute) -> str:
    if member.annotation is None:
        return ""
    has_default = member.value is not None and "property" not in member.labels
    return _plain(member.annotation) + (f" = {member.value}" if has_default else "")


def _summary(member: griffe.Object) -> str:
    """Returns its whole text in one line, with the errors that it raises."""
    if member.docstring is None:
        return ""
    parts = []
    for section in griffe.parse_google(member.docstring, warnings=False):
        if section.kind is griffe.DocstringSectionKind.text:
            parts.append(_line(section.value))
        elif section.kind is griffe.DocstringSectionKind.raises:
            parts += [f"Raises `{item.annotation}`: {_line(item.description)}" for item in section.value]
    return " ".join(parts)


def _plain(annotation: object) -> str:
    """Returns a type as people read it: forward references without their quotes."""
    return re.sub(r"^'(.*)'$", r"\1", str(annotation))


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
