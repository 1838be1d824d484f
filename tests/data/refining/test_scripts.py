"""The rules of cleaning by script, in text of each kind: words without spaces, digits, ends of sentences."""

import unicodedata

import pytest

from babel_jax.config import CleaningSettings, Rule
from babel_jax.data.refining.characters import Kind, code_points, kinds
from babel_jax.data.refining.cleaning import Cleaner
from babel_jax.evaluation.benchmarks.numbers import last_number
from babel_jax.evaluation.suite import sentences, words
from babel_jax.languages import LANGUAGES, REGISTRY

# Article 1 of the Universal Declaration of Human Rights, its beginning, in scripts without spaces.
DENSE = {
    "lo": "ມະນຸດເກີດມາມີສິດເສລີພາບແລະສະເໝີໜ້າກັນໃນທຸກໆທາງກຽດສັກສີແລະທາງສິດ",
    "km": "មនុស្សទាំងអស់កើតមកមានសេរីភាពនិងសមភាពក្នុងផ្នែកសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ",
    "bo": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང༌།",
    "zho_Hant": "人人生而自由在尊嚴和權利上一律平等他們賦有理性和良心並應以兄弟關係的精神相對待",
    "yue": "人人生出嚟就係自由嘅喺尊嚴同權利上一律平等佢哋具有理性同良心",
}
SPACED = {
    "am": "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው ተፈጥሮ ማስተዋልና ሕሊና ስላለው",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם כולם חוננו בתבונה ובמצפון",
    "ka": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다",
    "sat": "ᱡᱚᱛᱚ ᱢᱟᱱᱣᱟ ᱜᱮ ᱯᱷᱩᱨᱜᱟᱹᱞ ᱥᱟᱶᱛᱮ ᱡᱟᱱᱟᱢ ᱦᱩᱭᱩᱜᱼᱟ",
}
ONLY = {rule: tuple(other for other in Rule if other is not rule) for rule in Rule}


def dropped(text, code, rule):
    _, found = Cleaner(CleaningSettings(off=ONLY[rule], mask_personal_data=False), code)(text)
    return found is rule


@pytest.mark.parametrize("code", DENSE)
def test_repetition_is_seen_in_scripts_without_spaces(code):
    assert dropped(DENSE[code][:24] * 12, code, Rule.REPETITION)
    assert not dropped(DENSE[code], code, Rule.REPETITION)
    # As text with spaces, it would be one word, which repeats nothing.
    assert not dropped(DENSE[code][:24] * 12, "en", Rule.REPETITION)


@pytest.mark.parametrize("code", SPACED)
def test_repetition_is_seen_in_scripts_with_spaces(code):
    assert dropped(f"{SPACED[code]} " * 8, code, Rule.REPETITION)
    assert not dropped(SPACED[code], code, Rule.REPETITION)


@pytest.mark.parametrize("code", SPACED)
def test_words_are_those_between_spaces(code):
    text = SPACED[code]
    assert [text[start:stop] for start, stop in words(text, code)] == text.split()


@pytest.mark.parametrize("code", [*DENSE, *SPACED])
def test_letters_of_every_script_are_letters(code):
    text = {**DENSE, **SPACED}[code]
    assert not dropped(text, code, Rule.LETTERS)
    assert not dropped(text, code, Rule.WORDS)
    assert dropped("!? .. 12 -- " * 20, code, Rule.LETTERS)


# One zero of each script of the registry that has digits of its own.
ZEROS = sorted(
    {
        chr(number)
        for number in range(0x10000)
        if unicodedata.category(chr(number)) == "Nd" and unicodedata.digit(chr(number)) == 0
    }
)


@pytest.mark.parametrize("zero", ZEROS, ids=lambda zero: unicodedata.name(zero))
def test_digits_of_every_script_are_digits(zero):
    number = "".join(chr(ord(zero) + digit) for digit in (1, 2, 5, 0))
    assert set(kinds(code_points(number)).tolist()) == {int(Kind.DIGIT)}
    assert last_number(f"x {number}") == 1250
    assert dropped(number * 10, "en", Rule.DIGITS)


# Two sentences in each way in which the scripts of the registry end them, and one that must not be cut.
SENTENCES = {
    "am": ("ይህ ቤት ነው። ያ ዛፍ ነው።", "፲፪፥ ፫፬"),
    "hy": ("Սա տուն է։ Սա ծառ է։", "Ի՞նչ է սա"),
    "bo": ("འདི་ཁང་པ་རེད། དེ་ཤིང་རེད།", "བོད་ཡིག"),
    "km": ("នេះជាផ្ទះ។ នោះជាដើមឈើ។", "ភាសាខ្មែរ"),
    "sat": ("ᱱᱚᱣᱟ ᱚᱲᱟᱜ ᱠᱟᱱᱟ᱾ ᱚᱱᱟ ᱫᱟᱨᱮ ᱠᱟᱱᱟ᱾", "ᱥᱟᱱᱛᱟᱲᱤ"),
    "mni_Mtei": ("ꯃꯁꯤ ꯌꯨꯝ ꯅꯤ꯫ ꯃꯗꯨ ꯎ ꯅꯤ꯫", "ꯃꯩꯇꯩ"),
    "ne": ("यो घर हो। त्यो रूख हो।", "नेपाली"),
    "el": ("Τι είναι αυτό; Ένα σπίτι.", "Το σπίτι· το δέντρο"),
    "he": ("זה בית. זה עץ.", "שלום, עולם"),
    "ckb": ("ئەمە ماڵە. ئەوە چییە؟ دارە.", "سڵاو، جیهان"),
    "zho_Hant": ("這是房子。那是樹。", "你好，世界"),
    "my": ("ဒါက အိမ်ပါ။ အဲဒါ သစ်ပင်ပါ။", "မင်္ဂလာပါ၊ကမ္ဘာ"),
    "nqo": ("ߒߞߏ ߦߋ߫ ߞߊ߲ ߠߋ߬ ߘߌ߫߸ ߊ߬ ߦߋ߫߹ ߊ߬ ߕߍ߫.", "ߒߞߏ"),
}


@pytest.mark.parametrize("code", SENTENCES)
def test_sentences_end_as_their_script_does(code):
    several, one = SENTENCES[code]
    ends = sum(several.count(end) for end in ".;。።։།។᱾꯫।؟။߹")
    assert len(sentences(several, code)) == ends
    assert "".join(sentences(one, code)) == one.replace(" ", "")


def test_a_semicolon_ends_a_question_in_greek_alone():
    assert len(sentences("Τι; Ναι.", "el")) == 2
    assert sentences("This; that.", "en") == ["This;", "that."]  # by its space: there is one sentence
    assert len(sentences("Yes; no. Well.", "en")) == 2


def test_every_language_can_be_cleaned():
    """By the rules of its script; its own name is a text without a fault."""
    for code, one in REGISTRY.items():
        text = f"{one.own_name or one.name} " * 3
        document, _ = Cleaner(CleaningSettings(off=tuple(Rule)), code).judged(text)
        assert document.words() > 0, code
        assert LANGUAGES[code].writing.code == one.script
