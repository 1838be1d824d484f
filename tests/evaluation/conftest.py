"""Items of the benchmarks, original and tiny, with the keys that the real data sets have."""

import json

import jax
import numpy as np
import pytest

from babel_jax.config import Family, LayerType, ModelConfig
from babel_jax.data.tokens.prompts import PromptTokenizer
from babel_jax.data.tokens.sentencepiece_tokenizer import train_sentencepiece
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.evaluation.benchmarks.harness import DecoderLM
from babel_jax.evaluation.benchmarks.responses import Responses
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import load_params, save_folder
from babel_jax.training.mesh import make_mesh, param_shardings
from tests.compiled import init_params

MMMLU = [
    ("Mji mkuu wa Kenya ni upi?", "Nairobi", "Mombasa", "Kisumu", "Nakuru", "A", "high_school_geography"),
    (
        "Mto mrefu zaidi barani Afrika ni upi?",
        "Kongo",
        "Nili",
        "Niger",
        "Zambezi",
        "B",
        "high_school_geography",
    ),
    ("Bara kubwa zaidi ni lipi?", "Afrika", "Ulaya", "Asia", "Australia", "C", "high_school_geography"),
    ("Mbili jumlisha tatu ni ngapi?", "4", "6", "7", "5", "D", "elementary_mathematics"),
    ("Tano toa moja ni ngapi?", "4", "6", "3", "5", "A", "elementary_mathematics"),
]
M3EXAM = [
    ("ข้อใดเป็นสัตว์", ["(1) แมว", "(2) โต๊ะ", "(3) หนังสือ", "(4) ดินสอ"], "1", "low", "language"),
    ("ข้อใดเป็นผลไม้", ["(1) เสื้อ", "(2) มะม่วง", "(3) รถ", "(4) บ้าน", "(5) ปากกา"], "2", "low", "language"),
    ("สองบวกสองเท่ากับเท่าใด", ["(1) 3", "(2) 5", "(3) 4"], "3", "mid", "math"),
]
XCOPA = [
    ("Hujan turun deras.", "Jalanan menjadi basah.", "Matahari bersinar terik.", "effect", 0),
    ("Anak itu menangis.", "Ia makan kue.", "Ia terjatuh.", "cause", 1),
    ("Lampu padam.", "Ruangan menjadi gelap.", "Ruangan menjadi dingin.", "effect", 0),
]
MGSM_EXAMPLES = [
    (
        "Swali: Asha ana maembe 3 na anapata 2 zaidi. Ana maembe mangapi?",
        "Jibu la Hatua kwa Hatua: Anaanza na 3. 3 + 2 = 5. Jibu ni 5.",
        5,
    ),
    (
        "Swali: Juma ana kalamu 10 na anatoa 4. Zimebaki ngapi?",
        "Jibu la Hatua kwa Hatua: 10 - 4 = 6. Jibu ni 6.",
        6,
    ),
]
MGSM = [
    ("Neema anauza mayai 12 kila siku kwa siku 2. Ni mayai mangapi?", 24),
    ("Kuna viti 7 na 5 vimevunjika. Vizima ni vingapi?", 2),
]
XNLI = [
    ("Paka amelala kwenye kiti.", "Kuna paka.", 0),
    ("Mvua inanyesha leo.", "Jua linawaka kila mahali.", 2),
    ("Mwalimu anasoma kitabu.", "Kitabu ni cha historia.", 1),
]
FLORES = [
    ("Habari za asubuhi.", "Good morning."),
    ("Watoto wanacheza mpira.", "The children play ball."),
    ("Maji ni uhai.", "Water is life."),
]


BELEBELE = [
    (
        "Paka wangu anapenda samaki. Jina lake ni Simba.",
        "Paka anapenda nini?",
        "mkate",
        "samaki",
        "maji",
        "chai",
        "2",
    ),
    ("Mvua ilinyesha jana mjini.", "Mvua ilinyesha lini?", "jana", "leo", "kesho", "juzi", "1"),
    ("Asha ana vitabu vitatu na kalamu moja.", "Asha ana kalamu ngapi?", "tatu", "mbili", "moja", "nne", "3"),
]
SIB = [
    ("Timu ya taifa ilishinda mchezo.", "sports"),
    ("Daktari alitoa chanjo mpya.", "health"),
    ("Bunge lilipitisha sheria.", "politics"),
]
PROX = [
    (
        "Sheria kuu ya nchi ni ipi?",
        ["Katiba", "Ilani", "Barua"],
        "A",
        "law",
        "A: Hebu tufikiria hatua kwa hatua. Jibu ni (A).",
    ),
    (
        "Mahakama ya juu inaitwaje?",
        ["Bunge", "Mahakama ya Rufani"],
        "B",
        "law",
        "A: Hebu tufikiria hatua kwa hatua. Jibu ni (B).",
    ),
    (
        "Mbili mara tatu ni ngapi?",
        ["5", "6", "7", "8"],
        "B",
        "math",
        "A: Hebu tufikiria hatua kwa hatua. Jibu ni (B).",
    ),
    (
        "Tano mara mbili ni ngapi?",
        ["10", "11"],
        "A",
        "math",
        "A: Hebu tufikiria hatua kwa hatua. Jibu ni (A).",
    ),
]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_rows(path, keys, rows):
    write_lines(path, [json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) for row in rows])


