"""Our own chat template, ChatML, by its hash, and what is in it.

    <|im_start|>user
    How warm is it?<|im_end|>
    <|im_start|>assistant
    21 degrees.<|im_end|>

What the assistant says is learned, and the <|im_end|> behind it, with which the model stops.
"""

import hashlib

# Of model/minimind_tokenizer/chat_template.jinja: what writes it directly writes what that does.
TEMPLATE_SHA256 = "48fd4502b71457af7c0da9b3d7c2b5b5a230b7856feaa4b571a7303771cb62df"
START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
SAMPLE = [{"role": role, "content": f"a\n {role}"} for role in ROLES]


def is_ours(template: object) -> bool:
    """Whether a tokenizer's chat template is ours."""
    is_text = isinstance(template, str)
    return is_text and hashlib.sha256(template.encode()).hexdigest() == TEMPLATE_SHA256
