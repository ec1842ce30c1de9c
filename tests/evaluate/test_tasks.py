"""Zero-shot tasks against the plainest computation: one sequence at a time, no batches, no sharing."""

import importlib.util
import json
import math

import pytest
import torch

import finescale.api as api
from finescale.calibration.data import open_tokenizer
from finescale.errors import InputError
from finescale.evaluate.likelihood import Request, score_requests
from finescale.evaluate.tasks import TASKS, find_tasks, paired_change, read_questions, run_task, task_file
from finescale.runtime.load import load
from tests.helpers import assert_sentence

REQUESTS = [
    Request("The statement is", " executed"),
    Request("The statement is", " not executed in this context."),
    Request("The statement is ", "executed"),  # the blank belongs to the continuation
    Request("A name refers to an object. " * 6 + "The", " class"),
    Request("A name refers to an object. " * 6 + "The", " def"),
    Request("x", " y z"),
]
CHOICES = [
    {"query": "Question: what is a name?", "choices": ["an object", "a reference to an object"], "gold": 1},
    {"query": "Question: what is a class?", "choices": ["a value", "a definition", "a suite"], "gold": 0},
    {"query": "Question: what follows a try?", "choices": ["except", "if"], "gold": 1},
]
CONTEXTS = [
    {"context_options": ["The list and the name so the list", "The list and the name so the name"],
     "continuation": "was bound.", "gold": 1},
    {"context_options": ["One or two so one", "One or two so two"], "continuation": "is more.", "gold": 0},
]  # fmt: skip
LAST_WORDS = [{"context": "A statement is a", "continuation": "suite"}, {"context": "An", "continuation": "object"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files as --task-data wants them."""
    path = tmp_path_factory.mktemp("tasks")
    rows = {"arc_easy": CHOICES, "piqa": CHOICES, "openbook_qa": CHOICES, "winogrande": CONTEXTS, "lambada": LAST_WORDS}
    for name, lines in rows.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def naive(model, tokenizer, request, bos=None):
    """Log-likelihood, greedy and number of tokens of one request, in float64."""
    context = request.context.rstrip()
    whole = tokenizer(request.context + request.continuation, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    before = [] if bos is None else [bos]
    with torch.no_grad():
        log_TV = model(torch.tensor([before + whole]), use_cache=False).logits[0].double().log_softmax(-1)
    targets = whole[start:]
    rows_TV = log_TV[len(before) + start - 1 : -1]
    greedy = rows_TV.argmax(-1).tolist() == targets
    return sum(float(row[target]) for row, target in zip(rows_TV, targets, strict=True)), greedy, len(targets)


@pytest.mark.parametrize("kind", ["llama", "mistral", "bloom", "gpt2", "mixtral"])
@pytest.mark.parametrize("batch_tokens", [1, 90, 4096])
def test_scores_do_not_depend_on_batches(tiny, kind, batch_tokens):
    """Padding is not seen, requests that share a sequence get their own answer, and order is kept."""
    model, tokenizer = load(tiny(kind)), open_tokenizer(tiny(kind))
    for score, request in zip(
        score_requests(model, tokenizer, REQUESTS, batch_tokens=batch_tokens), REQUESTS, strict=True
    ):
        value, greedy, tokens = naive(model, tokenizer, request)
        assert score.log_likelihood == pytest.approx(value, rel=1e-5)
        assert (score.greedy, score.tokens, score.cut) == (greedy, tokens, 0)


def test_bos_and_long_contexts(tiny):
    model, tokenizer = load(tiny("llama")), open_tokenizer(tiny("llama"))
    (score,) = score_requests(model, tokenizer, REQUESTS[:1], bos=True)
    assert score.log_likelihood == pytest.approx(naive(model, tokenizer, REQUESTS[0], bos=0)[0], rel=1e-5)
    request = Request("word " * 400, "end")
    (score,) = score_requests(model, tokenizer, [request])
    whole = tokenizer(request.context + request.continuation, add_special_tokens=False)["input_ids"]
    assert score.cut == len(whole) - 1 - 256 > 0
    with torch.no_grad():
        log_TV = model(torch.tensor([whole[score.cut : -1]]), use_cache=False).logits[0].double().log_softmax(-1)
    last = sum(float(log_TV[-n - 1, whole[-n - 1]]) for n in range(score.tokens))
    assert score.log_likelihood == pytest.approx(last, rel=1e-5)
    with pytest.raises(InputError, match="continuation has"):
        score_requests(model, tokenizer, [Request("a", " word" * 300)])
    with pytest.raises(InputError, match="no token of its own"):
        score_requests(model, tokenizer, [Request("a", "")])


@pytest.mark.parametrize(("name", "ending"), [("arc_easy", "\nAnswer:"), ("piqa", "Answer:"), ("openbookqa", "")])
def test_multiple_choice(tiny, folder, name, ending):
    model, tokenizer = load(tiny("llama")), open_tokenizer(tiny("llama"))
    task = TASKS[name]
    result = run_task(model, tokenizer, task, task_file(task, folder), batch_tokens=64)
    by_sum, by_length = [], []
    for row in CHOICES:
        values = [naive(model, tokenizer, Request(row["query"] + ending, " " + c))[0] for c in row["choices"]]
        scaled = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
        by_sum.append(values.index(max(values)) == row["gold"])
        by_length.append(scaled.index(max(scaled)) == row["gold"])
    assert result.accuracy == pytest.approx(sum(by_sum) / 3)
    assert result.accuracy_norm == result.value == pytest.approx(sum(by_length) / 3)
    assert result.right == "".join(str(int(each)) for each in by_length)
    share = result.value
    assert result.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 2))
    assert (result.questions, result.available, result.metric) == (3, 3, "accuracy_norm")
    assert (result.template, result.bos, result.dtype, result.length) == (None, False, "float32", 256)


def test_contexts_to_choose_from(tiny, folder):
    model, tokenizer = load(tiny("llama")), open_tokenizer(tiny("llama"))
    result = run_task(model, tokenizer, TASKS["winogrande"], folder / "winogrande.jsonl")
    right = []
    for row in CONTEXTS:
        requests = [Request(context, " " + row["continuation"]) for context in row["context_options"]]
        values = [naive(model, tokenizer, request)[0] for request in requests]
        right.append(values.index(max(values)) == row["gold"])
    assert result.value == result.accuracy == sum(right) / 2 and result.metric == "accuracy"


def test_last_words(tiny, folder):
    model, tokenizer = load(tiny("llama")), open_tokenizer(tiny("llama"))
    result = run_task(model, tokenizer, TASKS["lambada"], folder / "lambada.jsonl")
    found = [naive(model, tokenizer, Request(row["context"], " " + row["continuation"])) for row in LAST_WORDS]
    assert result.accuracy == sum(greedy for _, greedy, _ in found) / 2 and result.accuracy_norm is None
    assert result.perplexity == pytest.approx(math.exp(-sum(value for value, _, _ in found) / 2), rel=1e-5)


def test_limit_takes_the_first_questions(tiny, folder):
    model, tokenizer = load(tiny("llama")), open_tokenizer(tiny("llama"))
    whole = run_task(model, tokenizer, TASKS["piqa"], folder / "piqa.jsonl")
    part = run_task(model, tokenizer, TASKS["piqa"], folder / "piqa.jsonl", limit=2)
    assert part.right == whole.right[:2] and (part.questions, part.available) == (2, 3)
    one = run_task(model, tokenizer, TASKS["piqa"], folder / "piqa.jsonl", limit=1)
    assert one.standard_error is None


def test_paired_changes():
    assert paired_change("1101", "1101") == (0.0, 0.0)
    mean, error = paired_change("11110000", "11100001")
    assert mean == 0.0 and error == pytest.approx(math.sqrt((1 + 1) / 7 / 8))
    with pytest.raises(ValueError, match="same questions"):
        paired_change("11", "111")


@pytest.mark.parametrize(
    "line",
    ["not json", '{"query": "q"}', '{"query": "q", "choices": ["a"], "gold": 4}', "[1]",
     '{"query": "q", "choices": [1], "gold": 0}', '{"context": "c"}'],
)  # fmt: skip
def test_lines_that_are_no_questions(tmp_path, line):
    path = tmp_path / "piqa.jsonl"
    path.write_text(json.dumps(CHOICES[0]) + "\n" + line + "\n")
    with pytest.raises(InputError, match="line 2") as caught:
        read_questions(TASKS["piqa"], path)
    assert_sentence(str(caught.value))


def test_questions_in_another_encoding(tmp_path):
    path = tmp_path / "piqa.jsonl"
    path.write_bytes(
        json.dumps({"query": "straße", "choices": ["a", "b"], "gold": 0}, ensure_ascii=False).encode("latin-1")
    )
    with pytest.raises(InputError, match="not UTF-8") as caught:
        read_questions(TASKS["piqa"], path)
    assert_sentence(str(caught.value))


def test_what_cannot_work_is_refused_before_the_model_is_loaded(tmp_path, folder):
    with pytest.raises(InputError, match="choose of lambada"):
        find_tasks(["mmlu"])
    with pytest.raises(InputError, match=r"hellaswag\.jsonl"):
        api.evaluate_tasks("no-model", ["hellaswag"], data=folder)
    (tmp_path / "piqa.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no question"):
        read_questions(TASKS["piqa"], tmp_path / "piqa.jsonl")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed here")
def test_tasks_from_the_hub_need_lm_eval():
    with pytest.raises(InputError, match=r"finescale\[eval\].*--task-data") as caught:
        api.evaluate_tasks("no-model", ["piqa"])
    assert_sentence(str(caught.value))


@pytest.mark.slow
def test_the_same_answers_as_lm_eval(zoo, shared, tmp_path, monkeypatch):
    """lm-eval runs the same questions by task definitions of its own kind; every answer must be the same."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from dataclasses import replace

    from lm_eval.tasks import TaskManager

    from finescale.evaluate.harness import run_hub_tasks

    limit, definitions = 12, tmp_path / "definitions"
    definitions.mkdir()
    names = ["hellaswag", "piqa", "arc_easy", "arc_challenge", "boolq", "openbookqa", "lambada", "winogrande"]
    tasks, paths = [], []
    for name in names:
        task = TASKS[name]
        path = task_file(task, shared / "data" / "tasks")
        paths.append(path)
        tasks.append(replace(task, harness=f"local_{name}"))
        (definitions / f"{name}.yaml").write_text(json.dumps(_definition(task, path, tmp_path, limit)))
    manager = TaskManager(include_path=str(definitions), include_defaults=False)
    model, tokenizer = load(zoo("llama")), open_tokenizer(zoo("llama"))
    theirs = run_hub_tasks(model, tokenizer, tasks, limit, manager=manager)
    for task, path, other in zip(tasks, paths, theirs, strict=True):
        own = run_task(model, tokenizer, task, path, limit)
        assert (own.right, own.metric, own.questions) == (other.right, other.metric, other.questions), task.name
        assert own.accuracy == pytest.approx(other.accuracy) and own.value == pytest.approx(other.value)
        if own.perplexity is not None:
            assert other.perplexity == pytest.approx(own.perplexity, rel=1e-3)


def _definition(task, path, folder, limit):
    """A task definition of lm-eval for a jsonl file; prompts are put together by its own templates."""
    lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    rows = [json.loads(line) for line in lines]
    copy = folder / f"{task.name}.jsonl"
    definition = {
        "task": f"local_{task.name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(copy)}},
        "test_split": "test", "output_type": "multiple_choice", "metadata": {"version": 1},
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    if task.name == "lambada":
        definition |= {"output_type": "loglikelihood", "doc_to_text": "{{context}}"}
        definition["doc_to_target"] = "{{' ' + continuation}}"
        definition["metric_list"] = [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc"}]
    elif task.name == "winogrande":
        definition |= {"doc_to_text": "{{gold}}", "doc_to_target": "continuation"}
        definition |= {"doc_to_choice": "{{context_options}}", "metric_list": [{"metric": "acc"}]}
    else:
        definition |= {"doc_to_text": "{{query}}" + task.ending, "doc_to_target": "gold", "doc_to_choice": "choices"}
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return definition
