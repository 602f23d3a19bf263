"""Hostile words and environments for the command line: what is given, and how it has to end."""

import os
import re
from dataclasses import dataclass, field

LONG = "x" * 300
DEEP = "/".join(["d" * 200] * 30)
TINY = ["--model=mlp", "--width=4", "--epochs=1", "--train-size=100", "--seeds=0", "--arms=none"]
RUN = ["run", "demo", "--device=cpu", *TINY]
BENCH = ["--rounds=1", "--batch-size=2"]


@dataclass
class Case:
    """Words of a command line, in an environment, with files beside it.

    Attributes:
        words: What follows `gradmask`, as in a shell.
        message: Part of the line on stderr.
        status: How it has to end.
        environment: Variables; None takes one away.
        files: Files in the working folder, by name.
    """

    words: list
    message: str
    status: int = 2
    environment: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)


def run(*words, message, **others):
    return Case([*RUN, *words], message, **others)


def bench(what, *words, message, **others):
    return Case(["bench", what, *words], message, **others)


def config(text, message):
    return run("--config", "mine.yaml", message=message, files={"mine.yaml": text})


PATHS = [
    *(
        run(f"--output={path}", message=message, files={"file": "text"})
        for path, message in (
            ("", "output='' is no path"),
            ("a\0b", "output='a.x00b' is no path"),
            ("file", "is a file"),
            ("file/below", "file"),
            ("file/below/further", "file"),
            (LONG, "too long"),
            (DEEP, "too long"),
            ("/proc/out", "/proc/out"),
            ("/sys/out", "/sys/out"),
            ("/dev/null", "/dev/null"),
            ("/dev/full/out", "/dev/full"),
            ("/proc/self/fd/out", "/proc/self/fd"),
            ("~nobody-of-this-name/out", "home folder"),
            ("\udcff\udcfe", "no name in UTF-8"),
            (".", "holds files"),
            ("/", "holds files"),
        )
    ),
    *(
        Case([command, path], message, files={"file": "text"})
        for command in ("report", "audit")
        for path, message in (
            ("", "is no path"),
            ("a\0b", "is no path"),
            ("file", "results.json"),
            ("file/below", "results.json"),
            ("none-there", "results.json"),
            (LONG, "too long|No results.json"),
            ("~nobody-of-this-name", "home folder"),
            ("o/x[/bold]y", "results.json in o/x./bold.y"),
            ("\udcff\udcfe", "no name in UTF-8"),
            ("line\nbreak", "results.json"),
            ("\x1b[31mred", "results.json in .x1b"),
        )
    ),
]
WORDS = [
    Case([], "COMMAND"),
    Case([""], "command"),
    Case(["rum"], "Did you mean 'run'"),
    Case(["r\0"], "Unknown command"),
    Case(["--verbose"], "Unknown option '--verbose'"),
    Case(["--version=3"], "Did you mean '--version'"),
    Case(["report"], "FOLDERS"),
    Case(["report", "a", "b"], "No results.json in a"),
    Case(["recipes", "x"], "'x' is not expected"),
    Case(["recipes", "--colour"], "Unknown option: --colour"),
    Case(["audit", "a", "--by=influence", "--epoch=3"], "Did you mean --epochs"),
    Case(["audit", "a", "--by=influence", "--probe=0"], "probe=0 must be"),
    Case(["audit", "a", "--by=influence", "--probe=nan"], "--probe"),
    Case(["audit", "a", "--top=-3"], "top=-3 must be"),
    Case(["audit", "a", "--by=influence", "--fisher=x"], '"x" for --fisher'),
    Case(["audit", "a", "--by=influence", "--score=los"], "Did you mean 'loss'"),
    Case(["audit", "a", "--seeds"], "--seeds"),
    Case(["audit", "a", "--seeds=x"], "--seeds"),
    Case(["run", "dem"], "Did you mean 'demo'"),
    Case(["run", ""], "recipe ''"),
    Case(["run", "demo", "stray"], "stray"),
    Case(["run", "demo", "-x"], "-x"),
    Case(["run", "demo", "--", "x"], "'x' is not expected"),
    Case(["run", "demo", "--size=3"], "one size"),
    Case(["run", "figure1", "--size"], "--size requires an argument"),
    run("--epoch=3", message="Did you mean --epochs"),
    run("--epochs", message="epochs"),
    run("--arms=none:", message="Arm 'none:'"),
    run("--arms=fishes", message="Did you mean 'fisher'"),
    run("--arms=fisher:keep=nan", message="keep=nan"),
    *(
        run(f"--{word}", message=word.partition("=")[0])
        for word in (
            *(f"lr={v}" for v in ("nan", "inf", "-1", "0", "1e999", "text", "")),
            *(f"keep={v}" for v in ("nan", "inf", "-1", "0", "1.5", "text", "[1]")),
            *(f"epochs={v}" for v in ("0", "-1", "1.5", "nan", "many", "null", "{}")),
            *(f"momentum={v}" for v in ("nan", "1", "-0.1")),
            *(f"weight_decay={v}" for v in ("nan", "inf", "-1")),
            *(f"batch_size={v}" for v in ("0", "-5", "x")),
            *(f"seeds={v}" for v in ("", "x", "1,1", "[1", "1.5", "nan")),
            *(f"arms={v}" for v in ("", "none,none", "[")),
            *(f"monitor={v}" for v in ("x", "[[]]")),
            *(f"validation={v}" for v in ("0", "1", "nan")),
            *(f"label_noise={v}" for v in ("nan", "2", "-1")),
            *(f"threads={v}" for v in ("0", "-1", "x")),
            "optimizer=sdg",
            "schedule=never",
            "precision=fp8",
            "engine=horse",
            "streaming=perhaps",
            "workers=3",
            "train_size=0",
            "train_size=-1",
            "classes=0",
            "model=rsnet",
            "model=",
        )
    ),
]
FILES = [
    run("--config=none.yaml", message="none.yaml"),
    run("--config=", message="config"),
    run("--config", message="config"),
    run("--config=.", message="'.' cannot be read"),
    run("--config=a\0b", message="config='a.x00b' is no path"),
    run(f"--config={LONG}", message="too long"),
    run("--config=file/below", message="Not a directory", files={"file": ""}),
    run("--confg=mine.yaml", message="Did you mean --config"),
    config("", "holds no options"),
    config("- a\n", "holds no options"),
    config("text", "holds no options"),
    config("kep: 1\n", "Did you mean 'keep'"),
    config("1: 2\n", "option 1|option '1'"),
    config("? [a]\n: 1\n", "mine.yaml"),
    config("keep: !!python/object/apply:os.system ['touch owned']\n", "not valid YAML in line 1"),
    config("keep: !mine 3\n", "not valid YAML in line 1"),
    config("seeds: 2026-99-99\n", "mine.yaml"),
    config("keep: [1\n", "not valid YAML"),
    config("keep: *x\n", "not valid YAML"),
    config("keep: \0\n", "not valid YAML"),
    config(b"\xff\xfe\xfa", "not plain text in UTF-8"),
    config("[" * 5000, "mine.yaml"),
    config("keep: {a: 1}\n", "keep"),
    config("seeds: {a: 1}\n", "seeds"),
    config("lr: .nan\n", "lr=nan"),
    config("output: ''\n", "output='' is no path"),
    config("config: mine.yaml\n", "option 'config'"),
]
DEVICES = [
    Case([*words, f"--device={device}"], f"device='{device}'")
    for words in (["run", "demo", *TINY], ["bench", "step", "--model=mlp", *BENCH])
    for device in ("meta", "xyz", "cuda:99", "cpu:x", "", "cuda:-1", "mps", "xla", "hpu")
]
BENCHES = [
    Case(["bench"], "WHAT"),
    bench("fishes", message="fishes"),
    bench("fisher", "--rouns=3", message="Did you mean --rounds"),
    bench("fisher", "--rounds=0", message="'0' must be a whole number"),
    bench("fisher", "--rounds=1e3", message="whole number"),
    bench("fisher", "--batches=-2", message="--batches"),
    bench("fisher", "--batch-size=0", message="--batch-size"),
    bench("fisher", "--shape=x", message="--shape"),
    bench("fisher", "--shape", message="--shape"),
    bench("fisher", "--shape", "0", message="--shape"),
    bench("fisher", "--precision=fp8", message="fp8"),
    bench("threshold", "--entries=0", message="--entries"),
    bench("threshold", f"--entries={10**30}", message="--entries"),
    bench("threshold", f"--entries={10**12}", message="out of memory", status=1),
    bench("loading", "--workers=-1", message="--workers"),
    bench("loading", "--images=none", message="--images"),
    bench("loop", "--model=rsnet", *BENCH, message="model 'rsnet'"),
    bench("processes", *BENCH, message="100 images or more"),
    bench("processes", "--model=rsnet", message="model 'rsnet'"),
    bench("processes", "--steps=0", message="--steps"),
    bench("refresh", "theorem1", message="one network"),
    bench("refresh", "--epochs=0", message="epochs=0"),
    bench("influence", "--memory=0", message="--memory"),
    *(
        bench(what, *words, *BENCH, message=message)
        for what in ("fisher", "layers", "influence", "step")
        for words, message in (
            (["--model=rsnet"], "model 'rsnet'"),
            (["--model=no.such:thing"], "cannot be imported"),
            (["--model=os:nothing"], "cannot be imported"),
            (["--model=os:getcwd"], "cannot run"),
            (["--model=:"], "must be written module:function"),
            (["--model=mlp", "--shape", "3", "8"], "cannot run on samples of shape"),
        )
    ),
]
ENVIRONMENTS = [
    run(message=name, environment={"WORLD_SIZE": "2", **others})
    for name, others in (
        ("RANK=None", {}),
        ("RANK='7'", {"RANK": "7"}),
        ("RANK='x'", {"RANK": "x"}),
        ("LOCAL_RANK=None", {"RANK": "0"}),
        ("MASTER_PORT=None", {"RANK": "0", "LOCAL_RANK": "0"}),
        ("MASTER_PORT='http'", {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "http"}),
        ("MASTER_ADDR=''", {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}),
        (
            "MASTER_ADDR='no.invalid'",
            {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "MASTER_PORT": "29500",
                "MASTER_ADDR": "no.invalid",
            },
        ),
    )
] + [
    run(message=f"WORLD_SIZE='{size}'", environment={"WORLD_SIZE": size})
    for size in ("two", "0", "-1", "1.5", "", "99999999999")
]
CASES = {
    "paths": PATHS,
    "words": WORDS,
    "files": FILES,
    "devices": DEVICES,
    "benches": BENCHES,
    "environments": ENVIRONMENTS,
}


LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def one_line(err):
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    assert err.rstrip("\n").isprintable()
    return err


def check(case, folder, status, out, err):
    assert status == case.status, err
    assert one_line(err).startswith("gradmask: error: ")
    assert re.search(case.message, err), err
    assert out == ""
    assert sorted(os.listdir(folder)) == sorted(case.files), "something was left behind"
