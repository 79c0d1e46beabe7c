"""Small tokenizers of the kinds that public models have, trained on the project's own pages."""

import functools
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README_zh.md", "model/lm.py", "docs/en/walk.md", "docs/zh/walk.md")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a toy.<|im_end|>\n' }}{% endif %}" + CHATML
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set turns = messages %}{% endif %}{% for m in turns %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)

_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
CHATML_TOKENS = {"pad": "<|endoftext|>", "bos": "<|im_start|>", "eos": "<|im_end|>"}
LLAMA3_TOKENS = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "pad": "<|end_of_text|>"}


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def words(kind: str) -> list[pre_tokenizers.PreTokenizer]:
    """What cuts a text into words, before the bytes are spelled as characters."""
    if kind == "qwen2":
        return [split(rf"{_CASELESS}|\p{{N}}|{_WORDS}")]
    if kind == "llama3":
        return [split(rf"{_CASELESS}|\p{{N}}{{1,3}}|{_WORDS}")]
    return [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []


@functools.cache
def pages() -> list[str]:
    """Their texts, without what spells control tokens: some of these are known to llama.cpp."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in PAGES]
    return [text.replace("<|", " ").replace("|>", " ") for text in texts]


def byte_level(folder: Path, kind: str, vocab_size: int = 1000) -> int:
    """Save a byte-level BPE of kind qwen2, llama3, smollm or gpt2; returns its size."""
    tokenizer = Tokenizer(BPE(ignore_merges=kind == "llama3"))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    regex = kind in ("smollm", "gpt2")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    steps = words(kind)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pages(), trainer)
    if kind == "llama3":
        extra = ["<|start_header_id|>", "<|end_header_id|>"]
        return save(tokenizer, folder, LLAMA3_TOKENS, HEADERS, extra, writes_bos=True)
    template = WITH_DEFAULT if kind == "smollm" else CHATML
    return save(tokenizer, folder, CHATML_TOKENS, template, [])


def merged_pieces(texts: list[str], vocab_size: int) -> Tokenizer:
    """A BPE with ▁ and bytes, ordered as SentencePiece's; what writes the ▁ is still missing."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(texts, BpeTrainer(vocab_size=vocab_size, show_progress=False))
    learned = trained.get_vocab()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merged = sorted((t for t in learned if len(t) > 1), key=learned.get)
    pieces += [*merged, *sorted(t for t in learned if len(t) == 1)]
    vocab = {text: number for number, text in enumerate(pieces)}
    cuts = [(text[:n], text[n:]) for text in merged for n in range(1, len(text))]
    merges = [(a, b) for a, b in cuts if a in vocab and b in vocab]
    options = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    return Tokenizer(BPE(vocab, merges, **options))


def sentencepiece(folder: Path, kind: str, vocab_size: int = 1000) -> int:
    """Save a BPE with ▁ and bytes, as converters make it of SentencePiece's; returns its size.

    kind: "llama2" (a normalizer puts the space in front), or "metaspace" (the pre-tokenizer).
    """
    tokenizer = merged_pieces(pages(), vocab_size)
    if kind == "llama2":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokens = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
    return save(tokenizer, folder, tokens, BRACKETS, [], writes_bos=True)


def save(tokenizer, folder: Path, tokens: dict, template: str, extra, writes_bos=False) -> int:
    """Add control tokens and a chat template, and write what a folder of a public model has."""
    tokenizer.add_special_tokens([*tokens.values(), *extra])
    if writes_bos:
        bos = tokens["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    named = {f"{name}_token": text for name, text in tokens.items()}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return len(fast)
