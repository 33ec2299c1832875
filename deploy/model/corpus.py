"""The training text: four kinds of document made from the running Python's own standard library.

Everything here is deterministic for one Python version: the same installation gives the same documents in the same
order. A document is held out of training by a hash of where it came from, so that all four kinds made from one source
file fall on the same side.
"""

import json
import random
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal, get_args

from deploy.model.conversations import conversations_about, conversations_on_topic, small_talk
from deploy.model.docstrings import Described, described_builtins, described_in

Kind = Literal["code", "docs", "chat", "data"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Part = Literal["train", "held-out"]

# Tests, vendored packages and character tables teach little Python; lib2to3 and the like are gone from newer versions.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
)
SKIPPED_PREFIXES = ("_sysconfigdata",)  # names the build machine's paths
MOST_DIGITS = 0.07  # of a file's characters: above it, the file is a table
HELD_OUT_ONE_IN = 20
UNICODE_BLOCKS = range(0x20, 0x3000, 0x40)


@dataclass(frozen=True)
class Document:
    """One piece of text that stands by itself."""

    kind: Kind
    """What it reads like: code, prose, conversation or machine-readable data."""
    source: str
    """Where it came from: a path inside the standard library, a topic or a table."""
    text: str


def part_of(source: str) -> Part:
    """Which part a source belongs to, the same on every machine (5 % are held out)."""
    return "held-out" if zlib.crc32(source.encode()) % HELD_OUT_ONE_IN == 0 else "train"


def documents(part: Part) -> Iterator[Document]:
    """Yield every document of one part, in a fixed order."""
    yield from _from_files(part)
    yield from _from_topics(part)
    yield from _from_builtins(part)
    yield from _from_unicode(part)
    if part == "train":  # too few to keep any back
        yield from (Document("chat", "small talk", text) for text in small_talk(random.Random(0), rounds=40))


def source_files() -> list[tuple[str, Path]]:
    """(path inside the standard library, file) of every source worth reading, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    return sorted(
        (relative.as_posix(), path)
        for relative, path in found
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.name.startswith(SKIPPED_PREFIXES)
    )


def _from_files(part: Part) -> Iterator[Document]:
    for source, path in source_files():
        if part_of(source) != part:
            continue
        text = path.read_text("utf-8", errors="replace")
        if sum(map(str.isdigit, text)) > MOST_DIGITS * len(text):
            continue
        yield Document("code", source, text)
        module = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        yield from _about_objects(source, list(described_in(module, text)))


def _from_topics(part: Part) -> Iterator[Document]:
    for name, text in sorted(topics.items()):
        source = f"topic {name}"
        if part_of(source) == part:
            yield Document("docs", source, text.strip() + "\n")
            for chat in conversations_on_topic(name, text, random.Random(source)):
                yield Document("chat", source, chat)


def _from_builtins(part: Part) -> Iterator[Document]:
    chosen = [d for d in described_builtins() if part_of(f"builtin {d.title}") == part]
    yield from _about_objects("builtins", chosen)


def _from_unicode(part: Part) -> Iterator[Document]:
    for first in UNICODE_BLOCKS:
        source = f"unicode {first:04X}"
        if part_of(source) == part:
            characters = [chr(code) for code in range(first, first + 0x40)]
            rows = [f"{ord(c):04X},{unicodedata.name(c)},{unicodedata.category(c)}" for c in characters
                    if unicodedata.name(c, "")]  # fmt: skip
            if rows:
                yield Document("data", source, "code,name,category\n" + "\n".join(rows) + "\n")


def _about_objects(source: str, objects: list[Described]) -> Iterator[Document]:
    """The prose, the conversations and the table that one module's objects give."""
    rng = random.Random(source)
    if prose := "\n\n".join(_section(described) for described in objects if described.doc):
        yield Document("docs", source, prose + "\n")
    for chat in conversations_about(objects, rng):
        yield Document("chat", source, chat)
    if objects:
        as_json = rng.random() < 0.6
        yield Document("data", source, _json_lines(objects) if as_json else _table(objects))


def _section(described: Described) -> str:
    call = f"({described.parameters})" if described.form == "function" else ""
    return f"{'#' * (1 + bool(described.name))} {described.form} {described.title}{call}\n\n{described.doc}"


def _json_lines(objects: list[Described]) -> str:
    rows = (
        {"module": d.module, "name": d.name, "form": d.form, "line": d.line, "parameters": d.parameters,
         "lines": d.code.count("\n") + 1, "doc": d.summary[:80]}
        for d in objects
    )  # fmt: skip
    return "".join(json.dumps(row) + "\n" for row in rows)


def _table(objects: list[Described]) -> str:
    rows = (f"{d.module},{d.name},{d.form},{d.line},{d.code.count(chr(10)) + 1}" for d in objects)
    return "module,name,form,line,lines\n" + "\n".join(rows) + "\n"
