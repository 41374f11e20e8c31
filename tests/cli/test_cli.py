"""The command line: what each command says and writes, exit codes, errors on one line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import diffq
from diffq.cli import COMMANDS, main
from diffq.cli.common import error_measures, printable
from diffq.cli.inspect import histogram
from diffq.format.container import encode
from diffq.format.records import GridRecord
from diffq.ptq.state import Settings, quantize_state
from diffq.storage.state import raw_record
from tests.compare import same_bits
from tests.format.samples import expected_array, grid, matrix, product, stepped_model

ROOT = Path(__file__).parents[2]


class Model(nn.Module):
    """Tied weights, a BatchNorm with its buffers, another dtype, and a tensor to quantize."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 64)
        self.body = nn.Linear(64, 80)
        self.norm = nn.BatchNorm1d(80)
        self.head = nn.Linear(64, 60, bias=False)
        self.head.weight = self.embed.weight
        self.brain = nn.Parameter(torch.randn(7).bfloat16())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def state(folder):
    """The state dict of a model; also in model.pt."""
    state = Model().state_dict()
    torch.save(state, "model.pt")
    return state


@pytest.fixture
def packed(state):
    """A file of the model in groups of several bitwidths, with metadata: model.diffq."""
    argv = [
        "pack",
        "model.pt",
        "model.diffq",
        "--target-mb",
        "0.006",
        "--group-size",
        "8",
        "--quiet",
    ]
    assert main([*argv, "--metadata", "classes=10", "--metadata", "name=[red]tiny"]) == 0
    return Path("model.diffq")


@pytest.fixture
def run(capsys):
    """Runs a command: (exit code, stdout, stderr)."""

    def call(*argv):
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run_json(run):
    """Runs a command with --json: (exit code, the document)."""

    def call(*argv):
        code, out, err = run(*argv, "--json")
        assert not err
        return code, json.loads(out, parse_constant=pytest.fail)

    return call


