"""Tokenizer and templates: the one path from conversations to token ids, for every stage.

The decision to know: a conversation is written as segments, and segments of different kinds are
never tokenised together. A prompt's ids are therefore an exact prefix of the ids of the prompt with
its answer, a mask follows from the segment and never from an id, and text that came with the user's
files can not turn into a special token. The price: no token spans the seam of prompt and answer,
and a tokenizer that marks the start of a text (SentencePiece) marks the start of each segment.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from moe.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")

PAD_TOKEN = "<|pad|>"
BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
NUM_BYTES = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Message:
    """One turn.

    `content` is the whole text. `input_at` is the offset in `content` where an Alpaca row's `input`
    begins (None without one): only the alpaca template, which has a heading for it, looks at it.
    """

    role: Role
    content: str
    input_at: int | None = field(default=None, compare=False)


Conversation = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a rendered conversation.

    `is_special_markup`: the text is the template's, so special tokens in it count as such.
    `supervised`: the loss falls on it. `ends_answer`: exactly one id, the EOS, whatever `text` is.
    """

    text: str
    is_special_markup: bool = False
    supervised: bool = False
    ends_answer: bool = False


END_OF_ANSWER = Segment(text="", is_special_markup=True, supervised=True, ends_answer=True)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A tokenised conversation; `loss_mask[i]` says whether token i is to be learned.

    Both lists have the same length, at most `max_length`; `num_cut` tokens were cut from the end.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    num_cut: int


class Template(Protocol):
    """How a conversation is written as text.

    `end_token` ends an answer where the tokenizer has it as one added token (None: the tokenizer's
    EOS). `writes_bos`: the template decides on BOS itself, so none is put in front.
    """

    @property
    def name(self) -> str: ...
    @property
    def end_token(self) -> str | None: ...
    @property
    def writes_bos(self) -> bool: ...

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """The segments; unless the last turn is an answer, they end with what opens the answer."""

    def answer(self, text: str) -> str:
        """The answer as `render` writes it (some chat templates strip it)."""


# --- templates ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What a template writes around the turns of one role."""

    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class TurnTemplate:
    """A template that writes turn after turn: heading, text, ending.

    `opening` stands in front of a conversation without a system turn; `input_heading` separates an
    Alpaca row's instruction from its input; `is_special_markup` as in `Segment`.
    """

    name: str
    system: Heading
    user: Heading
    before_answer: str
    between: str = ""
    opening: str = ""
    opening_with_input: str = ""
    input_heading: str | None = None
    is_special_markup: bool = False
    end_token: str | None = None
    writes_bos: bool = False

    def answer(self, text: str) -> str:
        return text

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        segments = [self._markup(self._opening(conversation))]
        for index, message in enumerate(conversation):
            segments.append(self._markup(self.between if index else ""))
            segments.extend(self._turn(message))
        if not conversation:
            segments.append(self._markup(self.before_answer))
        elif conversation[-1].role != "assistant":
            segments.append(self._markup(self.between + self.before_answer))
        return tuple(segment for segment in segments if segment.text or segment.ends_answer)

    def _opening(self, conversation: Conversation) -> str:
        if conversation and conversation[0].role == "system":
            return ""
        has_input = self.input_heading is not None and any(
            message.input_at is not None for message in conversation
        )
        return self.opening_with_input if has_input else self.opening

    def _turn(self, message: Message) -> list[Segment]:
        if message.role == "assistant":
            answer = Segment(text=message.content, supervised=True)
            return [self._markup(self.before_answer), answer, END_OF_ANSWER]
        heading = self.system if message.role == "system" else self.user
        texts = [Segment(text=message.content)]
        if self.input_heading is not None and message.input_at is not None:
            instruction = message.content[: message.input_at].rstrip("\n")
            texts = [
                Segment(text=instruction),
                self._markup(self.input_heading),
                Segment(text=message.content[message.input_at :]),
            ]
        return [self._markup(heading.before), *texts, self._markup(heading.after)]

    def _markup(self, text: str) -> Segment:
        return Segment(text=text, is_special_markup=self.is_special_markup)


