"""The command line: what it computes, writes and refuses, on a random model of two layers."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import flex_prefill
import numpy as np
import pytest
from flex_prefill.cli import _COMMANDS, main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flex_prefill.cli import bench, common, inputs, prompts  # noqa: E402
from flex_prefill.cli import inspect as inspect_command  # noqa: E402

SHORT = "--cfg flex_prefill_min_budget=128 block_size=64"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, and a tokenizer of one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_json(arguments: str, path: Path) -> dict:
    assert main([*arguments.split(), "--json", str(path)]) == 0
    return json.loads(path.read_text())


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_inputs_are_the_same_in_every_run() -> None:
    q, k, v = inputs.structured(64, 4, 2, 16, seed=0, dtype=torch.float32)
    sums = [float(x.double().sum()) for x in (q, k, v)]
    assert sums == pytest.approx([1494.3644572, 1005.6806045, 28.5738933], abs=1e-4)
    q, k, v = inputs.random(64, 4, 2, 16, seed=0, dtype=torch.bfloat16)
    assert q.shape == (1, 64, 4, 16)
    assert k.shape == v.shape == (1, 64, 2, 16)
    assert q.dtype == torch.bfloat16


def test_structured_is_sparser_than_random() -> None:
    pattern = flex_prefill.FlexPrefill(min_budget=128)
    density = {
        name: flex_prefill.select(
            *make(2048, 4, 2, 64, seed=0, dtype=torch.float32)[:2], pattern, block_size=64
        ).density
        for name, make in inputs.INPUTS.items()
    }
    assert density["structured"] < 0.7 < 0.8 < density["random"]


def test_demo_reports_both_runs(model_folder: Path, tmp_path: Path) -> None:
    report = run_json(
        f"demo --model {model_folder} --tokens 2000 --dtype float32 {SHORT} --gamma 0.5 "
        "--max-new-tokens 3",
        tmp_path / "demo.json",
    )
    assert 1900 <= report["prompt"]["tokens"] <= 2000
    assert len(report["prompt"]["expected"]) == 6
    assert report["own"]["density"] == 1
    assert 0 < report["sparse"]["density"] < 0.8
    assert 0 < report["sparse"]["kept_mass"] <= 1
    own, sparse = (report[name]["seconds_to_first_token"] for name in ("own", "sparse"))
    assert report["speedup"] == pytest.approx(own / sparse)
    assert report["pattern"]["flex_prefill_gamma"] == 0.5
    assert report["own"]["right"] is False  # random weights


def test_demo_dense_pattern_gives_the_models_own_answer(model_folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    report = run_json(
        f"demo --model {model_folder} --prompt-file {document} --question What? --expect rain "
        "--pattern flash --dtype float32 --tokens 700",
        tmp_path / "demo.json",
    )
    assert report["prompt"]["tokens"] == 700
    assert report["sparse"]["density"] == 1
    assert report["sparse"]["reply"] == report["own"]["reply"]
    assert report["own"]["right"] == ("rain" in report["own"]["reply"])


def test_a_document_becomes_a_chat_or_is_continued(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    document = tmp_path / "document.txt"
    document.write_text("Rain fell.\n")

    def text(question: str | None) -> str:
        args = argparse.Namespace(prompt_file=document, question=question, tokens=None)
        return tokenizer.decode(prompts.make_prompt(args, tokenizer).token_ids)

    assert text(None) == "Rain fell."
    assert text("What fell?") == "Rain fell.\n\nQuestion: What fell?\nAnswer:"
    tokenizer.chat_template = "<{{ messages[0]['content'] }}>{{ add_generation_prompt }}"
    assert text("What fell?") == "<Rain fell.\n\nWhat fell?>True"


@pytest.mark.filterwarnings("error")  # of torch and transformers, people would read them too
def test_demo_prints_what_people_ask(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--model", str(model_folder), "--tokens", "1200", "--dtype", "float32"]
    assert main([*arguments, "--max-new-tokens", "2", "--kind", "multi_key"]) == 0
    out = capsys.readouterr().out
    for words in ("own attention (torch)", "flex_prefill (gamma 0.9)", "speed-up", "density"):
        assert words in out
    assert "What is the access code of".lower() in out


def test_bench_ratios_and_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "bench.png"
    report = run_json(
        f"bench --tokens 1024 512 --head-dim 32 64 --heads 4 --dtype float32 --repeat 2 {SHORT} "
        f"--gamma 0.9 --plot {plot}",
        tmp_path / "bench.json",
    )
    assert [case["tokens"] for case in report["cases"]] == [512, 1024, 512, 1024]
    for case in report["cases"]:
        median, ratios = case["median_seconds"], case["ratios"]
        assert set(median) == {"dense", "select", "attend", "prefill", "torch", "gemm"}
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in case["seconds"].values())
        assert 0 < case["density"] <= 1
        assert ratios["speedup_over_torch"] == pytest.approx(median["torch"] / median["prefill"])
        assert ratios["attend_efficiency"] == pytest.approx(
            case["density"] * median["dense"] / median["attend"]
        )
        assert ratios["workspace_share_of_qkv"] > 0
    assert len(report["crossover"]) == 2
    assert report["command"].startswith("flexprefill bench --tokens 1024 512 --head-dim 32 64")
    assert report["machine"]["cpu_targets"] == flex_prefill.info()["cpu_targets"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bench_without_peers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--tokens", "300", "--head-dim", "16", "--dtype", "bfloat16"]
    assert main([*arguments, "--peers", "none", "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    assert "vs dense" in out
    assert "torch" not in out


def _case(tokens: int, over_dense: float, over_torch: float) -> dict:
    ratios = {"speedup_over_dense": over_dense, "speedup_over_torch": over_torch}
    keys = {"tokens": tokens, "input": "structured", "dtype": "float32", "head_dim": 64}
    return {**keys, "ratios": ratios}


def test_bench_crossover_holds_from_there_on() -> None:
    cases = [_case(8192, 1.5, 2.0), _case(2048, 1.2, 1.1), _case(4096, 0.9, 1.2)]
    assert bench._crossovers(cases)[0]["faster_than_dense_from"] == 8192
    assert bench._crossovers(cases)[0]["faster_than_torch_from"] == 2048
    never = [_case(2048, 1.2, 0.9)]
    assert bench._crossovers(never)[0]["faster_than_torch_from"] is None


def test_pooled_attention_is_the_models_attention(model_folder: Path) -> None:
    """Against the attention weights that the model's eager attention returns."""
    model, _ = common.load_model(model_folder, torch.float32, attention="sdpa")
    ids = list(range(200))
    with torch.inference_mode():
        given = inspect_command.capture(torch, model, ids, 1)
        pooled = inspect_command.pooled_attention(torch, given, 3, 64)
        eager, _ = common.load_model(model_folder, torch.float32, attention="eager")
        weights = eager(torch.tensor([ids]), output_attentions=True).attentions[1][0, 3]
    expected = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            block = weights[i * 64 : (i + 1) * 64, j * 64 : (j + 1) * 64]
            expected[i, j] = block.sum(-1).mean()
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_inspect_writes_a_picture_and_a_table(model_folder: Path, tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    picture = tmp_path / "heads.png"
    report = run_json(
        f"inspect --model {model_folder} --tokens 1500 --layer 1 --head 2 0 --out {picture} "
        f"--dtype float32 {SHORT}",
        tmp_path / "heads.json",
    )
    assert [row["head"] for row in report["heads"]] == [0, 1, 2, 3]
    for row in report["heads"]:
        assert (row["kept_mass_all_queries"] is not None) == (row["head"] in (0, 2))
        assert 0 < row["kept_mass_probe"] <= 1 + 1e-6
    pixels = pyplot.imread(picture)
    assert min(pixels.shape[:2]) > 400
    # Blue and orange: kept blocks and blocks left out.
    red, blue = pixels[..., 0], pixels[..., 2]
    assert (blue - red > 0.3).mean() > 0.01
    assert (red - blue > 0.1).mean() > 0.005


def test_inspect_compares_every_layer(model_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "layers.png"
    report = run_json(
        f"inspect --model {model_folder} --tokens 700 --out {tmp_path}/heads.png --dtype float32 "
        f"--all-layers {picture} --pattern xattention --cfg block_size=32 threshold=0.5",
        tmp_path / "heads.json",
    )
    kept, error, density = (np.array(x) for x in report["layers"].values())
    assert kept.shape == error.shape == density.shape
    assert kept.shape[0] > 1
    for figures in (kept, density):
        assert ((figures > 0) & (figures <= 1 + 1e-5)).all()
    assert (error > 0).any()
    assert picture.stat().st_size > 10000


def test_inspect_says_what_a_budget_costs(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        f"inspect --model {model_folder} --tokens 700 --out {tmp_path}/heads.png --dtype float32 "
        "--pattern block_cover --gamma 0.99 --cfg block_size=32"
    )
    report = run_json(command, tmp_path / "free.json")
    assert report["pattern"]["gamma"] == 0.99
    assert all(row["pattern"] == "block_cover" for row in report["heads"])
    assert all(row["least_row_mass"] >= 0.99 for row in report["heads"])
    assert not any(row["rows_below_gamma"] for row in report["heads"])
    assert "max_budget" not in capsys.readouterr().out
    report = run_json(f"{command} max_budget=96", tmp_path / "limited.json")
    assert all(row["rows_below_gamma"] > 0 for row in report["heads"])
    assert "keep less than gamma of their map" in capsys.readouterr().out


def test_inspect_spreads_over_the_densities() -> None:
    density = np.array([0.5, 0.1, 0.9, 0.3, 0.2, 0.7, 0.8], np.float32)
    assert inspect_command._spread(density) == [1, 3, 5, 2]
    assert inspect_command._spread(density[:2]) == [1, 0]


def test_calibrate_writes_patterns_that_a_model_takes(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert (
        main(
            f"calibrate --model {model_folder} --tokens 700 --budget 128 --block-size 32 "
            f"--samples 1 --dtype float32 --out {out}".split()
        )
        == 0
    )
    report = json.loads((tmp_path / "found.evidence.json").read_text())
    found = json.loads(out.read_text())
    assert not list(tmp_path.glob("*.part"))
    assert len(found) == len(report["layers"])
    for layer, heads in zip(found, report["layers"], strict=True):
        for h, head in enumerate(heads):
            figures = np.array(head["candidates"])
            assert head["best"] == figures[:, 0].argmin()
            assert ((figures[:, 1:] > 0) & (figures[:, 1:] <= 1 + 1e-5)).all()
            assert layer[str(h)][3] == pytest.approx(1 - figures[head["best"], 0], abs=1e-4)
    model = common.load_model(model_folder, torch.float32)[0]
    cfg = {"path": str(out), "block_size": 32}
    flex_prefill.patch_model(model, "minfer", cfg)
    with torch.inference_mode(), flex_prefill.collect_audits() as audits:
        model(torch.arange(700)[None] % 50)
    kinds = {"a_shape": "streaming"}
    for layer, audit in audits:
        expected = [
            kinds.get(kind := report["candidates"][head["best"]][0], kind)
            for head in report["layers"][layer]
        ]
        assert audit.pattern[0].tolist() == expected


def test_calibrate_refuses_a_budget_that_keeps_everything(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"calibrate --model {model_folder} --tokens 700 --budget 600 --out {tmp_path}/a.json"
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    assert "at least 1200" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json("info", tmp_path / "info.json")
    assert report["version"] == flex_prefill.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert main(["info"]) == 0
    assert flex_prefill.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", list(_COMMANDS))
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert re.search(rf"examples?:\n  flexprefill {command}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["bench", "--tokens", "0"], "at least 1"),
        (["demo", "--threads", "-1"], "at least 1"),
        (["bench", "--heads", "6", "--kv-heads", "4"], "multiple of --kv-heads 4"),
        (["bench", "--peers", "torch,flash"], "'flash'"),
        (["bench", "--gamma", "1.5"], "gamma"),
        (["bench", "--gamma", "nan"], "gamma"),
        (["bench", "--pattern", "xatention"], "did you mean xattention"),
        (["bench", "--pattern", "blockcover"], "did you mean block_cover"),
        (["bench", "--pattern", "block_cover", "--cfg", "gama=0.9"], "did you mean 'gamma'"),
        (["inspect", "--pattern", "block_cover", "--gamma", "2"], "gamma"),
        (["bench", "--pattern", "minfer", "--cfg", "model_type=llama"], "flexprefill calibrate"),
        (["bench", "--cfg", "flex_prefill_gama=0.9"], "flex_prefill_gamma"),
        (["bench", "--cfg", "block_size"], "no '='"),
        (["bench", "--pattern", "flash", "--gamma", "0.9"], "flash has none"),
        (["demo", "--question", "Who?"], "--prompt-file"),
        (["demo", "--expect", "me"], "--prompt-file"),
        (["inspect", "--head", "0", "1", "2", "3", "4"], "at most 4"),
    ],
)
def test_bad_usage_exits_with_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in usage_error(arguments, capsys)


def test_bad_usage_that_the_model_shows(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(model_folder), "--tokens", "600", "--dtype", "float32"]
    assert "expected 0 to 1" in usage_error(["inspect", *model, "--layer", "2"], capsys)
    assert "expected 0 to 3" in usage_error(["inspect", *model, "--head", "4"], capsys)
    assert "expected at least" in usage_error(["demo", *model[:2], "--tokens", "64"], capsys)


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_failures_exit_with_1(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["demo", "--model", str(model_folder), "--dtype", "float32"]
    assert "config.json" in failure(["demo", "--model", str(tmp_path)], capsys)
    assert "nowhere.txt" in failure([*model, "--prompt-file", "nowhere.txt"], capsys)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in failure([*model, "--prompt-file", str(binary)], capsys)
    binary.write_bytes(b"")
    assert "is empty" in failure([*model, "--prompt-file", str(binary)], capsys)
    assert "at most 4096 tokens" in failure([*model, "--tokens", "4200"], capsys)
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be loaded" in failure(["demo", "--model", str(tmp_path)], capsys)


def test_files_that_cannot_be_written_fail_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_file").write_text("")
    for command, words in (
        (f"bench --plot {tmp_path}/bench.xyz", "expected a name that ends in .png, .svg, .pdf"),
        (f"bench --json {tmp_path}", "expected a file to write, got the folder"),
        (f"inspect --out {tmp_path}/heads", "expected a name that ends in .png"),
        (f"inspect --all-layers {tmp_path}/a_file/x.png", "a_file is no such folder"),
        (f"calibrate --out {tmp_path}", "expected a file to write"),
    ):
        with pytest.raises(SystemExit):
            main(command.split())
        assert words in capsys.readouterr().err


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (
        ("eval --suite ruler --tasks niah_single_1", "no option --tasks (did you mean --task?)"),
        ("eval --pattern xattention --cfg stride=8", "no option --cfg"),
        ("bench --tokns=4096", "no option --tokns (did you mean --tokens?)"),
    ):
        with pytest.raises(SystemExit):
            main(command.split())
        assert words in capsys.readouterr().err
    assert main(["info", "--js", "-"]) == 0  # an abbreviation


def test_a_picture_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    path = tmp_path / "new" / "picture.svg"
    figure = pyplot.figure()
    common.write_picture(path, figure, dpi=50)
    before = path.read_bytes()
    assert b"<svg" in before
    assert not pyplot.fignum_exists(figure.number)

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="full"):
        common.write_picture(path, pyplot.figure(figsize=(2, 1)), dpi=50)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["picture.svg"]


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["bench"], "torch", "torch"),
        (["demo"], "torch", "transformers"),
        (["bench", "--plot", "bench.png"], "matplotlib", "plot"),
    ],
)
def test_a_missing_package_is_named(
    command: list[str],
    package: str,
    extra: str,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if command[0] == "demo":
        command = [*command, "--model", str(model_folder)]
    err = failure(command, capsys)
    assert package in err
    assert f"pip install 'flex_prefill[{extra}]'" in err


def test_the_command_line_imports_no_framework() -> None:
    code = (
        "import sys; from flex_prefill.cli import main; main(['info', '--json', '-']); "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.skipif(bool(flex_prefill.info()["cuda"]["devices"]), reason="a machine without a GPU")
def test_bench_without_a_gpu_says_why(capsys):
    assert main(["bench", "--device", "cuda", "--tokens", "256"]) == 1
    assert re.search(
        r"--device: (this build has no CUDA|no GPU that both)", capsys.readouterr().err
    )
