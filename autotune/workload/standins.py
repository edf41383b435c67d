"""Stand-ins for the parts of a pipeline that have no weights: tokenizers and image processors.

A trace needs how many tokens and pixels they hand on, not which.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from autotune.workload.arguments import PROMPT

CLIP_PIXELS = 224
"""Side of the images that CLIP's vision towers look at, where nothing says otherwise."""

PROCESSOR_TOKENS = 512
"""Limit of a processor's own tokenizer."""

_TOKENS = re.compile(r"<\|?\w+\|?>|\w+|[^\w\s]|\n")


class StandInTokenizer:
    """Answers as transformers' tokenizers do, with one token for each word and mark.

    Args:
        limit: The most tokens that it gives to a text encoder.
    """

    pad_token_id, bos_token_id, eos_token_id, unk_token_id = 0, 1, 2, 0
    pad_token, bos_token, eos_token, unk_token = "<pad>", "<s>", "</s>", "<unk>"
    padding_side = "right"
    added_tokens_encoder: dict[str, int] = {}
    vocab_size = 1

    def __init__(self, limit: int) -> None:
        self.model_max_length = limit

    def __call__(
        self,
        text: Any = None,
        *_: Any,
        padding: Any = False,
        max_length: int | None = None,
        truncation: Any = False,
        return_tensors: Any = None,
        **__: Any,
    ) -> Any:
        """One row of ids for each text; ``padding="max_length"`` decides their number.

        The mask lets a text's own tokens through, and not the padding: pipelines cut by it.
        """
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else list(text)
        limit = self.model_max_length if max_length is None else max_length
        lengths = [len(self.encode(t)) for t in texts]
        tokens = limit if padding == "max_length" else max(lengths)
        if truncation:
            tokens = min(tokens, limit)
        places = torch.arange(tokens)
        if self.padding_side == "left":
            places = places.flip(0)
        ids = torch.ones(len(texts), tokens, dtype=torch.long)
        mask = torch.stack([places < length for length in lengths]).long()
        if return_tensors is None:
            return BatchEncoding({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def encode(self, text: Any, **_: Any) -> list[int]:
        """The ids of one text."""
        return [1] * max(1, len(self.tokenize(text)))

    def tokenize(self, text: Any, **_: Any) -> list[str]:
        """The tokens of one text."""
        return _TOKENS.findall(str(text))

    def decode(self, *_: Any, **__: Any) -> str:
        """Some text."""
        return PROMPT

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        """Some text for each row."""
        return [PROMPT for _ in ids]

    def apply_chat_template(self, messages: Any, *, tokenize: bool = True, **options: Any) -> Any:
        """The messages of one chat or of several, marked as most models mark them."""
        is_one = bool(messages) and isinstance(messages[0], dict)
        texts = [_chat(chat) for chat in ([messages] if is_one else messages)]
        if tokenize:
            return self(texts, **options)
        return texts[0] if is_one else texts

    def __len__(self) -> int:
        return self.vocab_size


def _chat(messages: Any) -> str:
    said = (f"<|im_start|>{m.get('role')}\n{_text(m.get('content'))}<|im_end|>\n" for m in messages)
    return "".join(said) + "<|im_start|>assistant\n"


def _text(content: Any) -> str:
    """A message is text, or a list of texts and pictures."""
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content or ())


class StandInProcessor:
    """Answers as transformers' image processors do: pixels of the size that encoders look at.

    Args:
        side: Height and width in pixels.
    """

    def __init__(self, side: int) -> None:
        self.tokenizer = StandInTokenizer(PROCESSOR_TOKENS)  # some take text too
        self.size = {"shortest_edge": side, "height": side, "width": side}
        self.crop_size = {"height": side, "width": side}
        self._side = side

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        """One image of pixels for each image given; ids where there is text."""
        from transformers import BatchFeature

        count = len(images) if isinstance(images, (list, tuple)) else 1
        if isinstance(images, torch.Tensor) and images.dim() == 4:
            count = images.shape[0]
        found = {"pixel_values": torch.zeros(count, 3, self._side, self._side)}
        if text is not None:
            found |= dict(self.tokenizer(text, return_tensors="pt"))
        return BatchFeature(found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)


class Unprocessed:
    """Takes the place of ``postprocess``: images are handed on as they came from the decoder."""

    def __call__(self, image: Any = None, *_: Any, **__: Any) -> Any:
        """The image as it is."""
        return image
