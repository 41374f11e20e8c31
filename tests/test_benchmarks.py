"""The benchmarks of training and of methods: their arithmetic, tables, and one run of each."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType

from benchmarks import gpu_work, methods_report
from benchmarks.training_report import GPU_HEADER, HEADER, compare, markdown, summarize, write

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "training.py"

ANSWERS = {
    "plain": {"device": "cpu", "peak_mb": 100.0, "quantized_mb": 20.0},
    "diffq-g8": {"device": "cpu", "peak_mb": 150.0, "quantized_mb": 20.0},
    "earlier-g8": {"error": "ValueError: no such group\nand more"},
}
TIMES = {
    "plain": [{"train": 0.1, "evaluate": 0.02}, {"train": 0.3, "evaluate": 0.02}],
    "diffq-g8": [{"train": 0.2, "evaluate": 0.02}, {"train": 0.3, "evaluate": 0.03}],
    "earlier-g8": [],
}


def test_rows():
    """Times are medians, ratios are medians over rounds, and memory is what plain's is without."""
    plain, ours, _ = summarize("lstm", ANSWERS, TIMES)
    assert (ours["model"], ours["contender"], ours["device"]) == ("lstm", "diffq-g8", "cpu")
    assert ours["train_ms"] == pytest.approx(250)
    # The ratios of the rounds are 2 and 1: not the ratio of the medians, which is 1.25.
    assert ours["train_ratio"] == pytest.approx(1.5)
    assert ours["evaluate_ratio"] == pytest.approx(1.25)
    assert (ours["added_mb"], ours["copies"]) == (50, 2.5)
    assert (plain["train_ratio"], plain["evaluate_ratio"], plain["added_mb"]) == (1, 1, 0)


def test_row_of_a_failure():
    """A contender that failed keeps its row, with the error and without numbers."""
    failed = summarize("lstm", ANSWERS, TIMES)[-1]
    assert failed == {"model": "lstm", "contender": "earlier-g8", **ANSWERS["earlier-g8"]}


def test_markdown():
    """The table has a header, a line for each row, and as many cells in each."""
    header, rule, *lines = markdown(summarize("lstm", ANSWERS, TIMES)).splitlines()
    assert header == f"| {' | '.join(HEADER)} |"
    assert {line.count("|") for line in (header, rule, *lines)} == {len(HEADER) + 1}
    assert lines[1] == (
        "| lstm | diffq-g8 | 250.0 | 1.50 (1.00–2.00) | +50% | 25.0 | 1.25 | 50.0 | 2.5 |"
    )
    assert lines[2].startswith("| lstm | earlier-g8 | ValueError: no such group |")


def test_columns_of_a_gpu():
    """Launches and GPU time get columns of their own where they were measured."""
    work = {"plain": (200, 4.0), "diffq-g8": (210, 5.0)}
    answers = {
        name: answer | dict(zip(("launches", "gpu_ms"), work.get(name, ()), strict=False))
        for name, answer in ANSWERS.items()
    }
    header, rule, *lines = markdown(summarize("lstm", answers, TIMES)).splitlines()
    assert header == f"| {' | '.join(HEADER + GPU_HEADER)} |"
    assert {line.count("|") for line in (rule, *lines)} == {header.count("|")}
    assert [line.split(" | ")[-3:] for line in lines[:2]] == [
        ["200", "4.00", "1.00 |"],
        ["210", "5.00", "1.25 |"],
    ]


def test_work_of_a_gpu():
    """Kernels and copies on the GPU count, and neither calls on the host nor named ranges."""

    def event(device, microseconds, named=False):
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(device_type=device, is_user_annotation=named, time_range=span)

    gpu, host = DeviceType.CUDA, DeviceType.CPU
    events = [event(gpu, 30), event(gpu, 20), event(gpu, 60, named=True), event(host, 400)]
    assert gpu_work.total(events) == (2, 0.05)


def test_files(tmp_path):
    """Both files hold the rows; the folder is made."""
    rows = summarize("lstm", ANSWERS, TIMES)
    write(tmp_path / "new" / "results", {"rounds": 2}, rows)
    read = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    assert read == {"settings": {"rounds": 2}, "rows": rows}
    table = (tmp_path / "new" / "results.md").read_text(encoding="utf-8")
    assert table == markdown(rows) + "\n"


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=20))
def test_ratios_of_rounds(pairs):
    """The median ratio lies in the middle half; an outlier round moves neither out of the range."""
    row = compare("train", *zip(*pairs, strict=True))
    low, high = row["train_ratio_quartiles"]
    ratios = [mine / plain for mine, plain in pairs]
    assert min(ratios) <= low <= row["train_ratio"] <= high <= max(ratios)


@given(st.floats(1e-6, 1e3), st.lists(st.floats(1e-6, 1e3), min_size=3, max_size=20))
def test_slow_rounds_cancel(factor, plain):
    """What slows a round down for all alike does not change the ratio."""
    row = compare("train", [factor * seconds for seconds in plain], plain)
    assert row["train_ratio"] == pytest.approx(factor)