def one_line(err):
    """The message of an error that is one line."""
    assert err.startswith("diffq: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def damage(path):
    """Flips a bit of the last segment."""
    data = bytearray(Path(path).read_bytes())
    data[-25] ^= 1
    Path(path).write_bytes(data)


# inspect


def test_inspect_tells_what_the_file_holds(packed, run_json):
    """The JSON has each tensor's facts as the reader knows them, and its bytes add up."""
    code, told = run_json("inspect", packed)
    assert code == 0
    with diffq.open(packed) as stored:
        assert [t["name"] for t in told["tensors"]] == list(stored.entries)
        for tensor in told["tensors"]:
            entry = stored.entries[tensor["name"]]
            record = stored.reader.record(tensor["name"])
            assert tensor["shape"] == list(entry.shape)
            assert (tensor["dtype"], tensor["kind"]) == (entry.dtype, entry.kind)
            assert tensor["zero_point"] is getattr(entry, "zero_point", False)
            assert tensor["bytes"] == stored.stored_bytes(tensor["name"])
            assert tensor["entropy_bound_bytes"] == record.entropy_bound_bits() / 8
            if isinstance(record, GridRecord):
                widths = np.repeat(record.bits, 8)[: record.numel]
                used, counts = np.unique(widths, return_counts=True)
                wanted = dict(zip(map(str, used), counts.tolist(), strict=True))
                assert tensor["bits"] == wanted
                assert tensor["mean_bits"] == pytest.approx(widths.mean())
                assert tensor["groups"] == record.bits.size
    sizes = [tensor["bytes"] for tensor in told["tensors"]]
    assert sum(sizes) + told["overhead_bytes"] == told["bytes"] == packed.stat().st_size
    assert told["metadata"] == {"classes": 10, "name": "[red]tiny"}


def test_inspect_tells_of_codebooks(tmp_path, run, run_json):
    """Codewords, block size and bits a weight of product-quantized tensors are told."""
    path = tmp_path / "model.diffq"
    records = {"a": product(640, 16, 8, "uint8"), "b": product(40, 1, 3), "c": grid(80)}
    path.write_bytes(encode(records))
    _, told = run_json("inspect", path)
    facts = [(t["codewords"], t["block_size"], t["stored_dtype"]) for t in told["tensors"]]
    assert facts == [(16, 8, "uint8"), (1, 3, "float16"), (None, None, None)]
    means = [tensor["mean_bits"] for tensor in told["tensors"]]
    assert means[:2] == [0.5, 0]
    weights = 640 * 8 + 40 * 3 + 80
    assert told["mean_bits"] == pytest.approx((640 * 4 + 80 * means[2]) / weights)
    _, out, _ = run("inspect", path)
    assert "product 16x8 uint8" in out
    _, out, _ = run("inspect", path, "--index")
    assert "product 1x3 float16" in out


def test_inspect_tells_how_tensors_are_coded(tmp_path, run, run_json):
    """Each tensor has the codings of its levels, or else elements; one without bytes has none."""
    path = tmp_path / "model.diffq"
    records = {"a": matrix(80, 90, 0.1), "b": raw_record(torch.zeros(900)), "c": grid(8)}
    records |= {"d": raw_record(torch.ones(0)), "e": raw_record(torch.tensor(True))}
    path.write_bytes(encode(records, codec="rans"))
    told = {t["name"]: t["codings"] for t in run_json("inspect", "--index", path)[1]["tensors"]}
    with diffq.open(path) as stored:
        assert told == {name: stored.reader.codings(name) for name in records}
    assert (told["a"], told["b"], told["d"]) == (["rans"], ["zstd"], [])
    _, out, _ = run("inspect", path)
    row = next(line for line in out.splitlines() if line.startswith("a "))
    assert "rans" in row.split()
    assert run("verify", path)[0] == 0


def test_stepped_tensors_go_through_every_command(folder, run, run_json):
    """A file with a step for each group is shown, checked, unpacked and compared like others."""
    records = stepped_model()
    Path("steps.diffq").write_bytes(encode(records))
    told = {tensor["name"]: tensor for tensor in run_json("inspect", "steps.diffq")[1]["tensors"]}
    shown = told["conv.weight"]
    assert (shown["kind"], shown["group_size"], shown["groups"]) == ("stepped", 27, 4)
    assert shown["bits"] is None
    assert shown["entropy_bound_bytes"] < (16 * 4 + 2 * 108) / 8
    row = next(line for line in run("inspect", "steps.diffq")[1].splitlines() if "4x3x3x3" in line)
    assert "stepped" in row.split()
    assert run("verify", "steps.diffq") == (0, "steps.diffq: ok\n", "")
    for out in ("out.pt", "out.safetensors"):
        assert run("unpack", "steps.diffq", out)[0] == 0
        assert run_json("diff", "steps.diffq", out)[1]["relative_error"] == 0
    tensors = torch.load("out.pt")
    assert tensors["conv.weight"].dtype == torch.bfloat16
    for name, record in records.items():
        assert tensors[name].float().numpy().tolist() == expected_array(record).tolist()
    damage("steps.diffq")
    code, out, _ = run("verify", "steps.diffq")
    assert code == 1
    assert "FAILED" in out


def test_inspect_compares_with_float32(state, packed, run_json):
    """float32_bytes counts floats at 4 bytes, integers at theirs, and tied tensors once."""
    tensors = {tensor.data_ptr(): tensor for tensor in state.values()}.values()
    wanted = sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in tensors)
    _, told = run_json("inspect", packed)
    assert told["float32_bytes"] == wanted
    assert told["times_smaller"] == wanted / packed.stat().st_size
    tied = {t["name"]: t["tied"] for t in told["tensors"] if t["tied"]}
    assert tied == {"embed.weight": ["head.weight"]}


def test_inspect_prints_a_table_that_lines_up(packed, run):
    """In a pipe the table has no colours, all names unfolded, and columns that line up."""
    code, out, err = run("inspect", packed, "--all")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    lines = out.splitlines()
    header = lines[0]
    assert header.split()[:5] == ["tensor", "shape", "dtype", "kind", "groups"]
    assert "embed.weight = head.weight" in out
    assert "60x64" in out
    end, start = header.index("bytes") + len("bytes"), header.index("shape")
    table = lines[2 : next(i for i, line in enumerate(lines) if line.startswith("(index"))]
    assert len(table) == 9
    for line in table:
        assert line[end - 1].isdigit()
        assert line[end].isspace()
        assert line[start - 1].isspace()
        assert not line[start].isspace()