def write_benchmarks(folder):
    """All, each in one language."""
    write_rows(folder / "mmmlu/sw.test.jsonl", ("Question", "A", "B", "C", "D", "Answer", "Subject"), MMMLU)
    keys = ("question_text", "background_description", "options", "answer_text", "level", "subject_category")
    exams = [(question, [], *rest) for question, *rest in M3EXAM]
    write_rows(
        folder / "m3exam/th.test.jsonl",
        keys,
        [*exams, ("ข้อใดถูก", ["อ่านประโยคนี้"], ["1. ใช่", "2. ไม่"], "1", "low", "language")],
    )
    write_rows(folder / "m3exam/th.dev.jsonl", keys, exams)
    keys = ("premise", "choice1", "choice2", "question", "label")
    write_rows(folder / "xcopa/id.test.jsonl", keys, XCOPA)
    write_rows(folder / "xcopa/id.validation.jsonl", keys, XCOPA[::-1])
    write_rows(folder / "mgsm/sw.train.jsonl", ("question", "answer", "answer_number"), MGSM_EXAMPLES)
    write_rows(
        folder / "mgsm/sw.test.jsonl",
        ("question", "answer", "answer_number"),
        [(question, None, number) for question, number in MGSM],
    )
    keys = (
        "flores_passage",
        "question",
        *(f"mc_answer{number}" for number in range(1, 5)),
        "correct_answer_num",
    )
    write_rows(folder / "belebele/sw.test.jsonl", keys, BELEBELE)
    write_rows(folder / "sib200/sw.test.jsonl", ("text", "category"), SIB)
    write_rows(folder / "sib200/sw.validation.jsonl", ("text", "category"), SIB[::-1])
    keys = ("question", "option_a", "option_b", "option_c", "option_d")
    translated = (*keys, "answer", "subject")
    write_rows(folder / "global_mmlu/sw.test.jsonl", translated, MMMLU)
    examples = [(f"Mfano: {question}", *rest) for question, *rest in MMMLU[::-1]]
    write_rows(folder / "global_mmlu/sw.dev.jsonl", translated, examples)
    local = [(*row[:5], "ABCD".index(row[5]), "Arts & Humanities") for row in MMMLU]
    write_rows(folder / "include/tl.test.jsonl", (*keys, "answer", "domain"), local)
    write_rows(folder / "include/tl.validation.jsonl", (*keys, "answer", "domain"), local[:2])
    options = [f"option_{number}" for number in range(10)]
    prox = []
    for question, given, answer, category, steps in PROX:
        prox.append((question, *given, *[None] * (10 - len(given)), answer, category, steps))
    prox_examples = [(f"Mfano: {question}", *rest) for question, *rest in prox[::-1]]
    for split, rows in (("test", prox), ("validation", prox_examples)):
        keys = ("question", *options, "answer", "category", "cot_content")
        write_rows(folder / f"mmlu_prox/sw.{split}.jsonl", keys, rows)
    write_rows(folder / "xnli/sw.validation.jsonl", ("premise", "hypothesis", "label"), XNLI)
    for split in ("dev", "devtest"):
        pairs = FLORES if split == "dev" else FLORES[::-1]
        write_lines(folder / f"flores200/{split}/swh_Latn.{split}", [own for own, _ in pairs])
        write_lines(folder / f"flores200/{split}/eng_Latn.{split}", [english for _, english in pairs])
    return folder


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory):
    """The folder of all items; to be read only."""
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VARIANTS = {
    "qwen2": {},
    "gemma2": {
        "family": Family.GEMMA2,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 9.0,
        "sliding_window": 16,
        "layer_types": (LayerType.SLIDING, LayerType.FULL),
        "tie_word_embeddings": True,
    },
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, texts):
    """The path of a model folder with random weights, float32, by the name of a variant and a seed; made
    once.
    """
    folder = tmp_path_factory.mktemp("models")
    train_sentencepiece(
        [*texts.values(), *(question for question, *_ in MMMLU + XCOPA)], 1200, folder / "small.model"
    )
    tokenizer = open_tokenizer(folder / "small.model")

    def make(variant="qwen2", seed=0, chat=False):
        path = folder / f"{variant}-{seed}{'-chat' if chat else ''}"
        if path.exists():
            return path
        files = folder / f"files-{path.name}"
        files.mkdir()
        tokenizer.save(files)
        if chat:
            (files / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        config = ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE, **VARIANTS[variant])
        # Larger weights than at initialization: with those every token is about as likely as every other.
        params = init_params(config.model_copy(update={"initializer_range": 0.3}), jax.random.key(seed))
        params = jax.tree.map(np.asarray, params)
        save_folder(
            path,
            Format.HF,
            params,
            write_hf_config(config, None, "float32", eos_token_id=tokenizer.eos_id),
            files,
        )
        return path

    return make


@pytest.fixture(scope="session")
def our_model():
    """A DecoderLM of a folder, float32, in batches of 512 tokens."""

    def make(path, responses=None, batch_tokens=512):
        folder = open_folder(path)
        tokenizer = PromptTokenizer(path)
        mesh = make_mesh({"fsdp": -1})
        params = load_params(folder, shardings=param_shardings(folder.config, mesh))
        return DecoderLM(
            folder.config, params, tokenizer, responses or Responses("test"), mesh, batch_tokens, np.float32
        )

    return make