def test_run(tmp_path):
    """The benchmark trains and evaluates a tiny model, and reports on each contender."""
    command = [sys.executable, str(SCRIPT), "--models", "tiny", "--contenders", "diffq-g8"]
    command += ["--rounds", "1", "--steps", "1", "--threads", "1", "--output", str(tmp_path / "t")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert results["settings"]["threads"] == 1
    plain, ours = results["rows"]
    assert (plain["contender"], ours["contender"]) == ("plain", "diffq-g8")
    assert all(row["train_ms"] > 0 and row["evaluate_ms"] > 0 for row in (plain, ours))
    assert done.stdout == (tmp_path / "t.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_packed_run():
    """The benchmark of packed models reports memory of each load, and times of both."""
    command = [sys.executable, str(BENCHMARKS / "packed.py"), "--cases", "tiny", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes, times = (table.splitlines() for table in done.stdout.split("\n\n"))
    assert [line.split(" | ")[2] for line in sizes[2:]] == ["plain", "packed"] * 2
    assert [line.split(" | ")[2] for line in times[2:]] == ["8 tokens"] * 2


@pytest.fixture
def script(monkeypatch):
    """Imports a module as the scripts of the benchmarks do."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


def test_contenders_of_one_process(script):
    """Contenders in one process take turns, until the time is over; one that fails gives a row."""
    training, together = script("training"), script("training_together")
    neighbours = [together.Neighbour(name, "cpu", 1) for name in ("plain", "diffq-g8", "qat")]
    neighbours[2]._contender = script("training_cases").Contender("NoQuantizer")
    assert all(each.ready()["torch"] == torch.__version__ for each in neighbours)
    args, ticks = SimpleNamespace(rounds=3, steps=1), []
    rows = training.measure("tiny", neighbours, args, ticks.append, end=-math.inf)
    plain, ours, failed = rows
    assert (plain["rounds"], ours["rounds"]) == (1, 1)
    assert ours["train_ms"] > 0
    assert ours["evaluate_ms"] > 0
    assert "NoQuantizer" in failed["error"]
    assert len(training.measure("tiny", neighbours[:2], args, ticks.append)) == 2
    assert ticks[-1] == "tiny, round 3: diffq-g8"


def test_defaults_of_a_gpu(script, monkeypatch):
    """A GPU gets a limit of time and the paper's model. Other packages get processes."""
    training = script("training")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = training.parse_arguments(["--device", "cuda"])
    assert args.minutes == training.GPU_MINUTES
    assert "paper-bfloat16" in args.models
    assert training.parse_arguments([]).minutes == math.inf
    monkeypatch.setattr(training, "Worker", lambda name, args: name)
    args = training.parse_arguments(["--device", "cuda", "--before", ".", "--contenders", "qat"])
    assert training.contenders_of(args) == ["plain", "qat", "qat-before"]


def test_gpu_that_is_not_there(script, monkeypatch, capsys):
    """Without a GPU, --device cuda is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script("training").parse_arguments(["--device", "cuda"])
    assert "needs a GPU" in capsys.readouterr().err


def test_earlier_package_needs_its_python():
    """Naming a contender of the earlier package without --earlier is refused with the remedy."""
    command = [sys.executable, str(SCRIPT), "--contenders", "earlier-g8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--earlier PYTHON" in done.stderr


def method(name, seed, quality, size):
    """A result of the benchmark of methods."""
    return {
        "task": "digits",
        "method": name,
        "seed": seed,
        "steps": 3,
        "family": name.split(",")[0],
        "quality": quality,
        "bytes": size,
        "mean_bits": 4.0,
        "seconds": 1.0,
    }


def test_table_of_methods():
    """Seeds are averaged and shown; sizes are put in proportion to float32's."""
    rows = [method("float32", 0, 97, 1000), method("LSQ, 2 bits", 1, 90, 90)]
    rows.append(method("LSQ, 2 bits", 0, 92, 110))
    title, _, header, rule, whole, lsq = methods_report.markdown(rows).splitlines()
    assert title == "### digits"
    assert len({len(line) for line in (header, rule, whole, lsq)}) == 1
    assert [cell.strip() for cell in lsq.split("|")[1:-1]] == [
        "LSQ, 2 bits",
        "91.0 (92.0, 90.0)",
        "100",
        "10.0",
        "4.00",
    ]


def test_methods_go_on(tmp_path):
    """Rows that are there are kept, missing ones are trained, and all get into table and plot."""
    results, picture = tmp_path / "results.json", tmp_path / "plot.svg"
    before = method("float32", 0, 12.5, 10**6)
    methods_report.Results(results).add(before)
    command = [sys.executable, str(BENCHMARKS / "methods.py"), "--tasks", "digits", "--steps", "3"]
    command += ["--rows", "float32", "iPQ, blocks of 9", "subset, Q+P"]
    command += ["--results", str(results), "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, *added = json.loads(results.read_text(encoding="utf-8"))
    assert kept == before
    assert [row["method"] for row in added] == ["iPQ, blocks of 9", "subset, Q+P"]
    assert all(20_000 < row["bytes"] < 200_000 and 0 <= row["quality"] <= 100 for row in added)
    assert methods_report.markdown([kept, *added]) in done.stdout
    assert "<svg" in picture.read_text(encoding="utf-8")