def test_inspect_shows_markup_and_control_characters_as_they_are(folder, run):
    """Brackets in names are no markup, and what a terminal would obey is spelled out."""
    names = ["[bold]x[/bold]", "csi\x9b31m", "bidi\u202eabc", "naïve"]
    metadata = {"note": "[red]\x9b\u202e"}
    data = encode({name: raw_record(torch.ones(2)) for name in names}, metadata=metadata)
    Path("odd.diffq").write_bytes(data)
    _, out, _ = run("inspect", "odd.diffq", "--all")
    for name in names:
        assert printable(name) in out
    assert "[bold]x[/bold]" in out
    assert "naïve" in out
    assert not set("\x9b\u202e") & set(out)


@pytest.mark.parametrize("index", [[], ["--index"]])
def test_inspect_folds_small_raw_tensors(packed, run, run_json, index):
    """Raw tensors below 1 % of the file are one row of their bytes; --all and --json list each."""
    told = run_json("inspect", packed, *index)[1]
    little = [t for t in told["tensors"] if t["kind"] == "raw" and t["share"] < 0.01]
    assert len(little) > 1
    folded, full = (run("inspect", packed, *index, *options)[1] for options in ([], ["--all"]))
    row = next(line for line in folded.splitlines() if line.startswith("("))
    assert row.startswith(f"({len(little)} raw tensors, see --all)")
    assert f" {sum(t['bytes'] for t in little):,} " in row
    for tensor in little:
        assert f"\n{tensor['name']} " in full
        assert f"\n{tensor['name']} " not in folded
    assert len(full.splitlines()) == len(folded.splitlines()) + len(little) - 1


def test_inspect_keeps_a_single_small_raw_tensor(folder, run):
    """One small raw tensor stays a row of its own, as folding it would save none."""
    Path("x.diffq").write_bytes(encode({"w": grid(4000), "b": raw_record(torch.ones(1))}))
    out = run("inspect", "x.diffq")[1]
    assert "\nb " in out
    assert "--all" not in out


def test_inspect_index_reads_no_levels(packed, run, run_json):
    """With --index a file whose levels are damaged is listed all the same; without, refused."""
    _, before = run_json("inspect", "--index", packed)
    damage(packed)
    assert run_json("inspect", "--index", packed) == (0, before)
    assert before["tensors"][0]["bits"] is before["entropy_bound_bytes"] is None
    assert run("inspect", "--index", packed)[0] == 0
    code, out, err = run("inspect", packed)
    assert (code, out) == (1, "")
    assert "checksum" in one_line(err)


def test_inspect_needs_no_torch(packed):
    """inspect and verify run as a module of their own, without importing torch."""
    script = (
        "import sys; from diffq.cli import main;"
        "codes = [main([command, sys.argv[1]]) for command in ('inspect', 'verify')];"
        "sys.exit(any(codes) or 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, packed.resolve()], env=environment, check=True)


def test_histogram_shows_the_bitwidths_in_use():
    """Bars stand from the lowest to the highest bitwidth; even the rarest one is visible."""
    assert histogram({4: 100}) == "4"
    assert histogram({2: 1, 4: 100_000}) == "2▁ █4"
    assert histogram({9: 50, 10: 50}) == "9██10"


# verify


def test_verify_tells_sound_files_from_damaged_ones(packed, run, run_json):
    """Every file gets a line; the exit code is 1 if any is damaged or missing."""
    assert run("verify", packed) == (0, f"{packed}: ok\n", "")
    Path("bad.diffq").write_bytes(packed.read_bytes())
    damage("bad.diffq")
    code, told = run_json("verify", packed, "bad.diffq", "missing.diffq")
    assert code == 1
    assert [result["ok"] for result in told] == [True, False, False]
    assert "checksum" in told[1]["error"]
    code, out, _ = run("verify", "--quiet", packed, "bad.diffq")
    assert code == 1
    assert out.startswith("bad.diffq: FAILED")
    assert out.count("\n") == 1


def test_budget_can_be_raised(folder, run, monkeypatch):
    """A file that decodes to more than is allowed asks for a budget, which --budget-mb gives."""
    torch.save({"zeros": torch.zeros(3 << 20)}, "zeros.pt")
    assert run("pack", "zeros.pt", "zeros.diffq", "--bits", "4")[0] == 0
    monkeypatch.setattr("diffq.format.reader._BUDGET_RATIO", 1)
    for command in (("inspect",), ("verify",), ("diff", "zeros.pt"), ("unpack",)):
        rest = ["out.pt"] if command == ("unpack",) else []
        assert run(*command, "zeros.diffq", *rest)[0] == 1
        assert run(*command, "zeros.diffq", *rest, "--budget-mb", "100")[0] == 0


# pack


def test_pack_writes_what_save_writes(state, run, run_json):
    """--bits gives the file of quantize_state, and a summary that is true of it."""
    code, told = run_json("pack", "model.pt", "out.diffq", "--bits", "5")
    assert code == 0
    snapshot = quantize_state(state, 5)
    assert Path("out.diffq").read_bytes() == encode(snapshot.records, snapshot.aliases)
    assert told["bytes"] == Path("out.diffq").stat().st_size
    assert told["checkpoint_bytes"] == Path("model.pt").stat().st_size
    assert told["mean_bits"] == 5
    assert told["quantized_weights"] == 60 * 64 + 64 * 80
    loaded = diffq.load("out.diffq")
    pairs = [(loaded[name], state[name]) for name in ("embed.weight", "body.weight")]
    error = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in pairs))
    norm = math.sqrt(sum(float(b.double().square().sum()) for _, b in pairs))
    assert told["relative_error"] == pytest.approx(error / norm)
    assert told["snr_db"] == pytest.approx(20 * math.log10(norm / error))


