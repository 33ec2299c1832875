"""What Python's own modules say about themselves: every documented object, read without importing its module."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

# Modules written in C have no source to parse; their docstrings are read from the running interpreter.
BUILTIN_MODULES = ("builtins", "itertools", "math", "time", "sys", "array", "cmath")

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# Some sources live under another name than the one people import.
PUBLIC_NAMES = {"posixpath": "os.path", "_collections_abc": "collections.abc", "_pydecimal": "decimal", "_pyio": "io"}


@dataclass(frozen=True)
class Described:
    """One documented object."""

    module: str
    """Dotted name of the module, such as `os.path`."""
    name: str
    """Dotted name inside the module, such as `Thread.join`; empty for the module itself."""
    form: str
    """`module`, `class` or `function`."""
    parameters: str
    """The parameter list as written, without parentheses; empty for modules and classes."""
    doc: str
    """Its docstring, cleaned of indentation; empty where there is none."""
    code: str
    """Its source text without the docstring; empty for modules, classes and builtins."""
    line: int
    """Line of the definition, 1-based; 0 where unknown."""

    @property
    def title(self) -> str:
        """The name a person would use: `json.dumps`, `str.join` (builtins go without their module)."""
        prefix = "" if self.module == "builtins" else self.module
        return ".".join(part for part in (prefix, self.name) if part)

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring."""
        return self.doc.split("\n\n", 1)[0].strip()


def described_in(module: str, text: str) -> Iterator[Described]:
    """Yield the module and every class and function in its source text, in order, nested functions left out.

    Raises SyntaxError where the text is not valid for the running Python.
    """
    tree, module = ast.parse(text), PUBLIC_NAMES.get(module, module)
    yield Described(module, "", "module", "", _docstring(tree), "", 1)
    yield from _described_body(module, text.splitlines(), tree.body, "")


def _described_body(module: str, lines: list[str], body: list[ast.stmt], prefix: str) -> Iterator[Described]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            doc = _docstring(node)
            yield Described(module, prefix + node.name, "class", "", doc, "", node.lineno)
            yield from _described_body(module, lines, node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = _docstring(node)
            parameters, code = ast.unparse(node.args), _code_without_docstring(lines, node)
            yield Described(module, prefix + node.name, "function", parameters, doc, code, node.lineno)


def _docstring(node: ast.Module | Definition) -> str:
    return (ast.get_docstring(node) or "").strip()


def _code_without_docstring(lines: list[str], node: Definition) -> str:
    """The definition's own lines, dedented, so that an answer with code does not repeat the documentation."""
    first = node.lineno - 1
    kept = list(range(first, node.end_lineno or node.lineno))
    opening = node.body[0]
    if ast.get_docstring(node) is not None and len(node.body) > 1 and opening.end_lineno is not None:
        kept = [i for i in kept if not opening.lineno - 1 <= i < opening.end_lineno]
    return "\n".join(lines[i][node.col_offset :].rstrip() for i in kept).strip("\n")


def described_builtins() -> Iterator[Described]:
    """Yield the documented functions, classes and methods of the modules written in C."""
    for module in BUILTIN_MODULES:
        for name, value in sorted(vars(importlib.import_module(module)).items()):
            # Exceptions say little more than their name; private names are nobody's question.
            if name.startswith("_") or (isinstance(value, type) and issubclass(value, BaseException)):
                continue
            if callable(value):
                yield from _described_object(module, name, value)


def _described_object(module: str, name: str, value: object) -> Iterator[Described]:
    is_class = isinstance(value, type)
    doc = inspect.getdoc(value) or ""
    yield Described(module, name, "class" if is_class else "function", _builtin_parameters(value), doc, "", 0)
    if isinstance(value, type):
        for method, function in sorted(vars(value).items()):
            if not method.startswith("_") and callable(function):
                yield from _described_object(module, f"{name}.{method}", function)


def _builtin_parameters(value: object) -> str:
    if isinstance(value, type) or not callable(value):
        return ""
    try:
        return str(inspect.signature(value))[1:-1]
    except (ValueError, TypeError):  # many C functions publish no signature
        return "..."
