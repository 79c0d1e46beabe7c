"""The replies to one request: what was submitted for it, and what has come of each."""

import dataclasses
import json
import secrets
import time

from runtime.serving.api_error import APIError, shutting_down, timed_out
from runtime.serving.engine import Generation, Output, QueueFull, Request
from runtime.serving.mailbox import Inbox
from runtime.serving.parameters import Parameters
from runtime.serving.reply_parts import Part, ReplyParts
from runtime.serving.reply_text import StopStrings, TextDecoder
from runtime.serving.sampling import NewToken
from runtime.serving.served_model import Prompt, ServedModel

LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Reply:
    """One choice.

    Attributes:
        tokens: that it took, those of a stop string included.
        finish_reason: None while it goes on.
        logprobs: entries of tokens that were not taken yet, with include_logprobs.
        error: of the engine.
    """

    def __init__(self, model: ServedModel, wanted: Parameters, prompt: Prompt):
        self.model, self.wanted = model, wanted
        self.decoder = TextDecoder(model.chat.decode)
        self.stop = StopStrings(wanted.stop)
        self.parts = None
        if wanted.is_chat:
            names = frozenset(tool["function"]["name"] for tool in wanted.tools or ())
            is_single = not wanted.parallel_tool_calls
            self.parts = ReplyParts(bool(prompt.opening), prompt.form, names, is_single)
        # Where a token may end the reply, it counts which one does.
        self.by_token = wanted.sampling.top_logprobs is not None or wanted.is_watched
        self.tokens, self.finish_reason, self.error = 0, None, ""
        self.include_logprobs = wanted.sampling.top_logprobs is not None
        self.logprobs: list[dict] = []
        self.offset = 0  # characters shown, for the offsets of /v1/completions

    def take(self, output: Output) -> list[Part]:
        """The parts that an output adds. What comes behind the end is left out."""
        if self.finish_reason is not None:
            return []
        parts = self._add(output.tokens)
        if self.finish_reason is None and output.finish_reason is not None:
            self.error = output.error
            parts += self._end(output.finish_reason)
        return parts

    def _add(self, tokens: list[NewToken]) -> list[Part]:
        if not self.by_token:
            self.tokens += len(tokens)
            return self._show(self.decoder.add([token.id for token in tokens]))
        parts = []
        for token in tokens:
            if self.finish_reason is not None:
                break
            self.tokens += 1
            text = self.decoder.add([token.id])
            if self.include_logprobs:
                self.logprobs.append(self._logprob(token))
                self.offset += len(text)
            parts += self._show(self.stop.add(text))
            if self.stop.found:
                return parts + self._end("stop")
        return parts

    def _show(self, text: str) -> list[Part]:
        if self.parts is None:
            return [Part("content", text)] if text else []
        parts = self.parts.add(text) if text else []
        if not self.wanted.parallel_tool_calls and self.parts.ended_calls:
            parts += self._end("stop")
        return parts

    def _end(self, reason: str) -> list[Part]:
        if self.finish_reason is not None:
            return []
        self.finish_reason = reason
        rest = "" if self.stop.found else self.stop.add(self.decoder.end()) + self.stop.end()
        parts = [Part("content", rest)] if rest and self.parts is None else []
        if self.parts is not None:
            parts = self.parts.add(rest, is_last=True)
            if reason == "stop" and self.parts.calls:
                self.finish_reason = "tool_calls"
        return parts

    def take_end(self) -> list[Part]:
        """End it here; returns the parts that have waited."""
        return self._end("cancelled")

    def _logprob(self, token: NewToken) -> dict:
        top = [self._token(number, logprob) for number, logprob in token.top]
        entry = self._token(token.id, token.logprob)
        return {**entry, "top_logprobs": top} | ({} if self.parts else {"offset": self.offset})

    def _token(self, number: int, logprob: float) -> dict:
        data = self.model.token_bytes(number)
        shown = data.decode("utf-8", "replace")
        return {"token": shown, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    def take_logprobs(self) -> dict | None:
        """The log-probabilities since the last time, in the form of the endpoint."""
        if not self.include_logprobs:
            return None
        entries, self.logprobs = self.logprobs, []
        if self.parts is not None:
            return {"content": entries, "refusal": None}
        tops = [{t["token"]: t["logprob"] for t in entry["top_logprobs"]} for entry in entries]
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": tops if self.wanted.sampling.top_logprobs else None,
            "text_offset": [entry["offset"] for entry in entries],
        }


