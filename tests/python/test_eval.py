"""flexprefill eval, test-llm and bench --kernel. What needs lm-eval is skipped without it."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import flex_prefill
import numpy as np
import pytest
from flex_prefill.cli import kernel_bench, main, models
from flex_prefill.cli.common import CommandError
from flex_prefill.eval import data, infinitebench, quick, report, ruler, tasks
from flex_prefill.eval.lm import Journal

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

BUILTIN = Path(__file__).resolve().parents[2] / "models" / "needle-7m"


def needs_lm_eval(test: object) -> object:
    missing = importlib.util.find_spec("lm_eval") is None
    skipped = pytest.mark.skipif(missing, reason="lm-eval is not installed")
    return pytest.mark.lm_eval(skipped(test))


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return transformers.AutoTokenizer.from_pretrained(BUILTIN)


@pytest.fixture
def folder(tmp_path: Path) -> data.DataFolder:
    return data.DataFolder(tmp_path / "data")


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    else:
        assert main(arguments) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


# ---- Data


def test_the_folder_knows_where_files_come_from(folder: data.DataFolder, tmp_path: Path) -> None:
    assert not folder.has("essays.txt")
    with pytest.raises(FileNotFoundError, match="--from FOLDER"):
        folder.file("essays.txt")
    data.put_text(folder, "a word " * 600, "a test")
    assert folder.origin("essays.txt") == "a test"
    assert len(data.haystack(folder)) >= 120_000
    with pytest.raises(ValueError, match="fewer than 1000 words"):
        data.put_text(folder, "too short", "a test")
    local = tmp_path / "local" / "deeper"
    local.mkdir(parents=True)
    source = data.SOURCES["infinitebench/math_find.jsonl"]
    assert not data.take_local(folder, source, local)
    (local / "math_find.jsonl").write_text('{"context": "[1]", "input": "?"}\n')
    with pytest.raises(ValueError, match="lack answer"):
        data.take_local(folder, source, local)
    (local / "math_find.jsonl").write_text('{"context": "[1]", "input": "?", "answer": [1]}\n')
    assert data.take_local(folder, source, local)
    assert folder.lines(source.name, 5)[0]["answer"] == [1]
    assert set(folder.sources()) == {"essays.txt", source.name}
    assert not list(folder.path.rglob("*.part"))


def test_local_text_is_prose() -> None:
    text = data.local_text()
    assert len(text.split()) > 50_000
    assert ">>>" not in text[:10_000]


def test_prepare_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "prepare", "--offline", "--data", str(tmp_path / "data")]
    assert main([*arguments, "--task", "niah_single_2", "infinitebench_passkey"]) == 0
    out = capsys.readouterr().out
    assert data.LOCAL_TEXT in out
    assert "makes its prompts itself" in out
    err = failure([*arguments, "--suite", "ruler"], capsys)
    assert "dev-v2.0.json" in err
    assert "hotpot_dev_distractor_v1.json" in err
    assert main(["eval", "tasks", "--data", str(tmp_path / "data")]) == 0
    assert "ruler_qa_squad  (needs squad.json)" in capsys.readouterr().out


# ---- Tasks and metrics


def test_suites() -> None:
    assert {name: len(of) for name, of in tasks.SUITES.items()} == {
        "retrieval": 3,
        "ruler": 13,
        "infinitebench": 10,
    }
    assert [t.name for t in tasks.choose(["ruler_vt", "retrieval", "ruler_vt"])] == [
        "ruler_vt",
        "retrieval_single",
        "retrieval_multi_key",
        "retrieval_key_value",
    ]
    with pytest.raises(CommandError, match="did you mean 'niah_single_1'"):
        tasks.choose(["niah_sngle_1"])


@needs_lm_eval
def test_rulers_settings_are_lm_evals() -> None:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "ruler"
    manager = TaskManager(include_path=folder, include_defaults=False)
    assert set(ruler.TASKS) == set(manager.all_subtasks)
    for name, (new_tokens, delimiter, _) in ruler.TASKS.items():
        config = load_yaml(manager.task_index[name].yaml_path, resolve_func=False)
        assert config["generation_kwargs"]["max_gen_toks"] == new_tokens
        assert config["target_delimiter"] == delimiter


@needs_lm_eval
@pytest.mark.parametrize(
    "name", ["niah_single_1", "niah_multivalue", "niah_multikey_3", "ruler_vt", "ruler_fwe"]
)
def test_rulers_samples(name: str, tokenizer: object, folder: data.DataFolder) -> None:
    data.put_text(folder, "It rained all day. Nobody went out! " * 300, "a test")
    task = tasks.TASKS[name]
    samples = task.make(tokenizer, 4096, 3, 10, folder)
    random.seed(1)  # whatever happened before
    assert task.make(tokenizer, 4096, 2, 10, folder) == samples[:2]
    assert samples[0] != samples[1]
    for sample in samples:
        prompt = sample["input"] + task.delimiter + sample["gen_prefix"]
        length = len(tokenizer(prompt)["input_ids"]) + task.max_new_tokens + 10
        assert 2000 < length <= 4096
        assert task.score(sample, "It is " + ", ".join(sample["outputs"])) == 1
        assert task.score(sample, "no idea") == 0


@needs_lm_eval
def test_rulers_questions(tokenizer: object, folder: data.DataFolder) -> None:
    paragraphs = [
        {
            "context": f"Town {i} lies on the river {name}. " + "It is old. " * 20,
            "qas": [
                {
                    "question": f"On which river lies town {i}?",
                    "is_impossible": False,
                    "answers": [{"text": name}, {"text": f"the river {name}"}],
                }
            ],
        }
        for i, name in enumerate(["Oder", "Elbe", "Weser", "Main"])
    ]
    content = json.dumps({"data": [{"paragraphs": paragraphs}]})
    folder.put("squad.json", content.encode(), "a test")
    task = tasks.TASKS["ruler_qa_squad"]
    samples = task.make(tokenizer, 4096, 10, 0, folder)
    assert len(samples) == 4
    assert "On which river lies town 1?" in samples[1]["input"]
    assert "lies on the river Elbe" in samples[1]["input"]
    assert task.score(samples[1], "elbe") == 1  # one of two answers is enough


@pytest.mark.parametrize("split", infinitebench.SYNTHETIC)
def test_infinitebench_makes_what_is_synthetic(
    split: str, tokenizer: object, folder: data.DataFolder
) -> None:
    task = tasks.TASKS[f"infinitebench_{split}"]
    samples = task.make(tokenizer, 2048, 2, 5, folder)
    assert samples == task.make(tokenizer, 2048, 2, 5, folder)
    for sample in samples:
        length = len(tokenizer(sample["input"])["input_ids"]) + task.max_new_tokens + 5
        assert 1900 < length <= 2048
        assert sample["outputs"][0] in sample["input"]
        assert task.score(sample, f" {sample['outputs'][0]}.") == 1
        assert task.score(sample, "no idea") == 0


def test_infinitebench_reads_its_files_and_cuts_the_middle(
    tokenizer: object, folder: data.DataFolder
) -> None:
    record = {
        "context": "beginning " + "middle " * 5000 + "end",
        "input": "Who did it?",
        "answer": ["The Butler"],
        "options": ["The Butler", "Nobody", "The cook", "A {stranger}"],
    }
    folder.put(
        "infinitebench/longbook_choice_eng.jsonl", json.dumps(record).encode() + b"\n", "a test"
    )
    task = tasks.TASKS["infinitebench_longbook_choice_eng"]
    (sample,) = task.make(tokenizer, 2048, 10, 0, folder)
    assert len(tokenizer(sample["input"])["input_ids"]) + task.max_new_tokens <= 2048
    assert sample["input"].startswith("Read the book and answer the question.\n\nbeginning")
    assert sample["input"].endswith("D. A {stranger}\n\nThe letter of the correct answer is")
    assert task.score(sample, " A") == 1
    assert task.score(sample, "B or rather A") == 1
    assert task.score(sample, "C") == 0


@pytest.mark.parametrize(
    ("split", "outputs", "options", "reply", "expected"),
    [
        ("passkey", ["71432"], [], " 71432. Remember 5", 1),
        ("passkey", ["71432"], [], " 5 71432", 0),
        ("kv_retrieval", ["ab-c"], [], '"ab-c", "d"', 1),
        ("kv_retrieval", ["ab-c"], [], "ab-cd", 0),
        ("longdialogue_qa_eng", ["FRED", "BOB"], [], "It is Bob.", 1),
        ("math_find", ["8"], [], "The 8th", 1),
        ("math_find", ["8.5"], [], "8.5", 1),
        ("math_find", ["8"], [], "eight", 0),
        ("longbook_qa_eng", ["the red house", "a barn"], [], "Red house!", 1),
        ("longbook_qa_eng", ["red house"], [], "a red barn", 0.5),
        ("longbook_qa_eng", ["red"], [], "", 0),
        ("longbook_qa_chn", ["红楼梦"], [], "《红楼》。", 0.8),
        ("longbook_choice_eng", ["x"], ["x", "y", "z", "w"], "answer: A", 1),
        ("longbook_choice_eng", ["y"], ["x", "y", "z", "w"], "Bananas", 1),
        ("code_debug", ["f.g"], ["a", "f.g", "c", "d"], "B", 1),
        ("code_debug", ["f.g"], ["a", "f.g", "c", "d"], "f.g is", 1),
        ("code_debug", ["f.g", "B"], [], "C", 0),
    ],
)
def test_infinitebenchs_metrics(
    split: str, outputs: list[str], options: list[str], reply: str, expected: float
) -> None:
    assert infinitebench.score(split, outputs, options, reply) == pytest.approx(expected)


def test_summaries_are_scored_by_rouge() -> None:
    pytest.importorskip("rouge_score")
    summary = "The king dies.\nHis son rules."
    assert infinitebench.score("longbook_sum_eng", [summary], [], summary) == 1
    assert infinitebench.score("longbook_sum_eng", [summary], [], "Ships sail.") == 0


# ---- Arguments


def test_lengths_and_patterns() -> None:
    assert [models.token_length(text) for text in ("4096", "4k", "128K")] == [4096, 4096, 131072]
    (pattern,) = models.named_patterns(["flex_prefill"], ['{"gamma": 0.95, "block_size": 64}'])
    assert pattern.config["flex_prefill_gamma"] == 0.95
    assert pattern.label == "flex_prefill (block_size 64, gamma 0.95)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "rule"], "did you mean 'ruler'"),
        (["--suite", "quick", "ruler"], "quick stands alone"),
        (["--task", "ruler_cew"], "did you mean 'ruler_cwe'"),
        (["--pattern", "flex_prefil"], "did you mean 'flex_prefill'"),
        (["--pattern", "flex_prefill", "--config", '{"gama": 1}'], "did you mean 'gamma'"),
        (["--pattern", "flex_prefill", "--config", '{"gamma": 2}'], "(0, 1]"),
        (["--config", "{}"], "one for each of 2 patterns"),
        (["--pattern", "flex_prefill", "--config", "gamma"], "expected JSON"),
        (["--length", "4x"], "such as 4096 or 4k"),
        (["--engine", "vllm"], "vllm is not there yet"),
        (["--engine", "onnx"], "'onnx'"),
    ],
)
def test_bad_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in failure(["eval", *arguments], capsys, 2)


@needs_lm_eval
def test_what_would_fail_after_hours_fails_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, where = (
        tmp_path / "out",
        ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")],
    )
    assert "config.json" in failure(["eval", *where, "--model", str(tmp_path)], capsys)
    err = failure(["eval", *where, "--task", "ruler_vt", "--length", "128k"], capsys)
    assert "context is 20480 tokens" in err
    assert "at least 4096" in failure(["eval", *where, "--length", "2k"], capsys)
    err = failure(["eval", *where, "--suite", "infinitebench", "--length", "4k"], capsys)
    assert "infinitebench_code_debug needs infinitebench/code_debug.jsonl" in err
    assert "expected results" in failure(["eval", "report", *where], capsys)
    assert not out.exists()


# ---- Runs


def test_a_torn_line_of_a_journal_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "replies" / "cell.jsonl"
    journal = Journal(path)
    journal.add({"key": "a", "reply": "1"})
    journal.add({"key": "b", "reply": "2"})
    whole = path.read_bytes()
    for tail in (b'{"key": "c", "re', b'{"key": "c", "reply": "3"}'):
        path.write_bytes(whole + tail)
        again = Journal(path)
        assert again.get("b") == {"key": "b", "reply": "2"}
        again.add({"key": "c", "reply": "4"})
        assert Journal(path).get("c") == {"key": "c", "reply": "4"}


RUN = ["eval", "--suite", "retrieval", "--length", "1k", "--samples", "2", "--dtype", "float32"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "out"
    arguments = ["--data", str(out.parent / "data"), "--out", str(out), "--pattern", "default"]
    config = '{"min_budget": 128, "block_size": 32}'
    assert main([*RUN, *arguments, "flex_prefill", "--config", "{}", config]) == 0
    return out


@needs_lm_eval
def test_results(results: Path) -> None:
    found = json.loads((results / "results.json").read_text())
    assert found["model"] == "needle-7m"
    assert found["command"].startswith("flexprefill eval --suite retrieval")
    assert len(found["results"]) == 6
    for row in found["results"]:
        assert row["samples"] == 2
        assert row["score"] == 1  # short prompts: it has all of them right
        assert (row["density"] < 0.9) == (row["pattern"] == "flex_prefill")
        assert (row["density"] == 1) == (row["pattern"] == "default")
    table = (results / "table.md").read_text()
    assert "own attention" in table
    assert "retrieval_multi_key" in table
    for name in ("accuracy.png", "pareto.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")
    assert main(["eval", "report", "--out", str(results)]) == 0


@needs_lm_eval
def test_a_killed_run_goes_on(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (journal,) = (results / "replies" / "default-44136f").glob("retrieval_single-1024.jsonl")
    first, second = (json.loads(line) for line in journal.read_text().splitlines())
    # As if killed while the second was computed; what is there is not computed again.
    first["reply"] = "a reply that was there"
    journal.write_text(json.dumps(first) + "\n" + json.dumps(second)[:40])
    (results / "results.json").unlink()
    arguments = ["--data", str(results.parent / "data"), "--out", str(results)]
    assert main([*RUN, *arguments, "--pattern", "default"]) == 0
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["reply"] for line in lines] == [first["reply"], second["reply"]]
    rows = json.loads((results / "results.json").read_text())["results"]
    scores = {(r["pattern"], r["task"]): r["score"] for r in rows}
    assert scores["default", "retrieval_single"] == 0.5
    assert len(scores) == 6


@needs_lm_eval
def test_a_results_folder_is_one_models(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--data", str(results.parent / "data"), "--out", str(results)]
    arguments = [word if word != "float32" else "bfloat16" for word in RUN]
    assert "dtype was 'float32', is 'bfloat16'" in failure([*arguments, *where], capsys)


@needs_lm_eval
def test_a_pattern_that_does_not_run_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flex_prefill.hf._is_plain", lambda *_: False)
    where = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert "no layer of the model ran" in failure([*RUN, *where, "--pattern", "flash"], capsys)
    assert not (tmp_path / "out").exists()


@needs_lm_eval
def test_the_last_pattern_is_checked_before_the_first_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"0": ["stream_llm", 64, 64, 1.0]}] * 2))
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    arguments += [
        "--pattern",
        "default",
        "minfer",
        "--config",
        "{}",
        json.dumps({"path": str(other)}),
    ]
    assert "is of another model" in failure([*RUN, *arguments], capsys)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "data").exists()


def test_the_quick_suites_check() -> None:
    assert quick.tails([0.5, 0.5], 1) == pytest.approx((0.75, 0.75))
    assert quick.tails([0.9] * 4, 4) == pytest.approx((1, 0.9**4))

    def rows(flex_prefill_score: float, density: float) -> list[dict]:
        made = []
        for pattern, lengths in quick.REFERENCE.items():
            for length, (right, reference) in lengths.items():
                own = pattern == "flex_prefill"
                score = flex_prefill_score if own else right / 300
                cell = {"pattern": pattern, "length": length, "samples": 6, "score": score}
                made.append({**cell, "density": density if own and length == 4096 else reference})
        return made

    assert quick.deviations(rows(1, 0.45)) == []
    (found,) = quick.deviations(rows(0.5, 0.45))
    assert "flex_prefill: 9 of 18 right" in found
    (found,) = quick.deviations(rows(1, 0.6))
    assert "density 0.600" in found


def test_means_are_over_tasks() -> None:
    row = {"suite": "ruler", "label": "x", "pattern": "x", "length": 4096, "samples": 2}
    rows = [
        {**row, "task": "a", "score": 1.0, "density": 0.25, "standard_error": None},
        {**row, "task": "b", "score": 0.5, "density": 0.75, "standard_error": 0.5},
    ]
    (found,) = report.means(rows)
    assert (found["score"], found["density"], found["samples"]) == (0.75, 0.5, 4)
    assert "| b | 50.0 ± 50.0 (0.75) |" in report.markdown(rows)
    assert "| mean | 75.0 (0.50) |" in report.markdown(rows)


def test_llm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["test-llm", "--max_new_tokens", "8", "--dtype", "float32", "--length"]
    path = tmp_path / "llm.json"
    assert main([*arguments, "1k", "1500", "--json", str(path)]) == 0
    assert "s in total" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["pattern"]["name"] == "flex_prefill"
    for row, length in zip(found["lengths"], (1024, 1500), strict=True):
        assert length - 40 < row["tokens"] <= length
        assert row["right"]
        assert row["total_seconds"] > 0
    assert "20480 tokens" in failure([*arguments, "20480"], capsys)
    assert "did you mean 'flash'" in failure([*arguments, "1k", "--pattern", "flas"], capsys, 2)


def test_random_index_has_the_density() -> None:
    index = kernel_bench.random_index(8192, 3, 0.25, seed=0)
    assert index.density == pytest.approx(0.25, abs=0.01)
    mask = index.to_mask(0, 1)
    assert mask[:, 0].all()
    assert mask.diagonal().all()
    assert not np.array_equal(mask, index.to_mask(0, 2))
    assert kernel_bench.random_index(1000, 1, 1.0, seed=0).density == 1


def test_kernel_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "kernel.json", tmp_path / "kernel.png"
    arguments = ["bench", "--kernel", "--tokens", "1024", "2048", "--head-dim", "32", "--heads"]
    arguments += ["4", "--dtype", "float32", "--repeat", "2"]
    assert main([*arguments, "--json", str(path), "--plot", str(picture)]) == 0
    assert "vs dense" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert [case["tokens"] for case in found["cases"]] == [1024, 2048]
    for case in found["cases"]:
        assert len(case["seconds"]["attend 0.25"]) == 2
        for row in case["densities"]:
            dense, own = (
                case["median_seconds"][n] for n in ("dense", f"attend {row['asked_density']}")
            )
            assert row["speedup_over_dense"] == pytest.approx(dense / own)
            assert row["efficiency"] == pytest.approx(row["density"] * dense / own)
    assert picture.read_bytes().startswith(b"\x89PNG")
    err = failure([*arguments, "--gamma", "0.9"], capsys, 2)
    assert "no pattern chooses" in err
    assert flex_prefill.__version__
