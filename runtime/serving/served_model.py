"""A model that is served: its names, its engine, and how it spells requests."""

import json
import time
from dataclasses import dataclass, field

from dataset.pretrain_dataset import end_of_text
from runtime.chat_model import ChatModel
from runtime.serving.api_error import APIError
from runtime.serving.call_form import CallForm, learn_call_form
from runtime.serving.constraints import GrammarConstraint, Grammars
from runtime.serving.engine import Engine
from runtime.serving.parameters import Parameters


@dataclass(frozen=True)
class Prompt:
    """What an engine is to go on with.

    opening: what the prompt says already of the reply. form: of calls in it; None: it has none.
    """

    ids: list[int]
    opening: str = ""
    form: CallForm | None = None


@dataclass
class ServedModel:
    """A model with its engine under the name that requests call it by."""

    name: str
    chat: ChatModel
    engine: Engine
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.coder, self.context = self.chat.coder, self.engine.context
        self.tokenizer = self.coder.tokenizer
        self.vocab_size = self.chat.model.config.vocab_size
        self.parameters = sum(p.numel() for p in self.chat.model.parameters())
        self.call_form = learn_call_form(self.coder)
        self.grammars = Grammars(self.coder, self.vocab_size)
        self.end_of_text = end_of_text(self.tokenizer)
        user = [{"role": "user", "content": "q"}]
        on, off = (self.coder.prompt_text(user, None, thinking) for thinking in (True, False))
        self.can_think = on != off
        decoder = json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"]
        self.is_byte_level = '"ByteLevel"' in json.dumps(decoder)
        self._bytes: dict[int, bytes] = {}

    def card(self) -> dict:
        """The entry of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "local",
            "context_length": self.context,
            "thinking": self.can_think,
            "parameters": self.parameters,
        }

    # ----------------------------------------------------------------------------------------------
    # Prompts
    # ----------------------------------------------------------------------------------------------

    def prompts(self, wanted: Parameters) -> list[Prompt]:
        """The prompts of a request.

        Raises:
            APIError: the chat template refuses the conversation; a prompt leaves no room to reply.
        """
        if wanted.is_chat:
            prompts = [self._chat_prompt(wanted)]
        else:
            prompts = [Prompt(self._plain_ids(prompt)) for prompt in wanted.prompts]
        for prompt in prompts:
            if len(prompt.ids) >= self.context:
                field = "messages" if wanted.is_chat else "prompt"
                raise self._too_long(field, f"{len(prompt.ids)} tokens")
        return prompts

    def _too_long(self, field: str, size: str) -> APIError:
        fault = f"{field}: {size}, the context of {self.name} is {self.context}: shorten it"
        return APIError(fault, field, "context_length_exceeded")

    def _chat_prompt(self, wanted: Parameters) -> Prompt:
        thinking = self.chat.thinking if wanted.thinking is None else wanted.thinking
        if len(wanted.messages) >= self.context:  # before a template works on them for long
            raise self._too_long("messages", f"{len(wanted.messages)} messages")
        try:
            text = self.coder.prompt_text(wanted.messages, wanted.tools, thinking)
        except ValueError as error:
            field = "tools" if "leaves tools out" in str(error) else "messages"
            raise APIError(f"{field}: {error}", field) from None
        form = self.call_form if wanted.tools else None
        return Prompt(self._encode(text), self.coder.opening(thinking), form)

    def _plain_ids(self, prompt: str | list[int]) -> list[int]:
        ids = self._encode(prompt) if isinstance(prompt, str) else prompt
        return ids or [self.end_of_text]  # a text begins behind the end of another one

    def _encode(self, text: str) -> list[int]:
        # As a batch: other than for a single text, all threads go on meanwhile.
        return self.coder.plain.batch([text])[0]

    def check_bias(self, wanted: Parameters) -> None:
        """Refuse a bias on a token that is none."""
        for token in wanted.sampling.logit_bias:
            if token >= self.vocab_size:
                fault = f"logit_bias: {self.name} has no token {token}, only {self.vocab_size}"
                raise APIError(fault, "logit_bias")

    def constraints(self, wanted: Parameters, prompt: Prompt) -> list[GrammarConstraint | None]:
        """What constrains the n replies to a prompt.

        Raises:
            APIError: a schema that is none; llguidance is missing.
        """
        if wanted.schema is not None:
            first = self.grammars.json(wanted.schema, prompt.opening)
        elif tools := wanted.forced_tools:
            first = self.grammars.calls(tools, self.call_form, prompt.opening)
        else:
            return [None] * wanted.n
        return [first, *(first.copy() for _ in range(wanted.n - 1))]

    # ----------------------------------------------------------------------------------------------
    # Replies
    # ----------------------------------------------------------------------------------------------

    def ends(self, wanted: Parameters) -> frozenset[int]:
        """The tokens that end a reply."""
        more = [] if wanted.is_chat else [self.end_of_text]
        if self.call_form and wanted.tools:
            more.append(self.call_form.stop)
        return frozenset([*self.coder.ends, *more])

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        if token not in self._bytes:
            self._bytes[token] = self._token_bytes(token)
        return self._bytes[token]

    def _token_bytes(self, token: int) -> bytes:
        text = self.tokenizer.convert_ids_to_tokens(token) or ""
        if token in self.coder.control_ids:
            return text.encode()
        if self.is_byte_level:
            return bytes(BYTES.get(char, 0x3F) for char in text)
        if len(text) == 6 and text.startswith("<0x"):
            return bytes([int(text[3:5], 16)])
        return text.replace("\u2581", " ").encode()


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in the tokens of a byte-level BPE -> the byte.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.2.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(others)}


BYTES = byte_alphabet()
