"""Write the blocks of README.md that show results/, from their results.json.

    python tests/render_readme.py
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import quant_lab  # noqa: E402


def read_results(name: str) -> dict:
    return json.loads((ROOT / "results" / name / "results.json").read_text("utf-8"))


def render_seeds(*runs: dict) -> str:
    """Return a table of what each run, of another seed, found of the variants in all."""
    rows = [{row["label"]: row for row in run["variants"] if row["perplexity"]}
            for run in runs]
    figures = quant_lab.QUALITY[1], quant_lab.QUALITY[3]  # Ratio, KLD.
    titles = [f"{title}, seed {run['config']['seed']}" for title, *_ in figures for run in runs]
    lines = [["variant", *titles], ["---", *("--:" for _ in titles)]]
    lines += [[label, *(quant_lab.render_cell(found[label], figure)
                        for figure in figures for found in rows)]
              for label in rows[0] if all(label in found for found in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_readme(text: str) -> str:
    """Return the text with what stands between its markers rendered anew.

    <!-- tables FOLDER --> ... <!-- end --> holds the tables, <!-- speed FOLDER --> those but
    quality, <!-- seeds FOLDER --> quality beside that of its folder seed-7, <!-- picture
    FOLDER --> the picture of that folder of results/.
    """
    def fill(found: re.Match) -> str:
        what, name = found[1], found[2]
        results = read_results(name)
        if what == "picture":
            block = (f"![{'; '.join(quant_lab.list_best(results['variants']))}]"
                     f"(results/{name}/summary.png)")
        elif what == "seeds":
            block = render_seeds(results, read_results(f"{name}/seed-7"))
        else:
            block = quant_lab.render_tables(results, results["variants"])
        if what == "speed":  # Protocol and quality come first.
            block = block.split("\n\n", 2)[2]
        return f"<!-- {what} {name} -->\n\n{block}\n\n<!-- end -->"

    blocks = r"<!-- (tables|speed|seeds|picture) (\S+) -->.*?<!-- end -->"
    return re.sub(blocks, fill, text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render_readme(readme.read_text("utf-8")), encoding="utf-8")
