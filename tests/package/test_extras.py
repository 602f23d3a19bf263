"""What is said where an extra is not installed: before any work, and what to install."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUDY = "import gradmask.study; gradmask.study.compare(print, ['none'], [0], 'out')"
RUN = "from gradmask.cli import main; sys.exit(main({}))"

# Extra, what is not there, what is asked for, and words of the answer beside the extra's name.
CASES = [
    *(("study", name, STUDY, name) for name in ["filelock", "yaml", "scipy", "tensorboard"]),
    *(("study", name, STUDY, name) for name in ["rich", "jinja2", "vl_convert", "distributed"]),
    ("study", "jinja2", "import gradmask.study.report", "jinja2"),
    ("experiments", "cyclopts", RUN.format(["run", "demo"]), "cyclopts"),
    *(
        ("experiments", name, RUN.format(["run", "theorem1", "--size", "digits"]), name)
        for name in ["datasets", "matplotlib"]
    ),
    ("experiments", "sklearn", RUN.format(["audit", "."]), "audit"),
    ("experiments", "torchvision", RUN.format(["bench", "fisher"]), "bench"),
    ("transformers", "transformers", "import gradmask.integrations.transformers", "Trainer"),
    ("lightning", "lightning", "import gradmask.integrations.lightning", "Lightning"),
]
SCRIPT = """
import contextlib, io, json, os, sys
import cyclopts, torch, gradmask  # for all of them at once
for missing, code in json.load(sys.stdin):
    sys.stdout.flush()
    if os.fork() == 0:
        sys.modules[missing] = None
        if missing == "lightning":
            sys.modules["pytorch_lightning"] = None
        said, ended = io.StringIO(), None
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                exec(code, {"sys": sys})
            except ImportError as error:
                said.write(f"ImportError: {error}")
            except SystemExit as error:
                ended = error.code
        print(json.dumps([said.getvalue(), ended, os.listdir()]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What every case says, its exit status, and the files it leaves."""
    cases = json.dumps([(missing, code) for _, missing, code, _ in CASES])
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=cases,
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(sys.platform == "win32", reason="it cannot fork")
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: "-".join(CASES[i][:2]))
def test_it_is_named_before_any_work(number, answers):
    extra, _, code, words = CASES[number]
    said, ended, files = answers[number]
    assert f"pip install 'gradmask[{extra}]'" in said
    assert said.count("pip install") == 1
    assert words in said
    assert "Traceback" not in said
    assert ended == (2 if "main(" in code else None)
    assert not files


def test_every_extra_has_a_case():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    not_imported = {"accelerate", "peers", "integrations", "docs", "dev"}
    elsewhere = {"peft"}  # tests/recipes/finetune
    assert extras.keys() == {extra for extra, *_ in CASES} | not_imported | elsewhere