PLAIN = TurnTemplate(
    name="plain",
    system=Heading(before="", after="\n"),
    user=Heading(before="", after="\n"),
    before_answer="",
)
# For base models: the completion goes on where the prompt stops, with nothing in between.
CONTINUATION = TurnTemplate(
    name="continuation",
    system=Heading(before="", after="\n"),
    user=Heading(before="", after=""),
    before_answer="",
)
# Taori et al. 2023, "Stanford Alpaca": the headings are an interface, models were trained on them.
ALPACA = TurnTemplate(
    name="alpaca",
    opening=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
    ),
    opening_with_input=(
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
    ),
    system=Heading(before="", after="\n\n"),
    user=Heading(before="### Instruction:\n", after="\n\n"),
    input_heading="\n\n### Input:\n",
    before_answer="### Response:\n",
)
CHATML = TurnTemplate(
    name="chatml",
    system=Heading(before="<|im_start|>system\n", after="<|im_end|>"),
    user=Heading(before="<|im_start|>user\n", after="<|im_end|>"),
    before_answer="<|im_start|>assistant\n",
    between="\n",
    is_special_markup=True,
    end_token="<|im_end|>",
)
BUILT_IN = {template.name: template for template in (PLAIN, ALPACA, CHATML, CONTINUATION)}

# Stand-ins for contents while a chat template runs. An em space that is gone was stripped.
_MARK_OPEN, _MARK_CLOSE, _EM_SPACE = "\ue000", "\ue001", "\u2003"
_MARK = re.compile(f"({_EM_SPACE}?){_MARK_OPEN}(\\d+){_MARK_CLOSE}({_EM_SPACE}?)")


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """The place of turn `index` in a chat template's text, and which ends of it are stripped."""

    index: int
    strips_left: bool
    strips_right: bool

    def fill(self, content: str) -> str:
        content = content.lstrip() if self.strips_left else content
        return content.rstrip() if self.strips_right else content


class ChatTemplate:
    """The tokenizer's own chat template, run over stand-ins so that we know what is content.

    An answer is what the template writes to open one, the answer, one EOS. What a template does
    differently to the last answer of a finished conversation has no part in it: the model never
    sees that when it answers.
    """

    name = "tokenizer"
    writes_bos = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "This tokenizer has no chat template of its own: "
                "use --template plain, alpaca or chatml."
            )
        self._tokenizer = tokenizer
        finished = (Message("user", "?"), Message("assistant", "!"))
        pieces = self._run(finished, open_answer=False)
        slots = [piece for piece in pieces if isinstance(piece, _Slot)]
        self._answer_slot = slots[-1]
        after_answer = pieces[pieces.index(slots[-1]) + 1 :]
        self.end_token = _first_special("".join(map(str, after_answer)), tokenizer)

    def answer(self, text: str) -> str:
        return self._answer_slot.fill(text)

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        if conversation and conversation[-1].role == "assistant":
            answer = Segment(text=self.answer(conversation[-1].content), supervised=True)
            return (*self.render(conversation[:-1]), answer, END_OF_ANSWER)
        segments: list[Segment] = []
        after_answer = False
        for piece in self._run(conversation, open_answer=True):
            if isinstance(piece, _Slot):
                message = conversation[piece.index]
                after_answer = message.role == "assistant"
                text = piece.fill(message.content)
                segments.append(Segment(text=text, supervised=after_answer))
                segments.extend([END_OF_ANSWER] if after_answer else [])
                continue
            text = self._without_ending(piece) if after_answer else piece
            segments.append(Segment(text=text, is_special_markup=True))
        return tuple(segments)

    def _without_ending(self, markup: str) -> str:
        """Markup that follows an answer, less the end token that END_OF_ANSWER stands for."""
        stripped = markup.lstrip()
        if self.end_token and stripped.startswith(self.end_token):
            return stripped[len(self.end_token) :]
        return markup

    def _run(self, conversation: Conversation, *, open_answer: bool) -> list[str | _Slot]:
        from jinja2 import TemplateError

        turns = [
            {
                "role": message.role,
                "content": f"{_EM_SPACE}{_MARK_OPEN}{index}{_MARK_CLOSE}{_EM_SPACE}",
            }
            for index, message in enumerate(conversation)
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=open_answer
            )
        except (TemplateError, ValueError, IndexError) as error:
            roles = ", ".join(message.role for message in conversation) or "no turn"
            raise UserError(
                f"The tokenizer's chat template refuses a conversation of turns {roles}: {error}. "
                "Use --template plain, or change the conversation."
            ) from error
        pieces = _slots(text)
        found = [piece.index for piece in pieces if isinstance(piece, _Slot)]
        if found != list(range(len(conversation))):
            raise UserError(
                f"The tokenizer's chat template writes turns {found} of a conversation of "
                f"{len(conversation)} turns: it leaves out, repeats or moves text. "
                "Use --template plain, alpaca or chatml."
            )
        return pieces


def _slots(text: str) -> list[str | _Slot]:
    pieces: list[str | _Slot] = []
    end = 0
    for match in _MARK.finditer(text):
        pieces.append(text[end : match.start()])
        left, index, right = match.groups()
        pieces.append(_Slot(index=int(index), strips_left=not left, strips_right=not right))
        end = match.end()
    pieces.append(text[end:])
    return [piece for piece in pieces if piece]