@pytest.mark.parametrize(
    "options", [("--bits", "3"), ("--target-mb", "0.004"), ("--bits", "1", "--per-channel")]
)
def test_pack_keeps_zeros(folder, run, run_json, options):
    """Zeros of a checkpoint are zeros in the file, and inspect names the tensors that have some."""
    weight = torch.randn(60, 64)
    weight[[0, 7]], weight[:, 5] = 0, 0
    torch.save({"weight": weight, "other": torch.randn(60, 64)}, "in.pt")
    assert run("pack", "in.pt", "out.diffq", *options)[0] == 0
    packed = diffq.load("out.diffq")["weight"]
    assert (packed[weight == 0] == 0).all()
    assert (packed[weight != 0] != 0).any()
    told = run_json("inspect", "out.diffq")[1]["tensors"]
    assert [tensor["zero_point"] for tensor in told] == [True, False]
    assert "grid zero-point" in run("inspect", "out.diffq")[1]


def test_pack_keeps_everything_else_to_the_bit(state, packed):
    """Ties, buffers, integers and other dtypes come back exactly."""
    loaded = diffq.load(packed)
    assert list(loaded) == [*(name for name in state if name != "head.weight"), "head.weight"]
    assert loaded["head.weight"] is loaded["embed.weight"]
    others = [name for name in state if name not in ("embed.weight", "head.weight", "body.weight")]
    assert same_bits({n: loaded[n] for n in others}, {n: state[n] for n in others})
    diffq.load(packed, Model())


@pytest.mark.parametrize("kind", ["pt", "old pt", "nested", "safetensors", "diffq"])
def test_pack_reads_every_kind_of_checkpoint(state, run, kind):
    """Zip and old torch files, nested ones, safetensors and files of diffq give one result."""
    from safetensors.torch import save_file

    plain = {name: tensor.clone() for name, tensor in state.items()}
    options = []
    if kind == "safetensors":
        save_file(plain, "in")
        # safetensors sorts by size and name.
        plain = dict(diffq.load(_packed_order("in")))
    elif kind == "diffq":
        Path("in").write_bytes(encode({name: raw_record(t) for name, t in plain.items()}))
    elif kind == "nested":
        torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, "model": plain}, "in")
        options = ["--key", "model"]
    else:
        torch.save(plain, "in", _use_new_zipfile_serialization=kind == "pt")
    assert run("pack", "in", "out.diffq", "--bits", "6", *options)[0] == 0
    snapshot = quantize_state(plain, 6)
    assert Path("out.diffq").read_bytes() == encode(snapshot.records)


def _packed_order(path):
    """A raw file of diffq with the tensors of a safetensors file, in its order."""
    from safetensors.torch import load_file

    data = encode({name: raw_record(tensor) for name, tensor in load_file(path).items()})
    Path("ordered.diffq").write_bytes(data)
    return "ordered.diffq"


