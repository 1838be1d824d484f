"""Our model in lm-evaluation-harness against the harness's own Hugging Face backend: the same requests, the
same answers.
"""

from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from babel_jax.evaluation.benchmarks.tasks import load_tasks

BENCHMARKS = {"mmmlu": "sw", "m3exam": "th", "xcopa": "id", "mgsm": "sw", "xnli": "sw", "flores200": "sw"}
BROAD = {"belebele": "sw", "sib200": "sw", "global_mmlu": "sw", "include": "tl", "mmlu_prox": "sw"}
_SHOTS = {"mgsm": 2, "mmmlu": 2, "m3exam": 2, "belebele": 0}


@pytest.fixture(scope="module")
def reference():
    """The harness's Hugging Face backend on a folder, float32 on the CPU."""
    torch = pytest.importorskip("torch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")

    def make(folder, batch_size):
        return huggingface.HFLM(
            pretrained=str(folder), dtype=torch.float32, device="cpu", batch_size=batch_size
        )

    return make


@pytest.fixture(scope="module")
def tasks(benchmarks):
    loaded = {}
    for benchmark, code in (BENCHMARKS | BROAD).items():
        loaded |= load_tasks(benchmark, code, benchmarks, few_shot=_SHOTS.get(benchmark, 1))
    for task in loaded.values():
        if task.OUTPUT_TYPE == "generate_until":
            task.config.generation_kwargs["max_gen_toks"] = 24
    return loaded


def evaluated(model, tasks, **options):
    from lm_eval.evaluator import evaluate

    return evaluate(model, {"tasks": tasks}, bootstrap_iters=0, **options)


def responses_of(found):
    responses = {}
    for name, samples in found["samples"].items():
        for sample in samples:
            responses[name, sample["doc_id"]] = [response[0] for response in sample["resps"]]
    return responses


def assert_same(ours, theirs):
    first, second = responses_of(ours), responses_of(theirs)
    assert first.keys() == second.keys()
    for key, answers in first.items():
        for answer, expected in zip(answers, second[key], strict=True):
            if isinstance(answer, str):
                assert answer == expected, key
            else:
                assert answer[0] == pytest.approx(expected[0], abs=1e-3), key
                assert answer[1] == expected[1], key
    for name, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            if not isinstance(value, str):
                assert ours["results"][name][metric] == pytest.approx(value), (name, metric)


@pytest.mark.parametrize("variant", ["qwen2", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_every_answer_and_score_is_that_of_the_hugging_face_backend(
    variant, tiny_folder, our_model, reference, tasks
):
    assert_parity(tiny_folder(variant), our_model, reference, tasks)


@pytest.mark.slow
def test_a_trained_model_answers_as_in_the_hugging_face_backend(base, our_model, reference, tasks):
    """As `babel train` exports it: other logits than those of random weights, and another tokenizer."""
    assert_parity(Path(base["hf"]), our_model, reference, tasks)


def assert_parity(folder, our_model, reference, tasks):
    ours = evaluated(our_model(folder), tasks)
    # Batches of several requests pad: on the right to score, on the left to generate. Of one request there is
    # no padding.
    for batch_size in (1, 4):
        assert_same(ours, evaluated(reference(folder, batch_size), tasks))
    generated = [
        answer for answers in responses_of(ours).values() for answer in answers if isinstance(answer, str)
    ]
    assert any(len(text) > 3 for text in generated)


def test_whole_texts_score_as_in_the_hugging_face_backend(tiny_folder, our_model, reference, texts):
    """Short ones, one of many windows, and one without a token to score."""
    folder = tiny_folder("qwen2")
    ours = our_model(folder)
    whole = ["Paka amelala.", " ".join(texts.values()) * 2, "", "ข้อใดเป็นสัตว์"]
    assert len(ours.tok_encode(whole[1])) > 2 * ours.max_length
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(whole)]
    expected = reference(folder, 2).loglikelihood_rolling(requests)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5, abs=1e-3)
