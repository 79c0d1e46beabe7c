"""Constrained decoding: replies that are JSON of a schema, or the call of a function.

What may come next is worked out by llguidance, an optional package.
"""

import functools
import json

import torch
from torch import Tensor

from dataset.chat_format import ChatCoder
from dataset.replies import END_THINK
from runtime.serving.api_error import APIError
from runtime.serving.call_form import CallForm

# JSON on one line, as json.dumps writes it: a model could else go on with blanks forever.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarConstraint:
    """A `Constraint`: what a grammar allows, from where the thinking has ended.

    Args:
        matcher: an LLMatcher at the beginning of its grammar.
        vocab_size: of the model.
        ends: ids that end a reply.
        end_think: the token that ends the thinking; None: the reply begins at once.
    """

    def __init__(self, matcher, vocab_size: int, ends: list[int], end_think: int | None):
        self.matcher, self.end_think = matcher, end_think
        self.vocab_size, self.ends, self.error = vocab_size, ends, ""

    def copy(self) -> "GrammarConstraint":
        """Another one at the same place."""
        matcher = self.matcher.deep_copy()
        return GrammarConstraint(matcher, self.vocab_size, self.ends, self.end_think)

    @functools.cached_property
    def at_end(self) -> Tensor:
        """The tokens that may come where the reply is complete."""
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[self.ends] = True
        return mask

    def allowed(self) -> Tensor:
        if self.end_think is not None:
            return ~self.at_end
        if self.check() or self.matcher.is_stopped():
            return self.at_end
        mask = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        if not mask.any() and not self.matcher.is_accepting():
            self.error = "nothing may follow"
        if self.check() or not mask.any():
            return self.at_end
        return mask | self.at_end if self.matcher.is_accepting() else mask

    def check(self) -> str:
        """What went wrong in the matcher: too much work, say. "": nothing."""
        if self.matcher.is_error():
            self.error = self.matcher.get_error().splitlines()[0][:300] or "it has failed"
        return self.error

    def advance(self, token: int) -> None:
        if self.end_think is None:
            self.matcher.consume_token(token)
        elif token == self.end_think:
            self.end_think = None


class Grammars:
    """Makes the constraints of a model."""

    def __init__(self, coder: ChatCoder, vocab_size: int):
        self.coder, self.vocab_size, self._tokenizer = coder, vocab_size, None

    def constraint(self, grammar: str, opening: str, param: str) -> GrammarConstraint:
        """The constraint of a grammar in llguidance's Lark.

        Args:
            grammar: of what stands behind `start: `.
            opening: what the prompt says already of the reply.
            param: the field that asked for it.

        Raises:
            APIError: llguidance is missing; or the grammar, a schema that is none.
        """
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            fault = "constrained decoding needs llguidance on the server: pip install llguidance"
            raise APIError(fault, param, "unsupported_parameter") from None
        if self._tokenizer is None:
            spec = without_names(self.coder.tokenizer.backend_tokenizer.to_str())
            self._tokenizer = LLTokenizer(
                spec, n_vocab=self.vocab_size, eos_token=list(self.coder.ends)
            )
        end_think = None
        if opening:
            end_think = self.coder.plain.ids.get(END_THINK)
            if end_think is None:
                fault = "the thinking of this model ends with no single token: switch it off"
                raise APIError(f"{param}: {fault}", param)
            grammar = f'"\\n\\n" {grammar}'
        matcher = LLMatcher(
            self._tokenizer, LLMatcher.grammar_from_lark(f"start: {grammar}"), log_level=0
        )
        ends = list(self.coder.ends)
        probe = GrammarConstraint(matcher.deep_copy(), self.vocab_size, ends, None)
        probe.allowed()  # a grammar that never ends is found here
        if probe.error:
            raise APIError(f"{param}: {probe.error}", param, "invalid_json_schema")
        return GrammarConstraint(matcher, self.vocab_size, ends, end_think)

    def json(self, schema: dict, opening: str) -> GrammarConstraint:
        """A reply that is JSON of a schema."""
        return self.constraint(f"json\njson: {_json(schema)}\n", opening, "response_format")

    def calls(self, tools: list[dict], form: CallForm | None, opening: str) -> GrammarConstraint:
        """A reply that calls one of these functions."""
        if form is None:
            fault = "this model's chat template has no calls in JSON: only auto and none are had"
            raise APIError(f"tool_choice: {fault}", "tool_choice", "unsupported_parameter")
        names, rules = [], []
        for n, tool in enumerate(tools):
            function = tool["function"]
            head = f'{{"name": {json.dumps(function["name"])}, "{form.key}": '
            schema = {"type": "object", **function.get("parameters", {})}
            if schema["type"] != "object":
                field = f"tools[{n}].function.parameters.type"
                raise APIError(f"{field}: must be object, for a forced call", field)
            names.append(f"call_{n}")
            rules.append(f'call_{n}: {json.dumps(head)} arguments_{n} "}}"\n')
            rules.append(f"arguments_{n}: {_json(schema)}\n")
        begin, end = self._mark(form.begin), self._mark(form.end)
        gaps = [json.dumps(gap) if gap else "" for gap in (form.gap, form.end_gap)]
        grammar = f"{begin} {gaps[0]} call {gaps[1]} {end}\ncall: {' | '.join(names)}\n"
        return self.constraint(grammar + "".join(rules), opening, "tools")

    def _mark(self, text: str) -> str:
        """A mark in Lark: a token, by its id, where it is one."""
        number = self.coder.plain.ids.get(text)
        if number is not None:
            return f"<[{number}]>"
        return json.dumps(text) if text else ""


def without_names(spec: str) -> str:
    """A tokenizer.json in which no text spells a control token: what a schema says stays text."""
    tokenizer = json.loads(spec)
    vocab = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        name = f"\ue000{token['id']}\ue001"
        if token["content"] in vocab:
            vocab[name] = vocab.pop(token["content"])
        token |= {"content": name, "special": True}
    return json.dumps(tokenizer)


def _json(schema: dict) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": STYLE})
