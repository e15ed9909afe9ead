"""The world `tales`: a small grammar that writes prompts, tales and pretraining documents.

Every mood word of the grammar (kind, cruel, golden, ...) is one that the gold reward in
`experiments.lab.gold` knows, and the share of good, neutral and bad words is fixed here: optimised
text has room to become better or worse than what the grammar writes. Train and held-out text never
share a (name, animal, place): the side is a hash of the three, so no list has to be kept. Chance
comes from `random.Random` seeded with strings, which is the same in every process and version.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from moe.errors import UserError

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
HELD_OUT_ONE_IN = 8

# A slot takes the tale's own mood with probability MOOD_CLING, else a fresh draw: the shares stay
# exact for each slot while moods within a tale agree a little more often than chance.
MOOD_SHARES = {"good": 0.35, "neutral": 0.35, "bad": 0.30}
MOOD_CLING = 0.35
# The share of tale documents that show "Prompt: ... / Tale: ..." pairs, which is what makes the
# base model usable by few-shot prompting; the others are tales in a form that no answer has.
PAIR_DOCUMENT_SHARE = 0.4
# Most show a single pair: with other heroes in view a tiny model is slow to learn which to copy.
PAIRS_PER_DOCUMENT = (1, 1, 1, 1, 1, 2, 3, 4)

Words = dict[str, dict[str, tuple[str, ...]]]

ENGLISH_WORDS: Words = {
    "trait": {
        "good": ("kind", "brave", "gentle", "happy", "clever"),
        "neutral": ("young", "small", "tall", "grey", "quiet"),
        "bad": ("cruel", "angry", "greedy", "rude", "mean"),
    },
    "thing": {
        "good": ("golden", "warm", "shiny", "sweet", "pretty"),
        "neutral": ("round", "brown", "little", "plain", "heavy"),
        "bad": ("broken", "cold", "dirty", "rotten", "ugly"),
    },
    "verb": {
        "good": ("shared", "saved", "mended", "cleaned", "guarded"),
        "neutral": ("carried", "moved", "watched", "counted", "held"),
        "bad": ("stole", "broke", "burned", "lost", "spoiled"),
    },
    "feeling": {
        "good": ("glad", "proud", "safe", "loved", "merry"),
        "neutral": ("sleepy", "ready", "hungry", "awake", "still"),
        "bad": ("sad", "lonely", "afraid", "hurt", "bitter"),
    },
    "day": {
        "good": ("sunny", "bright", "lovely"),
        "neutral": ("windy", "long", "spring"),
        "bad": ("stormy", "gloomy", "awful"),
    },
}

CHINESE_WORDS: Words = {
    "trait": {
        "good": ("善良", "勇敢", "聪明"),
        "neutral": ("年轻", "安静", "矮小"),
        "bad": ("凶恶", "贪心", "懒惰"),
    },
    "thing": {
        "good": ("金色", "温暖", "漂亮"),
        "neutral": ("圆形", "普通", "沉重"),
        "bad": ("破旧", "冰冷", "肮脏"),
    },
    "verb": {
        "good": ("分享", "保护", "修好"),
        "neutral": ("拿起", "看见", "放下"),
        "bad": ("偷走", "打碎", "弄丢"),
    },
    "feeling": {
        "good": ("开心", "幸福", "安心"),
        "neutral": ("平静", "困倦", "好奇"),
        "bad": ("难过", "孤单", "害怕"),
    },
}


@dataclass(frozen=True, kw_only=True)
class Language:
    """Sentence forms of one language; braces name what is filled in, one tuple per position."""

    words: Words
    asks: tuple[str, ...]
    answer: tuple[tuple[str, ...], ...]
    plain: tuple[tuple[str, ...], ...]
    space: str
    ask_header: str
    tale_header: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Who, where and what a domain's tales are about."""

    language: Language
    names: tuple[str, ...]
    animals: tuple[str, ...]
    places: tuple[str, ...]
    items: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Combo:
    """What a prompt asks for: the hero's name and animal, and the place (with its preposition)."""

    domain: str
    name: str
    animal: str
    place: str

    @property
    def split(self) -> Split:
        return split_of(f"{self.name}|{self.animal}|{self.place}")

    def mentioned_in(self, text: str) -> bool:
        """Whether the text keeps to its prompt: it holds the name, the animal and the place."""
        lower = text.lower()
        return all(part.lower() in lower for part in (self.name, self.animal, self.place))


class Example(NamedTuple):
    """One supervised example: what the user writes and the answer to learn."""

    prompt: str
    answer: str


