"""Every `gradmask` command of the documentation is read by the command line; the cheap ones run."""

import re
import shlex
import sys
from importlib import import_module

import pytest
from pages import NAMES, ROOT, blocks, commands_in, inline_commands, not_run, read

from gradmask.cli import main

pytestmark = pytest.mark.cpu  # where a comparison runs
CHEAP = ("recipes", "scores", "cache", "--version", "--help")


class Read(BaseException):
    """The words were read, and work would begin."""


@pytest.fixture
def only_read(monkeypatch, tmp_path):
    """The command line stops where work begins, in an empty folder."""

    def stop():
        raise Read

    for module in ("audit", "bench", "report", "run"):  # else they would keep what stands there now
        import_module(f"gradmask.cli.{module}")
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "gradmask" and hasattr(module, "work_begins"):
            monkeypatch.setattr(module, "work_begins", stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("epochs: 1\n")
    networks = tmp_path / "runs" / "finetune-25" / "networks"
    networks.mkdir(parents=True)
    (networks / "pretrained.pt").touch()


def words_of(command):
    """What follows `gradmask`, with something in place of what stands for anything."""
    command = re.sub(r"\[.*\]|\.\.\.", "", command) if "'[" not in command else command
    return shlex.split(command.replace("RECIPE", "demo").replace("NAME [", "demo ["))[1:]


def commands_of(page):
    """All commands of a page; those of blocks first, with those that are marked left out."""
    found = []
    collect = blocks("", lambda example: found.extend(commands_in(example.parsed)))
    marked = 0
    for example in read(ROOT / page, [not_run(), collect]).examples():
        try:
            example.evaluate()
        except Exception as skipped:
            if type(skipped).__name__ != "SkipTest":
                raise
            marked += 1
    # In the running text `gradmask audit` is a name; a command has an option.
    text = inline_commands((ROOT / page).read_text(encoding="utf-8"))
    return [*found, *(c if " --" in c else f"{c} --help" for c in text)], marked


def reads(words, capsys):
    """Whether the command line takes these words."""
    try:
        status = main(words)
    except Read:
        return
    except SystemExit as ended:  # of --help and --version
        status = ended.code
    told = capsys.readouterr().err
    assert status in (0, None), f"gradmask {' '.join(words)}: {told}"
    assert {*words} & {*CHEAP}, f"gradmask {' '.join(words)} ran: is it cheap?"


@pytest.mark.parametrize("page", NAMES)
@pytest.mark.usefixtures("only_read")
def test_commands_are_read(page, capsys):
    for command in dict.fromkeys(commands_of(page)[0]):
        reads(words_of(command), capsys)


@pytest.mark.parametrize("words", ["run demo --epoch 3", "audit runs --nothing", "bench nothing"])
@pytest.mark.usefixtures("only_read")
def test_what_is_no_command_is_found(words, capsys):
    with pytest.raises(AssertionError, match="gradmask"):
        reads(words.split(), capsys)


def test_commands_are_found():
    text = "python x\ngradmask run a \\\n  --b 1    # why\ntorchrun -n 2 -m gradmask.cli run c\n"
    assert list(commands_in(text)) == ["gradmask run a  --b 1", "gradmask run c"]
    assert list(inline_commands(f"`gradmask run\nd` ```\n{text}```")) == ["gradmask run d"]
    total = sum(len(commands_of(page)[0]) for page in NAMES)
    assert total > 100


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in NAMES:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"(?:^|`)make ([a-z-]+(?: [a-z-]+)*)(?=`|$|    )", text, re.MULTILINE)
        assert {one for many in named for one in many.split()} <= targets, page


def test_a_comparison_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    """The one of "does it help on my training?", on digits."""
    (command,) = [c for c in commands_of("docs/start/does-it-help.md")[0] if "--data digits" in c]
    monkeypatch.chdir(tmp_path)
    short = ["--arms", "none", "--width", "4", "--train-size", "100", "--threads", "1"]
    assert main([*words_of(command), *short, "--output", "runs/short"]) == 0
    assert (tmp_path / "runs/short/report.html").is_file()
    assert "no mask" in capsys.readouterr().out


DIGITS = [c for c in commands_of("docs/start/paper.md")[0] if c.endswith("--size digits")]


@pytest.mark.slow
@pytest.mark.parametrize("command", DIGITS)
def test_a_recipe_at_the_size_of_digits_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*words_of(command), "--threads", "1"]) == 0
