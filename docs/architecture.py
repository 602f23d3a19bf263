"""Draws `docs/architecture.svg`: which part of gradmask imports which.

python docs/architecture.py

A part is a module or a folder in `src/gradmask`. Each stands above all that it imports. An arrow
that follows from others (a to c, beside a to b and b to c) is left out.
"""

from __future__ import annotations

import ast
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "gradmask"
PICTURE = ROOT / "docs" / "architecture.svg"
HEIGHT, GAP, ROW, LETTER, MARGIN = 24, 16, 62, 7.4, 16
INK, CORE, TOP = "#30343b", "#dbeafe", "#fdebc8"

Edges = dict[str, set[str]]
Node = tuple[int, str]  # layer, and a part or the place where an arrow passes


def imports() -> tuple[Edges, set[str]]:
    """What each part imports, and the parts that `import gradmask` loads."""
    parts = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in SOURCE.rglob("*.py")}
    package = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    home = {  # of the public names, which are imported when they are used
        alias.name: node.module.split(".")[1]
        for block in package.body
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    found: Edges = {part: set() for part in sorted(parts - {"__init__"})}
    for path in SOURCE.rglob("*.py"):
        here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "gradmask":
                names = [f"gradmask.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for first, *rest in (name.split(".") for name in names):
                there = rest[0] if rest else ""
                there = there if there in parts else home.get(there, here)
                if first == "gradmask" and here != "__init__" != there != here:
                    found[here].add(there)
    core: set[str] = set()
    new = set(home.values())
    while new:
        core |= new
        new = {there for part in new for there in found[part]} - core
    return found, core


def layers(edges: Edges) -> tuple[dict[str, int], Edges]:
    """The layer of each part, above all it imports; and the arrows that follow from no others."""

    @cache
    def below(part: str) -> frozenset[str]:
        return frozenset(edges[part]).union(*map(below, edges[part]))

    @cache
    def layer(part: str) -> int:
        return 1 + max(map(layer, edges[part]), default=-1)

    direct = {
        part: {one for one in found if not any(one in below(other) for other in found)}
        for part, found in edges.items()
    }
    return {part: layer(part) for part in edges}, direct


def width(name: str) -> float:
    """Of a part's box, or of an arrow that passes."""
    return GAP if ">" in name else LETTER * len(name) + 18


def place(rows: list[list[Node]], links: dict[Node, list[Node]]) -> dict[Node, float]:
    """Centres from left to right: each near the mean of what it is linked with, none on another."""
    x = {node: 80.0 * (place - len(row) / 2) for row in rows for place, node in enumerate(row)}
    for turn in range(60):
        for row in rows if turn % 2 else rows[::-1]:
            wish = {node: 0.9 * mean([x[o] for o in links[node]] or [x[node]]) for node in row}
            row.sort(key=lambda node: (wish[node], node))
            # The nearest to all wishes with room for each: blocks that touch move as one.
            room, start = [], 0.0
            for node in row:
                room.append(start + width(node[1]) / 2)
                start += width(node[1]) + GAP
            blocks: list[list[float]] = []
            for node, offset in zip(row, room, strict=True):
                blocks.append([wish[node] - offset])
                while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
                    blocks[-2:] = [blocks[-2] + blocks[-1]]
            at = [mean(block) for block in blocks for _ in block]
            x.update({n: left + offset for n, left, offset in zip(row, at, room, strict=True)})
    return x


def draw() -> str:
    """The picture as text."""
    edges, core = imports()
    layer, direct = layers(edges)
    rows: list[list[Node]] = [[] for _ in range(max(layer.values()) + 1)]
    links: dict[Node, list[Node]] = {}
    arrows = []
    for part in edges:
        rows[layer[part]].append((layer[part], part))
    for part in edges:
        for there in sorted(direct[part]):
            path = [(layer[part], part)]
            for level in range(layer[part] - 1, layer[there], -1):
                path.append((level, f"{part}>{there}"))
                rows[level].append(path[-1])
            arrows.append([*path, (layer[there], there)])
    for path in arrows:
        for upper, lower in pairwise(path):
            links.setdefault(upper, []).append(lower)
            links.setdefault(lower, []).append(upper)
    for row in rows:
        for node in row:
            links.setdefault(node, [])
    x = place(rows, links)
    left = min(x[n] - width(n[1]) / 2 for n in x) - MARGIN
    wide = max(x[n] + width(n[1]) / 2 for n in x) + MARGIN - left
    top = 56

    def y(level: int) -> float:
        return top + ROW * (len(rows) - 1 - level)

    high = y(0) + HEIGHT + MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high:.0f}" '
        f'width="{wide:.0f}" height="{high:.0f}" font-family="sans-serif" font-size="13">',
        "<title>The parts of gradmask and their imports</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#6b7280"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<rect x="{MARGIN}" y="12" width="14" height="14" fill="{CORE}" stroke="{INK}"/>',
        f'<text x="{MARGIN + 22}" y="24" fill="{INK}">loaded by `import gradmask`</text>',
        f'<rect x="{MARGIN + 210}" y="12" width="14" height="14" fill="{TOP}" stroke="{INK}"/>',
        f'<text x="{MARGIN + 232}" y="24" fill="{INK}">on top of it. A name with / is a folder. '
        "Imports go down only.</text>",
    ]
    for path in arrows:
        points = []
        for node in path:
            centre = x[node] - left
            ends = [y(node[0]), y(node[0]) + HEIGHT]
            ends = ends[1:] if node is path[0] else ends[:1] if node is path[-1] else ends
            points += [(centre, end) for end in ends]
        line = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
        for (x0, y0), (x1, y1) in pairwise(points):
            middle = (y0 + y1) / 2
            line += f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}"
        out.append(f'<path d="{line}" fill="none" stroke="#6b7280" marker-end="url(#tip)"/>')
    for part in edges:
        level, half = layer[part], width(part) / 2
        centre = x[level, part] - left
        name, weight = (f"{part}/", "bold") if (SOURCE / part).is_dir() else (part, "normal")
        out.append(
            f'<rect x="{centre - half:.0f}" y="{y(level):.0f}" width="{2 * half:.0f}" '
            f'height="{HEIGHT}" rx="4" fill="{CORE if part in core else TOP}" stroke="{INK}"/>'
            f'<text x="{centre:.0f}" y="{y(level) + 16:.0f}" text-anchor="middle" fill="{INK}" '
            f'font-weight="{weight}">{name}</text>'
        )
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