ENGLISH = Language(
    words=ENGLISH_WORDS,
    asks=(
        "Tell a tale of {name} the {animal} {place}.",
        "Write about {name}, a {animal} {place}.",
        "Tell me what {name} the {animal} did {place}.",
        "What happened to {name} the {animal} {place}?",
    ),
    answer=(
        (
            "{name} was a {trait} {animal} {place}.",
            "{name} the {animal} had a {thing} home {place}.",
            "The {trait} {animal} {name} lived {place}.",
        ),
        (
            "One {day} day {name} found a {thing} {item}.",
            "{name} met a {trait} {friend} with a {item}.",
            "The {friend} had a {thing} {item}.",
        ),
        (
            "{name} {verb} the {item}.",
            "{name} and the {friend} {verb} the {item}.",
        ),
        (
            "That night {name} was {feeling}.",
            "It was a {day} day.",
            "The {animal} went home {feeling}.",
            "",
        ),
    ),
    plain=(
        (
            "Once there was a {trait} {animal} named {name}. {name} lived {place}.",
            "Long ago {place} a {animal} named {name} had a {thing} bed.",
            "Once a {trait} {animal} {place} was called {name}.",
        ),
        (
            "There {name} saw a {thing} {item}.",
            "Soon a {trait} {friend} came with a {thing} {item}.",
            "On a {day} day they saw a {item}.",
        ),
        (
            "So the {animal} {verb} the {item}.",
            "Then the {friend} {verb} the {item}.",
        ),
        (
            "In the end {name} felt {feeling}.",
            "And so ended a {day} day.",
            "",
        ),
    ),
    space=" ",
    ask_header="Prompt:",
    tale_header="Tale:",
)

CHINESE = Language(
    words=CHINESE_WORDS,
    asks=("讲一个{place}的{animal}{name}的故事。", "写一写{animal}{name}在{place}做了什么。"),
    answer=(
        (
            "{name}是一只{trait}的{animal}，住在{place}。",
            "{place}有一只{trait}的{animal}叫{name}。",
        ),
        ("有一天，{name}找到了{thing}的{item}。", "{trait}的{friend}送来{thing}的{item}。"),
        ("{name}{verb}了{item}。", "{friend}{verb}了{item}。"),
        ("晚上，{name}觉得很{feeling}。", ""),
    ),
    plain=(
        ("从前{place}住着{trait}的{animal}{name}。", "很久以前，{animal}{name}在{place}玩。"),
        ("那里有一个{thing}的{item}。", "一只{trait}的{friend}带着{item}来了。"),
        ("于是{animal}{verb}了{item}。", "后来{friend}{verb}了{item}。"),
        ("最后{name}很{feeling}。", ""),
    ),
    space="",
    ask_header="题目：",
    tale_header="故事：",
)

ENGLISH_NAMES = tuple(
    "Mia Tom Lily Ben Anna Max Rosa Leo Nina Sam Ella Finn Ruby Hugo Ivy Otto".split()
)

SETTINGS: dict[str, Setting] = {
    "tales_forest": Setting(
        language=ENGLISH,
        names=ENGLISH_NAMES,
        animals=("fox", "bear", "owl", "deer", "wolf", "hare"),
        places=(
            "in the forest",
            "by the river",
            "under the oak",
            "on the hill",
            "in the meadow",
        ),
        items=("leaf", "nut", "berry", "feather", "acorn", "stick"),
    ),
    "tales_sea": Setting(
        language=ENGLISH,
        names=ENGLISH_NAMES,
        animals=("crab", "seal", "whale", "gull", "turtle", "otter"),
        places=(
            "by the sea",
            "on the beach",
            "near the harbour",
            "on the island",
            "in the bay",
        ),
        items=("shell", "boat", "pearl", "net", "rope", "sail"),
    ),
    "tales_town": Setting(
        language=ENGLISH,
        names=ENGLISH_NAMES,
        animals=("cat", "dog", "mouse", "goat", "horse", "hen"),
        places=(
            "in the town",
            "at the market",
            "near the bridge",
            "by the school",
            "in the garden",
        ),
        items=("hat", "cake", "lamp", "bell", "book", "key"),
    ),
    "tales_zh": Setting(
        language=CHINESE,
        names=("小明", "小红", "阿宝", "乐乐", "天天", "丽丽", "小龙", "小雨", "豆豆", "贝贝"),
        animals=("狐狸", "小熊", "兔子", "小猫", "小狗", "老虎"),
        places=("森林里", "小河边", "大山上", "大海边", "村子里", "花园里"),
        items=("苹果", "帽子", "石头", "灯笼", "风筝", "篮子"),
    ),
}

