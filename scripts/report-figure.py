#!/usr/bin/env python3
"""Take one figure out of a report.html and write it as an SVG that stands by itself.

    report-figure.py REPORT.html "Training loss by job" OUT.svg

The charts of the figure that has this caption, side by side with their names above them. docs/demo-training.svg comes from
the report of `loramux demo`.
"""

import html
import re
import sys
from pathlib import Path

COLUMNS, WIDTH, TITLE, GAP = 4, 260, 22, 14


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    report, caption, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    figures = re.findall(r"<figure.*?</figure>", report.read_text(), re.DOTALL)
    wanted = f"<figcaption>{html.escape(caption, quote=False)}</figcaption>"
    found = [figure for figure in figures if wanted in figure]
    if len(found) != 1:
        sys.exit(f"{report}: {len(found)} figures have the caption {caption!r}, wanted one")
    charts = re.findall(r'(?:chart-name">(.*?)</p>\s*)?<svg viewBox="0 0 (\d+) (\d+)"[^>]*>(.*?)</svg>', found[0], re.DOTALL)
    height = max(WIDTH * int(high) / int(wide) for _, wide, high, _ in charts)
    columns = min(COLUMNS, len(charts))
    rows = -(-len(charts) // columns)
    size = (columns * (WIDTH + GAP) + GAP, rows * (TITLE + height + GAP) + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]:.0f}" role="img" '
        f'aria-label="{html.escape(caption)}" font-family="system-ui, sans-serif">',
        '<rect width="100%" height="100%" rx="6" fill="#ffffff"/>',
    ]
    for index, (name, wide, high, content) in enumerate(charts):
        x, y = GAP + index % columns * (WIDTH + GAP), GAP + index // columns * (TITLE + height + GAP)
        name = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", name)).strip()
        parts.append(f'<text x="{x}" y="{y + 13:.0f}" font-size="12" font-weight="600" fill="#1b212b">{name}</text>')
        content = re.sub(r">\s+<", "><", content.strip())
        parts.append(
            f'<svg x="{x}" y="{y + TITLE:.0f}" width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {wide} {high}" '
            f'stroke-linejoin="round">{content}</svg>'
        )
    out.write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