def _first_special(text: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The special token that comes first in `text`, the longest of those at the same place."""
    found = [
        (text.find(str(token)), -len(str(token)), str(token))
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and str(token) in text
    ]
    return min(found)[2] if found else None


def pick_template(tokenizer: PreTrainedTokenizerFast, name: str | None = None) -> Template:
    """The template called `name`; without one the tokenizer's own, and `plain` if it has none."""
    if name is None:
        return ChatTemplate(tokenizer) if tokenizer.chat_template else PLAIN
    if name == ChatTemplate.name:
        return ChatTemplate(tokenizer)
    if name not in BUILT_IN:
        known = [*BUILT_IN, ChatTemplate.name]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"Unknown template {name!r}.{hint} There are: {', '.join(known)}.")
    return BUILT_IN[name]


# --- tokenizers --------------------------------------------------------------------------------


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (Sennrich et al. 2016; Radford et al. 2019) learned from `texts`.

    Every text round-trips, because all 256 bytes are pieces; pad, BOS and EOS are three different
    specials. Same texts, same vocabulary. Few texts can give fewer than `vocab_size` pieces; fewer
    than 256 bytes and 3 specials is a UserError, and so are no texts at all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN]
    smallest = NUM_BYTES + len(specials)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is under {smallest}: "
            f"{NUM_BYTES} bytes and {len(specials)} special tokens have to fit in."
        )
    num_characters = 0

    def counted() -> Iterable[str]:
        nonlocal num_characters
        for text in texts:
            num_characters += len(text)
            yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if num_characters == 0:
        raise UserError("There is no text to train a tokenizer on.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in a local directory; the network is never asked."""
    from transformers import AutoTokenizer

    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(
            f"No tokenizer folder {directory} (looked from {Path.cwd()}). "
            "Give a local folder; names on a hub are not fetched."
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{directory} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}). "
            "Give the folder that tokenizer.save_pretrained wrote."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the readers raise whatever their parsers raise
        raise UserError(f"The tokenizer in {directory} does not load: {error}") from error
    # transformers 5 reads some SentencePiece files without tokenizer.json as specials only.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"The tokenizer in {directory} has only its {len(tokenizer)} special tokens: "
            "its vocabulary was not read. Convert it to a tokenizer.json first."
        )
    return tokenizer


# --- ids ---------------------------------------------------------------------------------------


