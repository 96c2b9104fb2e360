"""Run the demo with other versions of the packages: the lowest admitted, and beside older ones."""

import re
import subprocess
import sys
import venv

import pytest
from conftest import LABELS, ROOT, SCRIPT, read_strict, run_process

LOWEST = re.findall(r"^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)


def test_each_requirement_has_a_lowest_version():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert len(LOWEST) == len([line for line in lines if line[:1] not in ("", "#")]) > 6


@pytest.mark.slow
def test_demo_with_the_lowest_versions(tmp_path):
    """Make an environment of them (8 GB, from the package index) and compare the figures."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    wanted = [f"{name}=={version}" for name, version in LOWEST]
    made = subprocess.run([python, "-m", "pip", "install", "-q", *wanted],
                          capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    done = run_process("--demo", "--output-dir", tmp_path / "out", python=python,
                       OMP_NUM_THREADS=None, PYTHONPATH=None)
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_strict(tmp_path / "out" / "results.json")
    lowest = {name.replace("-", "_"): version for name, version in LOWEST}
    for name in ("torch", "transformers", "llmcompressor", "compressed_tensors"):
        assert results["versions"][name].startswith(lowest[name]), name
    rows = read_strict(ROOT / "results" / "demo-cpu" / "results.json")["variants"]
    assert [row["label"] for row in results["variants"]] == LABELS
    for row, other in zip(results["variants"], rows, strict=True):
        assert row["weight_bytes"] == other["weight_bytes"]
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=5e-3), row["label"]
        assert row["kld"]["mean"] == pytest.approx(other["kld"]["mean"], rel=0.05, abs=1e-6)


@pytest.mark.slow
def test_a_kernel_that_holds_older_packages_runs_it_as_a_process(tmp_path):
    """In Colab pip replaces packages that the kernel has loaded. `%run` then fails, which shows
    that the stand-in for such a package does harm; `!python` does not mind."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    stand_in = "import sys, types; sys.modules['datasets'] = types.ModuleType('datasets')"
    words = f"{SCRIPT} --demo --variants w8a8 --output-dir {tmp_path}"
    for way, statuses in (("%run", ["failed", "failed"]), (f"!{sys.executable}", ["ok", "ok"])):
        notebook = nbformat.v4.new_notebook(cells=[
            nbformat.v4.new_code_cell(line) for line in (stand_in, f"{way} {words}")])
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                                allow_errors=True).execute()
        rows = read_strict(tmp_path / "results.json")["variants"]
        assert [row["status"] for row in rows] == statuses, (way, notebook.cells[1].outputs)
