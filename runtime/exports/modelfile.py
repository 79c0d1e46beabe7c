"""A Modelfile for Ollama: the chat template in its own language, the end of a turn, the context.

Ollama's templates are Go's. This one is found as data, whatever the Jinja template looks like:
conversations with marks in place of the texts are rendered, and what stands between the marks is
the layout.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from dataset.template_manner import Template
from runtime.exports.ends import end_of_turn
from runtime.exports.gguf_tokenizer import text_ends
from runtime.saving.store import save_file

MARKS = {"system": "QsystemQ", "user": "QuserQ", "assistant": "QassistantQ"}


@dataclass(frozen=True)
class ChatLayout:
    """The fixed texts of a conversation, by what stands on either side."""

    first_user: str  # from the start to the user's text, without a system turn
    system: str | None  # from the start to the system's text; None: the template has no such turn
    system_user: str | None
    user_assistant: str  # in a turn that was answered
    assistant_user: str
    reply: str  # behind the last user's text: here the model speaks

    def render(self, messages: list[dict]) -> str:
        """What `to_go` makes of a conversation that ends with a user's turn."""
        text, before = "", None
        for message in messages:
            fixed = {
                (None, "system"): self.system,
                (None, "user"): self.first_user,
                ("system", "user"): self.system_user,
                ("user", "assistant"): self.user_assistant,
                ("assistant", "user"): self.assistant_user,
            }[before, message["role"]]
            text += f"{fixed}{message['content']}"
            before = message["role"]
        return text + self.reply

    def to_go(self) -> str:
        """The same as a template of Ollama's."""
        users = [f'{{{{- if eq $before "assistant" }}}}{quote(self.assistant_user)}']
        system = ""
        if self.system is not None:
            users.append(f'{{{{- else if eq $before "system" }}}}{quote(self.system_user)}')
            system = f'{{{{- if eq .Role "system" }}}}{quote(self.system)}{{{{ .Content }}}}\n'
        users.append(f"{{{{- else }}}}{quote(self.first_user)}{{{{- end }}}}{{{{ .Content }}}}")
        branch = "else if" if system else "if"
        return (
            '{{- $before := "" }}\n{{- range .Messages }}\n'
            f'{system}{{{{- {branch} eq .Role "user" }}}}\n'
            + "\n".join(users)
            + '\n{{- else if eq .Role "assistant" }}'
            f"{quote(self.user_assistant)}{{{{ .Content }}}}\n"
            "{{- end }}\n{{- $before = .Role }}\n{{- end }}"
            f"{quote(self.reply)}"
        )


def quote(text: str | None) -> str:
    """A text that a Go template writes as it is, spaces and line breaks, too."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""


def chat_layout(tokenizer) -> ChatLayout:
    """Find the layout of a tokenizer's chat template.

    Raises:
        ValueError: the template does more than put fixed texts around each turn.
    """

    def turns(*roles: str) -> list[dict]:
        return [{"role": role, "content": MARKS[role]} for role in roles]

    def render(messages: list[dict]) -> str:
        return template.render(messages, add_generation_prompt=True).removeprefix(bos)

    own = tokenizer.chat_template
    source = own if isinstance(own, str) else own.get("default", "")
    template = Template(source, "the tokenizer", dict(tokenizer.special_tokens_map))
    bos = text_ends(tokenizer)[0]  # which llama.cpp writes by itself
    bos = "" if bos is None else tokenizer.convert_ids_to_tokens(bos)
    talk = ("user", "assistant", "user")
    first, between, behind, reply = cut(render(turns(*talk)), talk)
    try:
        system, system_user, *_ = cut(render(turns("system", *talk)), ("system", *talk))
    except Exception:  # the template's own refusal, of whatever class
        system = system_user = None
    layout = ChatLayout(first, system, system_user, between, behind, reply)
    conversations = [talk[:1], (*talk, *talk[1:])]
    if system is not None:
        conversations += [("system", "user"), ("system", *talk, *talk[1:])]
    for roles in conversations:
        if layout.render(turns(*roles)) != render(turns(*roles)):
            raise ValueError(f"the chat template lays out {', '.join(roles)} in another way")
    return layout


def cut(text: str, roles: tuple[str, ...]) -> list[str]:
    """What stands around the marks of these roles in a rendered conversation."""
    parts = []
    for role in roles:
        part, mark, text = text.partition(MARKS[role])
        if not mark:
            raise ValueError(f"the chat template drops the {role}'s text")
        parts.append(part)
    return [*parts, text]


def write_modelfile(tokenizer, context: int, gguf_path: Path) -> Path | None:
    """Write NAME.Modelfile beside NAME.gguf: `ollama create NAME -f NAME.Modelfile` takes both.

    Args:
        tokenizer: of transformers, with its chat template.
        context: tokens that the model sees.

    Returns:
        The file. Without TEMPLATE where Ollama's language cannot say it: it then looks for one that
        it knows in the GGUF file.
    """
    lines = [f"FROM ./{gguf_path.name}"]
    if tokenizer.chat_template:
        try:
            template = chat_layout(tokenizer).to_go()
            lines.append(f'TEMPLATE """{template}"""')
        except ValueError as error:
            lines.append(f"# No TEMPLATE: {error}")
    if (end := end_of_turn(tokenizer)) is not None:
        text = tokenizer.convert_ids_to_tokens(end)
        lines.append(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}")
    lines.append(f"PARAMETER num_ctx {context}")
    path = gguf_path.with_suffix(".Modelfile")
    save_file(path, "\n".join(lines) + "\n")
    return path
