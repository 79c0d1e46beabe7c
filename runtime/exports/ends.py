"""The tokens that begin and end what a model writes."""


def end_of_turn(tokenizer) -> int | None:
    """The id of the token that ends a turn of the chat template.

    None: there is no template, or none with such a token; weights can be exported all the same.
    """
    from dataset.chat_format import ChatCoder

    try:
        return ChatCoder(tokenizer).end_of_turn
    except ValueError:
        return None


def end_of_reply(tokenizer, *others: int | None) -> int:
    """The id of the token that ends what a model writes: a turn, or where there is none a text.

    Args:
        others: ids that say it better, where they are not None.

    Raises:
        ValueError: there is none.
    """
    from dataset.pretrain_dataset import end_of_text

    ends = (*others, end_of_turn(tokenizer), end_of_text(tokenizer), tokenizer.pad_token_id)
    end = next((number for number in ends if number is not None), None)
    if end is None:
        raise ValueError("the tokenizer has no token that ends a text: give it an eos_token")
    return end