def test_pack_never_exceeds_the_target(state, run):
    """--target-mb bounds the file with its metadata; where nothing fits, nothing is written."""
    target = ("pack", "model.pt", "out.diffq", "--metadata", "note=" + "x" * 300, "--target-mb")
    assert run(*target, "0.005")[0] == 0
    assert 0.95 * 0.005 < Path("out.diffq").stat().st_size / 2**20 <= 0.005
    before = Path("out.diffq").read_bytes()
    code, _, err = run(*target, "0.0005")
    assert code == 1
    assert "smallest file has" in one_line(err)
    assert Path("out.diffq").read_bytes() == before


def test_pack_options_reach_the_file(state, run):
    """Patterns, sizes, float16, codec, channels and metadata do what their help says."""
    out = Path("out.diffq")

    def kinds(*options):
        assert run("pack", "model.pt", out, "--bits", "4", *options)[0] == 0
        with diffq.open(out) as stored:
            return {name: entry.kind for name, entry in stored.entries.items()}

    quantized = {"embed.weight", "body.weight"}
    assert {name for name, kind in kinds().items() if kind == "grid"} == quantized
    assert kinds("--exclude", "embed.*")["embed.weight"] == "raw"
    assert kinds("--include", "body.*")["embed.weight"] == "raw"
    assert kinds("--min-size", "0.015")["embed.weight"] == "raw"
    assert kinds("--min-size", "0")["body.bias"] == "grid"
    sizes = {}
    for codec in ("packed", "zstd", "rans"):
        kinds("--min-size", "0", "--codec", codec)
        sizes[codec] = out.stat().st_size
    assert sizes["packed"] > sizes["zstd"] >= sizes["rans"]
    kinds("--float16", "--per-channel")
    with diffq.open(out) as stored:
        assert stored.entries["body.bias"].stored_dtype == "float16"
        assert stored.entries["body.weight"].ranges == 80
    kinds("--metadata", "a=1", "--metadata", "b=[true]", "--metadata", "c=x=y")
    with diffq.open(out) as stored:
        assert stored.metadata == {"a": 1, "b": [True], "c": "x=y"}