class TextPath:
    """A tokenizer and a template: from conversations to ids and back, the same in every stage.

    `max_length`: tokens of an encoded conversation. `train_on_inputs`: the loss falls on prompts
    too (never on BOS, which nothing predicts). Public ids, none of which is ever used to find a
    mask: `eos_id` ends every answer; `bos_id` (or None) begins a text; `stop_ids` end a generated
    answer (a BOS too: some models end a text by beginning the next); `pad_id` is never one that
    ends an answer, whatever the tokenizer says, so that a model can learn to stop.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: Template,
        *,
        max_length: int,
        train_on_inputs: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "The tokenizer has no EOS token, so a model could not learn to end an answer: "
                "set eos_token in its tokenizer_config.json."
            )
        if max_length < 2:
            raise UserError(f"max_length {max_length} leaves nothing to predict: give 2 or more.")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.train_on_inputs = train_on_inputs
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {int(index) for index, token in added if token.special}
        self._special_ids |= {int(index) for index in tokenizer.all_special_ids}
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = self._end_id()
        stops = (self.eos_id, tokenizer.eos_token_id, self.bos_id)
        self.stop_ids: tuple[int, ...] = tuple(
            dict.fromkeys(index for index in stops if index is not None)
        )
        self.pad_id: int = self._choose_pad()
        # Text can honestly hold what the tokenizer does not know; every other special is ours.
        self._forbidden_ids = self._special_ids - {tokenizer.unk_token_id} | set(self.stop_ids)

    def encode(self, conversation: Conversation) -> Encoded:
        """The ids of a conversation that ends with an answer, with the loss on its answers.

        What is longer than `max_length` is cut from the end. A UserError if the last turn is not
        the assistant's.
        """
        if not conversation or conversation[-1].role != "assistant":
            raise UserError(
                "A conversation to learn from has to end with an assistant turn; "
                f"this one ends with {conversation[-1].role if conversation else 'nothing'}."
            )
        ids, mask = self._encode(conversation)
        if self.train_on_inputs:
            mask = [index > 0 or token != self.bos_id for index, token in enumerate(ids)]
        num_cut = max(0, len(ids) - self.max_length)
        return Encoded(
            input_ids=ids[: self.max_length], loss_mask=mask[: self.max_length], num_cut=num_cut
        )

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """The ids up to where the answer begins, uncut: a prefix of the ids `encode` gives."""
        if conversation and conversation[-1].role == "assistant":
            raise UserError(
                "A prompt has to end before the answer, but this one ends with an assistant turn."
            )
        ids, _ = self._encode(conversation)
        return ids

    def encode_completion(self, text: str, *, finished: bool = True) -> list[int]:
        """The ids of an answer, uncut; with the EOS unless the answer is not `finished`."""
        ids = self._content_ids(self.template.answer(text))
        return [*ids, self.eos_id] if finished else ids

    def encode_document(self, text: str) -> list[int]:
        """The ids of a plain text between BOS (if there is one) and EOS, uncut."""
        bos = [] if self.bos_id is None else [self.bos_id]
        return [*bos, *self._content_ids(text), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens dropped."""
        kept = [int(index) for index in ids if int(index) not in self._special_ids]
        return str(
            self.tokenizer.decode(
                kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _encode(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        for segment in _merged(self.template.render(conversation)):
            found = self._segment_ids(segment)
            ids.extend(found)
            mask.extend([segment.supervised] * len(found))
        needs_bos = self.bos_id is not None and not self.template.writes_bos
        if needs_bos and ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            ids, mask = [self.bos_id, *ids], [False, *mask]
        return ids, mask

    def _segment_ids(self, segment: Segment) -> list[int]:
        if segment.ends_answer:
            return [self.eos_id]
        if segment.is_special_markup:
            return self._tokenise(segment.text, split_special=False)
        return self._content_ids(segment.text)

    def _content_ids(self, text: str) -> list[int]:
        """Ids of text that is not ours: whatever it spells, none of them is a special token."""
        ids = self._tokenise(text, split_special=True)
        if not self._is_forged(ids):
            return ids
        # Some vocabularies hold a special's spelling as an ordinary piece too: cut through it.
        spellings = self.tokenizer.convert_ids_to_tokens(sorted(self._forbidden_ids))
        spellings = sorted(spellings, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, spellings)))
        cuts = [0, *(match.start() + 1 for match in pattern.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
        ids = [index for piece in pieces for index in self._tokenise(piece, split_special=True)]
        if self._is_forged(ids):
            raise UserError(
                f"This tokenizer reads {text[:40]!r} as a special token even inside data: "
                "remove it from the text, or use another tokenizer."
            )
        return ids

    def _is_forged(self, ids: list[int]) -> bool:
        return any(index in self._forbidden_ids for index in ids)

    def _tokenise(self, text: str, *, split_special: bool) -> list[int]:
        if not text:
            return []
        encoding: Any = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special, verbose=False
        )
        return list(encoding["input_ids"])

    def _end_id(self) -> int:
        for index, token in self.tokenizer.added_tokens_decoder.items():
            if token.special and str(token) == self.template.end_token:
                return int(index)
        return int(self.tokenizer.eos_token_id)

    def _choose_pad(self) -> int:
        """PAD without touching the vocabulary, whose size the model's embedding has."""
        named = (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id)
        for index in (*named, *sorted(self._special_ids), *range(len(self.tokenizer))):
            if index is not None and index not in self.stop_ids:
                return int(index)
        raise UserError("The tokenizer has no id that could pad: all of them end an answer.")


def _merged(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbours of one kind as one segment, so that a seam is only where it has to be."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last is not None and not (last.ends_answer or segment.ends_answer):
            same_kind = last.is_special_markup == segment.is_special_markup
            if same_kind and last.supervised == segment.supervised:
                merged[-1] = replace(last, text=last.text + segment.text)
                continue
        merged.append(segment)
    return merged


def conversation_text(conversation: Conversation) -> str:
    """A conversation for a reader or a reward: one turn as it is, several with their roles."""
    if len(conversation) == 1:
        return conversation[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in conversation)


def pad_batch(
    sequences: Sequence[Sequence[int]], *, pad_id: int, side: Literal["left", "right"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, S) int64, filled with `pad_id` on `side`, and mask (B, S) bool, True on real tokens.

    S is the longest length. The mask comes from the lengths, so `pad_id` may be any id.
    """
    import torch

    if not sequences:
        raise ValueError("pad_batch got no sequences: a batch has at least one")
    if side not in ("left", "right"):
        raise ValueError(f"side {side!r} is neither 'left' nor 'right'")
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), longest), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if side == "left" else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, start : start + len(sequence)] = True
    return ids, mask
