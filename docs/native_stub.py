"""Gives autodoc what the stub says of the native classes: the extension module carries no texts."""

import ast
from pathlib import Path
from typing import Any

PARTS = Path(__file__).parents[1] / "src" / "pyublk" / "_binding"


def read_stub() -> dict[str, tuple[str, str | None]]:
    """ "Class.method" -> (docstring, signature); a class has the signature of its __init__."""
    found: dict[str, tuple[str, str | None]] = {}
    nodes = (node for path in PARTS.glob("*.pyi") for node in ast.parse(path.read_text()).body)
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = _described(node)
        if not isinstance(node, ast.ClassDef):
            continue
        signature = None
        for member in node.body:
            if isinstance(member, ast.FunctionDef):
                text, arguments = _described(member)
                if member.name == "__init__":
                    signature = arguments
                is_property = any(
                    isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list
                )
                found[f"{node.name}.{member.name}"] = (text, None if is_property else arguments)
        found[node.name] = (ast.get_docstring(node) or "", signature)
    return found


def _described(node: ast.FunctionDef) -> tuple[str, str]:
    arguments = node.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args.pop(0)
    return ast.get_docstring(node) or "", f"({ast.unparse(arguments)})"


def _key(name: str) -> str:
    return name.removeprefix("pyublk._native.").removeprefix("pyublk.")


def setup(app: Any) -> dict[str, bool]:
    stub = read_stub()

    def docstring(
        _app: Any, _what: str, name: str, _obj: Any, _options: Any, lines: list[str]
    ) -> None:
        key = _key(name)
        if key in stub:
            text, arguments = stub[key]
            called = [f"``{key.rpartition('.')[2]}{arguments}``", ""] if arguments else []
            lines[:] = [*called, *text.splitlines(), ""]

    def skip(_app: Any, _what: str, _name: str, member: Any, _skip: bool, _options: Any) -> Any:
        """autodoc looks for texts before they are given."""
        described = stub.get(getattr(member, "__qualname__", ""), ("", None))[0]
        return False if described else None

    app.connect("autodoc-skip-member", skip)
    # Before napoleon, which turns the sections of a docstring into fields.
    app.connect("autodoc-process-docstring", docstring, priority=100)
    return {"parallel_read_safe": True}