def test_pack_runs_no_code_of_a_checkpoint(folder, run):
    """A pickle that would run code is refused, and its code does not run."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("hacked",)

    torch.save({"w": torch.ones(3), "evil": Evil()}, "evil.pt")
    code, _, err = run("pack", "evil.pt", "out.diffq", "--bits", "4")
    assert code == 1
    assert "weights_only" in one_line(err)
    assert os.listdir() == ["evil.pt"]


@pytest.mark.parametrize(
    ("content", "options", "wanted"),
    [
        ({"model": {"w": torch.ones(3)}, "ema": {"w": torch.ones(3)}}, [], "--key model"),
        ({"model": {"w": torch.ones(3)}}, ["--key", "modle"], "'model'"),
        ({"epoch": 3}, [], "state_dict"),
        ([torch.ones(3)], [], "dict"),
        ({"format": "diffq.state", "version": 1}, [], "diffq.save"),
        ({"w": torch.ones(3)}, ["--exclude", "nothing.*"], "nothing"),
        ({"w": torch.full((9999,), float("nan"))}, [], "finite"),
        ({"w": torch.ones(9).to_sparse()}, [], "sparse"),
    ],
)
def test_pack_says_what_is_wrong_with_a_checkpoint(folder, run, content, options, wanted):
    """A checkpoint without a sound state dict is an error of one line with the remedy."""
    torch.save(content, "in.pt")
    code, out, err = run("pack", "in.pt", "out.diffq", "--bits", "4", *options)
    assert (code, out) == (1, "")
    assert wanted in one_line(err)
    assert not Path("out.diffq").exists()


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04rubbish", b"\x80\x02rubbish", b"\x09" + b"\0" * 7 + b"{}"]
)
def test_pack_refuses_damaged_checkpoints(folder, run, data):
    """What is no checkpoint at all is an error of one line."""
    Path("in.pt").write_bytes(data)
    code, _, err = run("pack", "in.pt", "out.diffq", "--bits", "4")
    assert code == 1
    one_line(err)


def test_pack_leaves_out_extra_state_and_says_so(folder, run):
    """The extra state of modules is not stored; a note tells, unless --quiet."""
    torch.save({"w": torch.ones(3), "fp8._extra_state": {"scale": 1}}, "in.pt")
    code, _, err = run("pack", "in.pt", "out.diffq", "--bits", "4")
    assert code == 0
    assert "fp8._extra_state" in err
    assert run("pack", "in.pt", "out.diffq", "--bits", "4", "--quiet") == (0, "", "")
    assert list(diffq.load("out.diffq")) == ["w"]


# unpack


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e-30, 1.0, 1e30, 1e38])
def test_pack_and_diff_measure_errors_of_any_size(folder, run_json, scale):
    """Squares that no float holds give no measure instead of an error, and both commands agree."""
    torch.save({"w": (torch.linspace(-1, 1, 5000).double() * scale)}, "m.pt")
    code, told = run_json("pack", "m.pt", "m.diffq", "--bits", "4")
    _, compared = run_json("diff", "m.pt", "m.diffq")
    assert code == 0
    for measure in ("relative_error", "snr_db"):
        assert told[measure] == compared[measure]


@pytest.mark.parametrize(
    ("error", "power", "relative", "snr"),
    [
        (1.0, 100.0, 0.1, 20.0),
        (0.0, 4.0, 0.0, None),
        (4.0, 0.0, None, None),
        (math.inf, 1.0, None, None),
        (1.0, math.inf, None, None),
        (math.nan, 1.0, None, None),
        (1.0, math.nan, None, None),
        (1e308, 1e-308, 1e308, -6160.0),
        (1e-308, 1e308, 1e-308, 6160.0),
        (1e308, 5e-324, None, 10 * (math.log10(5e-324) - 308)),
    ],
)
def test_measures_of_errors(error, power, relative, snr):
    """The relative error and the SNR are right up to the largest floats, and None beyond."""
    measured = error_measures(error, power)
    assert measured["relative_error"] == (relative and pytest.approx(relative))
    assert measured["snr_db"] == (snr and pytest.approx(snr))


@pytest.mark.parametrize("name", ["out.pt", "out.pth", "out.th"])
def test_unpack_gives_a_state_dict(packed, run, name):
    """A torch checkpoint has the decoded tensors, in order, tied as in the file."""
    assert run("unpack", packed, name)[0] == 0
    loaded = torch.load(name)
    assert same_bits(loaded, diffq.load(packed))
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()


def test_unpack_gives_safetensors(packed, run):
    """A safetensors file has every name, and ties and metadata in its header."""
    from safetensors import safe_open

    assert run("unpack", packed, "out.safetensors", "--quiet") == (0, "", "")
    wanted = diffq.load(packed)
    with safe_open("out.safetensors", "pt") as file:
        assert same_bits({n: file.get_tensor(n) for n in wanted}, wanted)
        header = file.metadata()
    assert json.loads(header["diffq.aliases"]) == {"head.weight": "embed.weight"}
    assert json.loads(header["diffq.metadata"])["classes"] == 10


def test_unpack_replaces_nothing_when_it_fails(packed, run):
    """Where the file is damaged or safetensors lacks a dtype, the old output stays."""
    Path("out.safetensors").write_bytes(b"old")
    complex_record = raw_record(torch.ones(2, dtype=torch.complex128))
    Path("complex.diffq").write_bytes(encode({"c": complex_record}))
    code, _, err = run("unpack", "complex.diffq", "out.safetensors")
    assert code == 1
    assert "complex128" in one_line(err)
    damage(packed)
    assert run("unpack", packed, "out.safetensors")[0] == 1
    assert Path("out.safetensors").read_bytes() == b"old"
    assert sorted(os.listdir()) == ["complex.diffq", "model.diffq", "model.pt", "out.safetensors"]


# diff


def test_diff_of_equal_models(packed, run, run_json):
    """A file and what it unpacks to hold the same values, whichever comes first."""
    run("unpack", packed, "out.pt")
    run("unpack", packed, "out.safetensors")
    for pair in (("out.pt", packed), (packed, "out.safetensors"), ("out.safetensors", "out.pt")):
        code, told = run_json("diff", *pair)
        assert code == 0
        assert told["identical"]
        assert told["relative_error"] == 0
        assert told["snr_db"] is None
    assert "the same values" in run("diff", packed, "out.pt")[1]


def test_diff_measures_the_error(state, packed, run, run_json):
    """Errors are those computed from the tensors; tied tensors are listed once."""
    code, told = run_json("diff", "model.pt", packed)
    assert code == 0
    loaded, tensors = diffq.load(packed), {t["name"]: t for t in told["tensors"]}
    assert "head.weight" not in tensors
    for name, tensor in tensors.items():
        a, b = state[name].double(), loaded[name].double()
        assert tensor["identical"] == same_bits(a, b)
        assert tensor["max_abs"] == pytest.approx(float((a - b).abs().max()))
    name = "body.weight"
    a, b = state[name].double(), loaded[name].double()
    relative = float((b - a).norm() / a.norm())
    assert tensors[name]["relative_error"] == pytest.approx(relative)
    assert tensors[name]["snr_db"] == pytest.approx(-20 * math.log10(relative))
    assert tensors[name]["bits_a"] is None
    assert 1 < tensors[name]["bits_b"] < 15
    assert told["bytes_b"] == packed.stat().st_size
    assert "body.weight" in run("diff", "model.pt", packed)[1]


def test_diff_tells_what_does_not_fit(folder, run, run_json):
    """Names in only one model, and other shapes or dtypes, are listed and exit with 1."""
    one = {"same": torch.ones(2), "a": torch.ones(1), "shape": torch.ones(2), "d": torch.ones(1)}
    two = {
        "same": torch.ones(2),
        "b": torch.ones(1),
        "shape": torch.ones(3),
        "d": torch.ones(1).half(),
    }
    torch.save(one, "one.pt")
    torch.save(two, "two.pt")
    code, told = run_json("diff", "one.pt", "two.pt")
    assert code == 1
    assert (told["only_a"], told["only_b"]) == (["a"], ["b"])
    mismatches = {tensor["name"]: tensor["mismatch"] for tensor in told["tensors"]}
    assert mismatches == {
        "same": None,
        "shape": "shape [2] and [3]",
        "d": "dtype float32 and float16",
    }
    code, out, _ = run("diff", "one.pt", "two.pt")
    assert code == 1
    assert "only in A: a\nonly in B: b\n" in out


def test_diff_of_odd_values_is_sound_json(folder, run_json, run):
    """NaN, infinities, zeros, integers, bools and empty tensors give null, never NaN."""
    nan, inf = float("nan"), float("inf")
    one = {
        "nan": torch.tensor([nan, 1.0]),
        "inf": torch.tensor([inf, 1.0]),
        "zero": torch.zeros(2),
        "ints": torch.tensor([1, 2]),
        "bools": torch.tensor([True, False]),
        "complex": torch.tensor([1j, 2]),
        "empty": torch.empty(0),
        "scalar": torch.tensor(3.0),
    }
    two = {name: tensor.clone() for name, tensor in one.items()}
    two["inf"][1], two["zero"][0], two["bools"][1], two["complex"][0] = nan, 1, True, 2j
    torch.save(one, "one.pt")
    torch.save(two, "two.pt")
    code, told = run_json("diff", "one.pt", "two.pt")
    assert code == 0
    tensors = {tensor["name"]: tensor for tensor in told["tensors"]}
    same = {name for name, tensor in tensors.items() if tensor["identical"]}
    assert same == {"nan", "ints", "empty", "scalar"}
    assert tensors["inf"]["relative_error"] is tensors["zero"]["relative_error"] is None
    assert tensors["complex"]["max_abs"] == 1
    assert run("diff", "one.pt", "two.pt")[0] == 0


# all commands


def test_help_lists_every_command(capsys):
    """diffq --help has each command, and each command's help has examples."""
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "exit codes" in out
    assert len(COMMANDS) >= 5
    for command in ("inspect", "report", "verify", "pack", "unpack", "diff"):
        assert f"\n    {command} " in out
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"examples:\n  diffq {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "",
        "frobnicate",
        "inspect",
        "verify",
        "pack a b",
        "pack a b --bits 0",
        "pack a b --bits 16",
        "pack a b --bits 4 --target-mb 1",
        "pack a b --target-mb 0",
        "pack a b --target-mb nan",
        "pack a b --bits 4 --group-size -1",
        "pack a b --bits 4 --min-size x",
        "pack a b --bits 4 --metadata x",
        "unpack a b",
        "unpack a b.onnx",
        "inspect a --budget-mb 0",
        "report",
        "report a b c",
        "completion",
        "completion csh",
    ],
)
def test_wrong_command_lines_exit_with_2(line, capsys):
    """What the parser refuses exits with 2 and the usage, before any file is opened."""
    with pytest.raises(SystemExit) as done:
        main(line.split())
    assert done.value.code == 2
    assert "usage: diffq" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "inspect missing",
        "inspect .",
        "report missing",
        "report model.pt",
        "report missing model.pt",
        "pack missing out --bits 4",
        "unpack missing out.pt",
        "diff missing missing",
        "unpack model.pt out.pt",
        "pack model.pt no/such/folder/out.diffq --bits 4",
    ],
)
def test_errors_are_one_line(state, run, line):
    """Missing files, folders and other kinds of files: one line on stderr, exit code 1."""
    code, out, err = run(*line.split())
    assert (code, out) == (1, "")
    one_line(err)


