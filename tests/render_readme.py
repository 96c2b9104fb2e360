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


def render_readme(text: str) -> str:
    """Return the text with what stands between its markers rendered anew.

    <!-- tables FOLDER --> ... <!-- end --> holds the tables, <!-- speed FOLDER --> those but
    quality, <!-- picture FOLDER --> the picture of that folder of results/.
    """
    def fill(found: re.Match) -> str:
        what, name = found[1], found[2]
        results = json.loads((ROOT / "results" / name / "results.json").read_text("utf-8"))
        if what == "picture":
            block = (f"![{'; '.join(quant_lab.list_best(results['variants']))}]"
                     f"(results/{name}/summary.png)")
        else:
            block = quant_lab.render_tables(results, results["variants"])
        if what == "speed":  # Protocol and quality come first.
            block = block.split("\n\n", 2)[2]
        return f"<!-- {what} {name} -->\n\n{block}\n\n<!-- end -->"

    return re.sub(r"<!-- (tables|speed|picture) (\S+) -->.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render_readme(readme.read_text("utf-8")), encoding="utf-8")
