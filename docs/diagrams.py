"""Draws docs/pictures/*.dot as SVG by Graphviz: `./run diagrams`, after a change of one of them.

The pictures bring both a light and a dark look, and follow the reader's preference.
"""

import re
import subprocess
import sys
from pathlib import Path

PICTURES = Path(__file__).with_name("pictures")
LOOK = [
    "-Gbgcolor=transparent", "-Gfontname=sans-serif", "-Gfontsize=13", "-Gpad=0.2",
    "-Gnodesep=0.25", "-Glabeljust=l",
    "-Nfontname=sans-serif", "-Nfontsize=12", "-Nshape=box", "-Nstyle=rounded",
    "-Nmargin=0.12,0.08",
    "-Efontname=sans-serif", "-Efontsize=11", "-Earrowsize=0.7",
]  # fmt: skip
STYLE = """<style>
svg { background: #ffffff; border-radius: 6px }
text { fill: #1f2328 }
.line { stroke: #57606a }
.head { fill: #57606a; stroke: #57606a }
@media (prefers-color-scheme: dark) {
  svg { background: #1c2128 }
  text { fill: #d1d7e0 }
  .line { stroke: #9198a1 }
  .head { fill: #9198a1; stroke: #9198a1 }
}
</style>
"""


def drawn(source: Path) -> str:
    """The picture; the same text for the same source and the same Graphviz."""
    command = ["dot", "-Tsvg", *LOOK, str(source)]
    svg = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.S)
    svg = svg.replace('fill="black" stroke="black"', 'class="head"')
    svg = svg.replace('stroke="black"', 'class="line"')
    return re.sub(r"(<svg[^>]*>\n)", lambda found: found[1] + STYLE, svg, count=1)


def main() -> None:
    for source in sorted(PICTURES.glob("*.dot")):
        source.with_suffix(".svg").write_text(drawn(source))
        print(source.with_suffix(".svg").name)


if __name__ == "__main__":
    sys.exit(main())