def test_version(capsys):
    """diffq --version prints the version of the package."""
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"diffq {diffq.__version__}\n"


_WITHOUT_EXTRA = """
import sys

class Blocker:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker)
from diffq.cli import main
for line in sys.argv[2:]:
    try:
        code = main(line.split())
    except SystemExit as done:
        code = done.code
    print(f"[{line}: {code}]")
"""


def _without(packages, *lines):
    """Runs commands in a process that lacks packages: stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_EXTRA, packages, *lines],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return done.stdout, done.stderr


def test_commands_without_the_extra(packed):
    """Without rich and safetensors, all commands work that need no safetensors file."""
    lines = [
        "--help",
        f"inspect {packed}",
        f"verify {packed}",
        f"unpack {packed} out.pt --quiet",
        "pack model.pt again.diffq --bits 4",
        f"diff model.pt {packed}",
    ]
    out, err = _without("rich,safetensors", *lines)
    assert err == ""
    assert out.count(": 0]") == len(lines)
    assert "embed.weight = head.weight" in out
    assert "again.diffq: " in out


def test_looking_at_files_without_torch(packed):
    """inspect, report and verify need neither torch nor the extra, and print the same table."""
    lines = (f"inspect {packed}", f"verify {packed}", f"inspect --index {packed}")
    lines += (f"report {packed}", f"report {packed} {packed}")
    out, err = _without("rich,safetensors,torch,matplotlib", *lines)
    assert err == ""
    assert out.count(": 0]") == len(lines)
    assert out == _without("none", *lines)[0]


def test_a_terminal_gets_a_table_of_rich(packed, run, monkeypatch):
    """On a terminal the table is rich's, if installed, and else the plain one."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert "─" in run("inspect", packed)[1]
    monkeypatch.setitem(sys.modules, "rich", None)
    code, out, _ = run("inspect", packed)
    assert code == 0
    assert "─" not in out
    assert out.splitlines()[1].strip("-") == ""


