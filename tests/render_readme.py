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

    <!-- tables FOLDER 1 2 --> ... <!-- end --> holds these parts of the tables of that folder
    of results/ (0 is the caption), <!-- advice FOLDER --> which to deploy, <!-- seeds FOLDER -->
    quality beside that of its folder seed-7, <!-- picture FOLDER --> the picture.
    """
    def fill(found: re.Match) -> str:
        what, name, *numbers = found[1].split()
        results = read_results(name)
        if what == "picture":
            block = f"![{quant_lab.choose_variant(results)[1]}](results/{name}/summary.png)"
        elif what == "seeds":
            block = render_seeds(results, read_results(f"{name}/seed-7"))
        elif what == "advice":
            block = quant_lab.render_advice(results, f"results/{name}/checkpoints")
        else:
            parts = quant_lab.render_tables(results, results["variants"]).split("\n\n")
            block = "\n\n".join(parts[int(number)] for number in numbers)
        return f"<!-- {found[1]} -->\n\n{block}\n\n<!-- end -->"

    return re.sub(r"<!-- ((?:tables|advice|seeds|picture) .+?) -->.*?<!-- end -->", fill, text,
                  flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render_readme(readme.read_text("utf-8")), encoding="utf-8")
