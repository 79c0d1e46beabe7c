"""A tokenizer as the metadata of a GGUF file.

llama.cpp has its own tokenizers. Two of them compute what ours do: byte-level BPE, whose
pre-tokenizer is one of a list of names, and that of SentencePiece. Which one it is follows from
the definition in tokenizer.json alone; one that is on no list is refused, since its words would be
cut in other places. llama.cpp knows no Unicode normalisation (NFC) and, behind a control token, puts
the space of SentencePiece also where Hugging Face does at the start of a text only.
"""

import json

from runtime.exports.ends import end_of_reply, end_of_turn

REFUSED = "so a GGUF file would make other tokens of the same text; export with to-hf instead"

# The regular expressions as tokenizer.json has them. llama.cpp's own spell some of them differently.
_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
QWEN2 = rf"{_CASELESS}|\p{{N}}|{_WORDS}"
LLAMA3 = rf"{_CASELESS}|\p{{N}}{{1,3}}|{_WORDS}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CJK = "[一-龥ࠀ-一가-퟿]+"
OURS = r"[\r\n]|\p{N}|[^\S\r\n]?(?:\p{L}+|\p{P}+)"
DIGIT = r"\p{N}"

# Steps of the pre-tokenizer, and whether whole words skip the merges -> llama.cpp's name for both
KINDS = {
    ((QWEN2,), False): "qwen2",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((OURS, CJK), False): "deepseek-coder",
    (("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT), False): "deepseek-coder",
}


def write_tokenizer(writer, tokenizer, vocab_size: int) -> None:
    """Add a tokenizer to the metadata of a gguf.GGUFWriter.

    Args:
        tokenizer: of transformers; its chat template is written, too.
        vocab_size: rows of the embedding; those behind the last token are padding.

    Raises:
        ValueError: llama.cpp would make other tokens of a text; says why.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"].get("type") != "BPE":
        raise ValueError(f"a {spec['model'].get('type')} tokenizer is none that llama.cpp knows")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if spec["model"].get(key):
            raise ValueError(f"tokenizer.json: the model has a {key}, llama.cpp none; {REFUSED}")
    if is_sentencepiece(spec):
        write_sentencepiece(writer, spec, vocab_size)
    else:
        write_byte_level(writer, spec, vocab_size)
    write_special_tokens(writer, tokenizer)
    if template := tokenizer.chat_template:
        if isinstance(template, dict):  # several, by name
            named = template.items()
            template = [{"name": name, "template": text} for name, text in named]
        writer.add_chat_template(template)


def token_table(spec: dict, vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every token, by id."""
    from gguf import TokenType

    texts = {number: text for text, number in spec["model"]["vocab"].items()}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    for token in spec["added_tokens"]:
        texts[token["id"]] = token["content"]
        is_control = token["special"]
        types[token["id"]] = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
    if max(texts) >= vocab_size:
        sizes = f"{max(texts) + 1} tokens, the model has {vocab_size} embeddings"
        raise ValueError(f"the tokenizer has {sizes}: it is that of another model")
    for number in range(vocab_size):  # ids behind the last token, or between, that nothing makes
        texts.setdefault(number, f"[PAD{number}]")
        types.setdefault(number, TokenType.UNUSED)
    order = range(vocab_size)
    return [texts[number] for number in order], [int(types[number]) for number in order]


def write_byte_level(writer, spec: dict, vocab_size: int) -> None:
    """Byte-level BPE: GPT-2, Qwen, Llama 3, SmolLM, ours."""
    normalizer = spec.get("normalizer") or {"type": None}
    if normalizer["type"] not in (None, "NFC"):
        fault = f"llama.cpp has no normalizer {normalizer['type']}"
        raise ValueError(f"tokenizer.json: {fault}; {REFUSED}")
    steps, whole_words = pre_tokenizer_steps(spec), bool(spec["model"].get("ignore_merges"))
    if (kind := KINDS.get((steps, whole_words))) is None:
        words = " with ignore_merges" if whole_words else ""
        pattern = json.dumps(steps, ensure_ascii=False)
        fault = f"llama.cpp has no pre-tokenizer {pattern}{words}"
        raise ValueError(f"tokenizer.json: {fault}, {REFUSED}")
    texts, types = token_table(spec, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    merges = spec["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])


def pre_tokenizer_steps(spec: dict) -> tuple[str, ...]:
    """The regular expressions that cut a text into words, one after the other.

    Raises:
        ValueError: a step of another kind, or no byte-level one at the end.
    """
    steps, final = spec.get("pre_tokenizer") or {}, {}
    patterns = []
    for step in steps.get("pretokenizers", [steps] if steps else []):
        pattern, final = None, step
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = step["pattern"].get("Regex")
        elif step["type"] == "Digits" and step["individual_digits"]:
            pattern = DIGIT
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            if not step["use_regex"]:
                continue
            pattern = GPT2
        if pattern is None:
            name = json.dumps(step, ensure_ascii=False)
            fault = f"llama.cpp has no step {name} in its pre-tokenizers"
            raise ValueError(f"tokenizer.json: {fault}, {REFUSED}")
        patterns.append(pattern)
    if final.get("type") != "ByteLevel":
        fault = "it is neither a byte-level BPE nor one of SentencePiece"
        raise ValueError(f"tokenizer.json: {fault}, {REFUSED}")
    return tuple(patterns)


SPACE = "▁"


def is_sentencepiece(spec: dict) -> bool:
    """Whether spaces are written as ▁ and unknown characters as bytes: Llama 2, TinyLlama, Mistral."""
    return bool(spec["model"].get("byte_fallback")) and "<0x0A>" in spec["model"]["vocab"]


def write_sentencepiece(writer, spec: dict, vocab_size: int) -> None:
    """The tokenizer model `llama`: it merges what makes the token of the highest score."""
    from gguf import TokenType

    texts, types = token_table(spec, vocab_size)
    scores = [0.0] * vocab_size
    for number, score in merge_scores(spec, types).items():
        scores[number] = score
    vocab, unknown = spec["model"]["vocab"], spec["model"].get("unk_token")
    for byte in range(256):
        if (number := vocab.get(f"<0x{byte:02X}>")) is None:
            raise ValueError(f"tokenizer.json: has no token for the byte {byte}, {REFUSED}")
        types[number] = int(TokenType.BYTE)
    if unknown in vocab:
        types[vocab[unknown]] = int(TokenType.UNKNOWN)
    user_defined = int(TokenType.USER_DEFINED)  # which llama.cpp looks for in the text as it is
    pairs = zip(texts, types, strict=True)
    texts = [t.replace(SPACE, " ") if kind == user_defined else t for t, kind in pairs]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(has_space_prefix(spec))


def has_space_prefix(spec: dict) -> bool:
    """Whether a text gets a space in front.

    Raises:
        ValueError: something else is done to spaces than SentencePiece does.
    """
    normalizer, words = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if words is None and steps == [{"type": "Prepend", "prepend": SPACE}, replace]:
        return True
    if words is None and steps == [replace]:
        return False
    if not steps and words and words["type"] == "Metaspace" and not words.get("split", True):
        return words["prepend_scheme"] != "never"
    found = json.dumps([normalizer, words], ensure_ascii=False)
    fault = f"llama.cpp does something else to spaces than {found}"
    raise ValueError(f"tokenizer.json: {fault}, {REFUSED}")


def merge_scores(spec: dict, types: list[int]) -> dict[int, float]:
    """Scores by which SentencePiece's merging does what the list of merges does.

    SentencePiece merges any two neighbours whose text is a token, the token of the highest score
    first. The list says the same if it has every way to make a token, ordered by the token.

    Returns:
        Id of a token that is merged -> minus its place in the order.

    Raises:
        ValueError: the list says something else, as that of a BPE trained elsewhere does.
    """
    from gguf import TokenType

    vocab = spec["model"]["vocab"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in spec["model"]["merges"]]
    order: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        order.setdefault(left + right, rank)
    listed, in_order = set(merges), [order[left + right] for left, right in merges]
    fault = "" if in_order == sorted(in_order) else "its merges are not ordered by token"
    for text, number in vocab.items():
        if types[number] != TokenType.NORMAL or fault:
            continue
        cuts = ((text[:n], text[n:]) for n in range(1, len(text)))
        possible = {cut for cut in cuts if cut[0] in vocab and cut[1] in vocab}
        if missing := sorted(possible - listed):
            fault = f"its merges lack {' + '.join(missing[0])}, as SentencePiece's never do"
    if fault:
        raise ValueError(f"tokenizer.json: {fault}, {REFUSED}")
    return {vocab[text]: float(-rank) for text, rank in order.items()}


def text_ends(tokenizer) -> tuple[int | None, int | None]:
    """The tokens that encoding puts before and behind a text.

    Raises:
        ValueError: more than one token on a side, which llama.cpp does not do.
    """
    backend = tokenizer.backend_tokenizer
    marked = backend.encode("a", add_special_tokens=True).ids
    bare = backend.encode("a", add_special_tokens=False).ids
    cut = next(n for n in range(len(marked)) if marked[n:][: len(bare)] == bare)
    before, behind = marked[:cut], marked[cut + len(bare) :]
    if len(before) > 1 or len(behind) > 1:
        fault = f"it puts the tokens {before} before a text and {behind} behind"
        raise ValueError(f"tokenizer.json: {fault}, llama.cpp at most one each")
    return before[0] if before else None, behind[0] if behind else None


def write_special_tokens(writer, tokenizer) -> None:
    """Beginning and end of a text or turn, and which of them llama.cpp writes by itself."""
    before, behind = text_ends(tokenizer)
    turn = end_of_turn(tokenizer)
    eos = end_of_reply(tokenizer, behind, tokenizer.eos_token_id)
    bos = next(n for n in (before, tokenizer.bos_token_id, eos) if n is not None)
    writer.add_bos_token_id(bos)  # without one llama.cpp would take the token 11
    writer.add_eos_token_id(eos)
    if turn not in (None, eos):
        writer.add_eot_token_id(turn)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(before is not None)
    writer.add_add_eos_token(behind is not None)