@pytest.mark.parametrize(
    "command", ["pack model.safetensors x --bits 4", "unpack model.diffq x.safetensors"]
)
def test_without_safetensors_the_remedy_is_printed(packed, run, monkeypatch, command):
    """Where safetensors is needed and missing, the error says how to install it."""
    Path("model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    code, _, err = run(*command.split())
    assert code == 1
    assert "needs the package safetensors" in one_line(err)
    assert "pip install 'diffq[cli]'" in err


def test_an_interrupt_is_no_traceback(packed, monkeypatch, run):
    """Ctrl-C ends a command with 130, as shells expect."""

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffq.storage.open.StoredModel", interrupted)
    assert run("inspect", packed) == (130, "", "")


def test_a_reader_that_stops_early_causes_no_traceback(packed):
    """`python -m diffq inspect FILE | head` prints no traceback."""
    command = [sys.executable, "-m", "diffq", "inspect", str(packed.resolve())]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_tensors_in_groups_of_a_whole_tensor(folder, run_json):
    """A learned file without groups, and one with constants, are described too."""
    state = {"constant": torch.full((5000,), 2.5), "w": torch.randn(5000)}
    snapshot = quantize_state(state, 3, Settings())
    Path("x.diffq").write_bytes(encode(snapshot.records))
    _, told = run_json("inspect", "x.diffq")
    constant, weight = told["tensors"]
    assert constant["bits"] is constant["mean_bits"] is None
    assert weight["bits"] == {"3": 5000}
    assert told["mean_bits"] == 3