ENGLISH_DOMAINS = ("tales_forest", "tales_sea", "tales_town")
TALE_DOMAINS = (*ENGLISH_DOMAINS, "tales_zh")
# A few-shot answer is one line, so generation from a base model stops at the first of these.
FEW_SHOT_STOP = "\n"


def split_of(key: str) -> Split:
    """The side of a text or of a combo, decided by a hash of its key alone: 1 in 8 is held out."""
    number = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:4], "big")
    return "held_out" if number % HELD_OUT_ONE_IN == 0 else "train"


def seeded(seed: int, *purpose: str) -> random.Random:
    """A generator for one purpose; two purposes of one seed are independent streams."""
    return random.Random("/".join((*purpose, str(seed))))


@cache
def combos(split: Split, domain: str) -> tuple[Combo, ...]:
    """All combos of one side of one tale domain, in a fixed order."""
    _check_split(split)
    setting = _setting(domain)
    every = (
        Combo(domain=domain, name=name, animal=animal, place=place)
        for name in setting.names
        for animal in setting.animals
        for place in setting.places
    )
    return tuple(combo for combo in every if combo.split == split)


def ask(combo: Combo, form: int) -> str:
    """The user's text for a combo, in one of the language's forms."""
    return _fill(_setting(combo.domain).language.asks[form], vars(combo).__getitem__)


def prompts(
    seed: int,
    n: int,
    *,
    split: Split = "train",
    domains: Sequence[str] = ENGLISH_DOMAINS,
) -> list[str]:
    """`n` distinct prompts of one side, in an order drawn from the seed.

    A shorter list is the beginning of a longer one. Raises `UserError` when the side has fewer.
    """
    every = [text for domain in domains for text in _asks(split, domain)]
    if n > len(every):
        raise UserError(
            f"{n} prompts were asked of the {split} side of {', '.join(domains)}, which has "
            f"{len(every)}; ask for at most that many."
        )
    seeded(seed, "prompts", split, *domains).shuffle(every)
    return every[:n]


def parse_prompt(text: str) -> Combo:
    """The combo that a prompt asks for; `UserError` if the grammar never wrote this prompt."""
    try:
        return _prompt_index()[text]
    except KeyError:
        raise UserError(
            f"not a prompt of the world tales: {text!r}; use prompts() of experiments.lab.tales, "
            f"such as {ask(combos('train', 'tales_forest')[0], 0)!r}."
        ) from None


def tale(prompt: str | Combo, rng: random.Random) -> str:
    """A reference answer: three or four sentences that name the hero, the animal and the place."""
    combo = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    return _write(combo, rng, forms=_setting(combo.domain).language.answer)


def plain_tale(combo: Combo, rng: random.Random) -> str:
    """A tale as the pretraining corpus tells it: no instruction, and other sentences."""
    return _write(combo, rng, forms=_setting(combo.domain).language.plain)


def sft_examples(
    seed: int,
    n: int,
    *,
    split: Split = "train",
    domains: Sequence[str] = ENGLISH_DOMAINS,
) -> list[Example]:
    """`n` (prompt, answer) pairs; a prompt returns only after all the side's others had a turn."""
    every = [text for domain in domains for text in _asks(split, domain)]
    rng = seeded(seed, "sft", split, *domains)
    order: list[str] = []
    while len(order) < n:
        rng.shuffle(every)
        order.extend(every)
    return [Example(prompt, tale(prompt, rng)) for prompt in order[:n]]


def few_shot_prompt(prompt: str, k: int, *, rng: random.Random) -> str:
    """`k` worked examples and then the prompt, up to where a base model should write the tale.

    The examples come from the training side of the prompt's own domain and never show its combo.
    """
    combo = parse_prompt(prompt)
    others = [other for other in combos("train", combo.domain) if other != combo]
    language = _setting(combo.domain).language
    shown = [_pair(rng.choice(others), rng) for _ in range(k)]
    return "\n".join([*shown, f"{_headed(language, prompt)}\n{language.tale_header}"])


def documents(seed: int, n: int, *, domain: str, split: Split = "train") -> list[str]:
    """`n` pretraining documents of one domain; a shorter list is the beginning of a longer one.

    Held-out documents share no combo (tales), sum (arithmetic) or line (lists) with training ones.
    """
    _check_split(split)
    writers: dict[str, Callable[[random.Random, Split], str]] = {
        "arithmetic": _arithmetic_document,
        "lists": _lists_document,
    }
    rng = seeded(seed, "documents", domain, split)
    if domain in writers:
        return [writers[domain](rng, split) for _ in range(n)]
    heroes = combos(split, domain)
    return [_tale_document(heroes, rng) for _ in range(n)]