class Replies:
    """All choices of a request.

    Attributes:
        id, created: of the answer.
        cause: why all was ended before its time: "gone", "timeout", "shutdown"; "" while it goes on.
    """

    def __init__(self, model: ServedModel, wanted: Parameters, inbox: Inbox):
        self.model, self.wanted, self.inbox = model, wanted, inbox
        self.id = ("chatcmpl-" if wanted.is_chat else "cmpl-") + secrets.token_hex(12)
        self.created, self.started = int(time.time()), time.monotonic()
        self.first_token: float | None = None
        self.cause = ""
        self.prompts: list[Prompt] = []
        self.choices: list[Reply] = []
        self.generations: list[Generation] = []

    def submit(self, prompts: list[Prompt], constraints: list) -> None:
        """Ask the engine for every choice: n for each prompt.

        Raises:
            QueueFull: too many wait already; none is left behind.
        """
        self.prompts, engine, wanted = prompts, self.model.engine, self.wanted
        ends = self.model.ends(wanted)
        try:
            for prompt in prompts:
                room = engine.context - len(prompt.ids)
                limit = min(room, wanted.max_tokens or room)
                for n in range(wanted.n):
                    seed = wanted.sampling.seed
                    seed = None if seed is None else seed + n
                    sampling = dataclasses.replace(wanted.sampling, seed=seed)
                    deliver = self.inbox.deliver(len(self.choices))
                    constraint = constraints[len(self.choices)]
                    request = Request(prompt.ids, limit, ends, sampling, deliver, constraint)
                    self.generations.append(engine.submit(request))
                    self.choices.append(Reply(self.model, wanted, prompt))
        except QueueFull:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Free the slots of what still runs."""
        for generation in self.generations:
            if not generation.finished:
                self.model.engine.cancel(generation)

    def end(self, cause: str) -> None:
        """End all that runs; whoever waits for it is woken."""
        if not self.cause:
            self.cause = cause
            self.cancel()
            self.inbox.event.set()

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    async def next_parts(self) -> list[tuple[int, list[Part]]]:
        """Wait for something new: (number of a choice, its new parts) of those that have any.

        A choice that is at its end stands there, too, if without parts.
        """
        await self.inbox.event.wait()
        news: dict[int, list[Part]] = {}
        for number, output in self.inbox.take_by_choice():
            choice = self.choices[number]
            if choice.finish_reason is not None:
                continue
            news[number] = choice.take(output)
            if choice.finish_reason is not None and output.finish_reason is None:
                self.model.engine.cancel(self.generations[number])  # it has reached a stop string
        if news and self.first_token is None:
            self.first_token = time.monotonic() - self.started
        return list(news.items())

    def usage(self) -> dict:
        """What was read and written, in tokens. A prompt counts once, whatever n is."""
        prompt = sum(len(prompt.ids) for prompt in self.prompts)
        cached = sum(generation.cached_tokens for generation in self.generations[:: self.wanted.n])
        written = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def error(self) -> APIError | None:
        """What ended the request before its time; None: nothing did."""
        if self.cause == "timeout":
            return timed_out()
        if self.cause == "shutdown":
            return shutting_down()
        failed = next((choice for choice in self.choices if choice.error), None)
        if failed is None:
            return None
        if failed.finish_reason == "refused":
            fault = f"the grammar of response_format or tools: {failed.error}"
            return APIError(fault, code="invalid_json_schema")
        return APIError(f"the server failed: {failed.error}", status=500)


def dump(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
