"""The documentation as tests read it: pages, their code and commands, and what is not run."""

import re
from pathlib import Path

from sybil import Document, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.evaluators.skip import Skipper
from sybil.parsers.markdown import CodeBlockParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "results").glob("*/README.md"),
    ]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def not_run():
    """Marks `<!-- not run: why -->` before a block: a parser."""
    lexer, skipper = DirectiveInHTMLCommentLexer("not run"), Skipper("not run")

    def parse(document):
        for found in lexer(document):
            reason = found.lexemes["arguments"].strip()
            assert reason, f"{document.path}: 'not run' needs a reason"
            yield Region(found.start, found.end, ("next", repr(reason)), skipper)

    return parse


def set_up(makers):
    """Marks `<!-- setup: NAME -->`, which give the blocks below what a function makes."""
    lexer = DirectiveInHTMLCommentLexer("setup")

    def evaluate(example):
        example.namespace.update(makers[example.parsed](example.namespace))

    def parse(document):
        for found in lexer(document):
            yield Region(found.start, found.end, found.lexemes["arguments"].strip(), evaluate)

    return parse


def blocks(language, evaluate):
    """Fenced blocks of a language ("" for none): a parser."""
    lexer = FencedCodeBlockLexer(language)

    def parse(document):
        for found in lexer(document):
            yield Region(found.start, found.end, found.lexemes["source"], evaluate)

    return parse


def read(page, parsers, **names):
    """A document of one page, with the names that its code finds."""
    document = Document.parse(str(page), *parsers)
    document.namespace.update(names)
    return document


def python(makers):
    """Parsers of what Python runs."""
    code = CodeBlockParser(language="python", evaluator=PythonEvaluator())
    return [not_run(), set_up(makers), code]


def commands_in(text):
    """`gradmask ...` in a block of the shell: words as they are typed, one string a command."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = re.split(r"\s#\s", f"{line} ")[0].strip()
        line = re.sub(r"^.*python -m gradmask\.cli\b|^.* -m gradmask\.cli\b", "gradmask", line)
        if line.startswith("gradmask "):
            yield line


def inline_commands(text):
    """`gradmask ...` in the running text, outside of blocks."""
    text = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    for found in re.finditer(r"(?<!`)`(gradmask [^`]+)`(?!`)", text):
        yield " ".join(found[1].split())