def _setting(domain: str) -> Setting:
    if domain not in SETTINGS:
        raise UserError(
            f"no tale domain is called {domain!r}; choose among {', '.join(TALE_DOMAINS)} "
            "(documents() also writes arithmetic and lists)."
        )
    return SETTINGS[domain]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; it must be 'train' or 'held_out'.")


@cache
def _asks(split: Split, domain: str) -> tuple[str, ...]:
    forms = range(len(_setting(domain).language.asks))
    return tuple(ask(combo, form) for combo in combos(split, domain) for form in forms)


@cache
def _prompt_index() -> dict[str, Combo]:
    return {
        ask(combo, form): combo
        for domain, setting in SETTINGS.items()
        for split in SPLITS
        for combo in combos(split, domain)
        for form in range(len(setting.language.asks))
    }


def _fill(form: str, value: Callable[[str], str]) -> str:
    text = re.sub(r"\{(\w+)\}", lambda match: value(match[1]), form)
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _write(combo: Combo, rng: random.Random, *, forms: tuple[tuple[str, ...], ...]) -> str:
    """One sentence form per position; the item and the friend stay the same through the tale."""
    setting = _setting(combo.domain)
    language = setting.language
    fixed = {
        "name": combo.name,
        "animal": combo.animal,
        "place": combo.place,
        "item": rng.choice(setting.items),
        "friend": rng.choice([animal for animal in setting.animals if animal != combo.animal]),
    }
    mood = _draw_mood(rng)
    used: set[str] = set()

    def value(slot: str) -> str:
        if slot in fixed:
            return fixed[slot]
        own = mood if rng.random() < MOOD_CLING else _draw_mood(rng)
        word = rng.choice([word for word in language.words[slot][own] if word not in used])
        used.add(word)
        return word

    sentences = [_fill(rng.choice(position), value) for position in forms]
    return language.space.join(sentence for sentence in sentences if sentence)


def _draw_mood(rng: random.Random) -> str:
    point = rng.random()
    for mood, share in MOOD_SHARES.items():
        if point < share:
            return mood
        point -= share
    return "bad"


def _headed(language: Language, prompt: str) -> str:
    return f"{language.ask_header}{language.space}{prompt}"


def _pair(combo: Combo, rng: random.Random) -> str:
    language = _setting(combo.domain).language
    prompt = ask(combo, rng.randrange(len(language.asks)))
    answer = tale(combo, rng)
    return f"{_headed(language, prompt)}\n{language.tale_header}{language.space}{answer}"


def _tale_document(heroes: tuple[Combo, ...], rng: random.Random) -> str:
    if rng.random() < PAIR_DOCUMENT_SHARE:
        return "\n".join(
            _pair(rng.choice(heroes), rng) for _ in range(rng.choice(PAIRS_PER_DOCUMENT))
        )
    return plain_tale(rng.choice(heroes), rng)


def _lines(draw: Callable[[random.Random], str], rng: random.Random, *, split: Split) -> str:
    """Four to six lines of one side: a line of the other side is drawn again."""
    kept: list[str] = []
    wanted = rng.randint(4, 6)
    while len(kept) < wanted:
        line = draw(rng)
        if split_of(line) == split:
            kept.append(line)
    return "\n".join(kept)


def _arithmetic_document(rng: random.Random, split: Split) -> str:
    return _lines(_sum, rng, split=split)


def _sum(rng: random.Random) -> str:
    first, second = rng.randint(0, 30), rng.randint(0, 30)
    if rng.random() < 0.5:
        return f"{first} + {second} = {first + second}."
    return f"{first + second} - {first} = {second}."


def _lists_document(rng: random.Random, split: Split) -> str:
    return _lines(rng.choice((_counting, _alphabet, _sorting)), rng, split=split)


def _counting(rng: random.Random) -> str:
    start, step, length = rng.randint(0, 40), rng.randint(1, 5), rng.randint(4, 6)
    return f"Count by {step}: {', '.join(str(start + step * i) for i in range(length))}."


def _alphabet(rng: random.Random) -> str:
    start, length = rng.randint(0, 18), rng.randint(4, 8)
    return f"Letters: {' '.join(chr(ord('a') + start + i) for i in range(length))}."


def _sorting(rng: random.Random) -> str:
    known = sorted(item for domain in ENGLISH_DOMAINS for item in SETTINGS[domain].items)
    shown = rng.sample(known, rng.randint(3, 4))
    return f"Sort: {' '.join(shown)} = {' '.join(sorted(shown))}."
