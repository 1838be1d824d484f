import json

import pytest

from babel_jax.config import DataSettings, Source
from babel_jax.data.prepare import prepare
from babel_jax.data.tokenizers import train_sentencepiece

# The first sentence of the Universal Declaration of Human Rights, article 1.
ARTICLE_1 = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "zh": "人人生而自由，在尊严和权利上一律平等。",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "bn": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "ur": "تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔",
    "id": "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "sw": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa.",
    "tl": "Ang lahat ng tao'y isinilang na malaya at pantay-pantay sa karangalan at mga karapatan.",
    "ta": "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும், உரிமைகளிலும் சமமானவர்கள்.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "jv": "Saben uwong kalairake kanthi mardika lan darbe martabat lan hak-hak kang padha.",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "ha": "Su dai 'yan-adam, ana haifuwarsu ne duka 'yantattu, kuma kowannensu na da mutunci da hakkoki daidai da na kowa.",
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "my": "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း၊ တူညီလွတ်လပ်သော အခွင့်အရေးများဖြင့် လည်းကောင်း၊ မွေးဖွားလာသူများ ဖြစ်သည်။",
}


@pytest.fixture(scope="session")
def texts():
    """One sentence in each of the 25 languages."""
    return ARTICLE_1


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """The path of a SentencePiece model of at most 1,200 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(ARTICLE_1.values(), 1200, path)
    return path


@pytest.fixture
def write_rows():
    """Writes rows (dicts) as a .jsonl file and returns its path."""

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def parallel_rows(language, kinds=("web", "textbook"), number=40):
    """Rows whose ids are the same in every language; texts differ."""
    return [
        {"id": f"{kind}-{index}", "kind": kind, "text": f"{ARTICLE_1[language]} {language} {kind} {index}\n" * (1 + index % 3)}
        for kind in kinds
        for index in range(number)
    ]


@pytest.fixture(scope="session")
def rows_of():
    """`parallel_rows`."""
    return parallel_rows


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Sources of four languages with 40 rows of each of two kinds (Hausa: web alone, 10 rows)."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = []
    for language in ("en", "zh", "sw", "ha"):
        rows = parallel_rows(language, ("web",), 10) if language == "ha" else parallel_rows(language)
        path = folder / f"{language}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        sources.append(Source(language=language, path=str(path)))
    return tuple(sources)


@pytest.fixture(scope="session")
def small_settings(small_corpus, tmp_path_factory):
    """Settings for windows of 64 tokens of the small corpus."""
    return DataSettings(folder=str(tmp_path_factory.mktemp("prepared") / "data"), seq_len=64, heldout_fraction=0.1, sources=small_corpus)


@pytest.fixture(scope="session")
def small_prepared(small_settings, small_model):
    """The folder of the small corpus, prepared; to be read only."""
    prepare(small_settings, small_model)
    return small_settings.folder
