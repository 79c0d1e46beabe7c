"""The reference answer of a prompt whose row goes on: what its last turn, the assistant's, says."""

from dataset.chat_format import ChatCoder
from dataset.replies import final_answer


def reference_answer(coder: ChatCoder, messages: list[dict], tools: list[dict] | None) -> str:
    """The last turn without its thinking, stripped."""
    return final_answer(said(coder, messages, tools))


def said(coder: ChatCoder, messages: list[dict], tools: list[dict] | None = None) -> str:
    """The last turn, an assistant's, as `decode_reply` gives it, without its thinking."""
    last = {name: v for name, v in messages[-1].items() if name != "reasoning_content"}
    if not last.get("tool_calls"):
        return last["content"]
    chat = [*messages[:-1], {**last, "loss": True}]
    ids, mask = coder.encode_chats([(chat, tools)], "last")[0]
    return coder.decode_reply([token for token, said in zip(ids, mask, strict=True) if said])
